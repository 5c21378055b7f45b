"""The batch that data modules yield and methods read."""

import copy
import itertools
import pickle
from collections import OrderedDict, UserDict
from typing import NamedTuple

import pytest
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch.utils.data._utils.pin_memory import pin_memory

from distill_lightning import Batch, InputError
from distill_lightning.data.batch import Key, Mixture, first_tensor, map_tensors
from distill_lightning.data.views import Draws


@pytest.mark.parametrize("known", [{}, {"index": torch.arange(2)}, {"index": torch.arange(2), "view": torch.ones(2)}])
def test_a_batch_unpacks_as_input_and_target_and_what_is_known_of_its_key(known):
    inputs, target = torch.zeros(2, 1), torch.ones(2)
    x, y, *rest = Batch(inputs, target, **known)
    assert x is inputs
    assert y is target
    assert all(one is other for one, other in zip(rest, known.values(), strict=True))


def test_of_returns_a_batch_as_it_is():
    batch = Batch(torch.zeros(2), torch.ones(2), torch.arange(2), torch.arange(2))
    assert Batch.of(batch) is batch


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_of_reads_the_first_two_of_a_sequence(kind, extra):
    parts = [torch.full((2,), float(number)) for number in range(2 + extra)]
    batch = Batch.of(kind(parts))
    assert isinstance(batch, Batch)
    assert batch.input is parts[0]
    assert batch.target is parts[1]
    # What stands behind the target of a foreign batch has no known meaning.
    assert batch.index is None
    assert batch.view is None


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
@pytest.mark.parametrize(
    ("first", "second"), [("input", "target"), ("image", "label"), ("x", "y"), ("image", "target")]
)
def test_of_reads_a_dict_by_its_keys(kind, first, second):
    parts = [torch.full((2,), float(number)) for number in range(5)]
    keys = ("weather", second, "view", first, "index")
    batch = Batch.of(kind(zip(keys, parts, strict=True)))
    assert batch.input is parts[3]
    assert batch.target is parts[1]
    assert batch.index is parts[4]
    assert batch.view is parts[2]
    bare = Batch.of(kind({first: parts[0], second: parts[1]}))
    assert bare == Batch(parts[0], parts[1], None, None)


def test_of_takes_the_first_of_several_names():
    parts = [torch.full((2,), float(number)) for number in range(6)]
    batch = Batch.of(dict(zip(("y", "x", "label", "image", "target", "input"), parts, strict=True)))
    assert (batch.input, batch.target) == (parts[5], parts[4])


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_of_reads_what_counts(kind):
    counted = torch.tensor([True, False])
    batch = Batch.of(kind({"x": torch.zeros(2, 1), "y": torch.tensor([0, 1]), "counted": counted}))
    assert batch.counted is counted
    # Together with the targets that do not count.
    some = kind({"x": torch.zeros(2, 1), "y": torch.tensor([-100, 1]), "counted": torch.tensor([True, True])})
    assert Batch.of(some).counted.tolist() == [False, True]
    assert Batch.of(kind({"x": torch.zeros(2, 1), "y": torch.zeros(2), "counted": None})).counted is None


class Counting(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor
    counted: torch.Tensor


def test_of_reads_what_counts_in_a_named_tuple():
    batch = Batch.of(Counting(torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([False, True])))
    assert batch.counted.tolist() == [False, True]


@pytest.mark.parametrize(
    ("counted", "got"),
    [(torch.ones(2), "torch.float32"), (torch.tensor([1, 0]), "torch.int64"), ([True, True], "list")],
)
def test_of_refuses_what_counts_in_another_type(counted, got):
    # As a mask of numbers it would choose rows by their index.
    with pytest.raises(InputError, match=rf"counted in a batch must be a tensor of booleans .*, got {got}: convert it"):
        Batch.of({"x": torch.zeros(2, 1), "y": torch.tensor([0, 1]), "counted": counted})


class Named(NamedTuple):
    index: torch.Tensor
    label: torch.Tensor
    image: torch.Tensor


class Nameless(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor
    index: torch.Tensor


def test_of_reads_a_named_tuple_by_its_names_and_an_unknown_one_by_its_order():
    parts = [torch.full((2,), float(number)) for number in range(3)]
    assert Batch.of(Named(*parts)) == Batch(parts[2], parts[1], parts[0], None)
    assert Batch.of(Nameless(*parts)) == Batch(parts[0], parts[1], None, None)


@pytest.mark.parametrize("kind", [dict, UserDict, lambda named: Named(*named.values())])
def test_of_knows_no_index_that_is_no_tensor(kind):
    batch = Batch.of(kind({"index": ["a.jpg", "b.jpg"], "label": torch.tensor([0, 1]), "image": torch.zeros(2, 1)}))
    assert (batch.index, batch.key) == (None, None)
    assert len(batch.draws(0).uniform(1)) == 2
    seen = {"image": torch.zeros(2, 1), "index": torch.arange(2), "view": ["above", "below"]}
    assert Batch.of(seen).view is None
    assert Batch.of(seen).index is seen["index"]


ZEROS = torch.zeros(2)


@pytest.mark.parametrize("batch", [(ZEROS, None), (ZEROS,), {"x": ZEROS, "y": None}, {"image": ZEROS}])
def test_of_takes_a_missing_label(batch):
    assert Batch.of(batch).target is None
    assert Batch.of(batch).size == 2


@pytest.mark.parametrize("batch", [{"label": torch.zeros(1), "index": torch.zeros(1)}, {"pixels": 1}, {}])
def test_of_says_which_keys_a_dict_needs(batch):
    with pytest.raises(
        InputError, match="needs input, image or x, or tensors by the names of the network's arguments, got"
    ) as error:
        Batch.of(batch)
    assert str(list(batch)) in str(error.value)


@pytest.mark.parametrize(
    ("batch", "name"),
    [
        (torch.zeros(2, 2), "Tensor"),
        ("xy", "str"),
        ([], "list"),
        (None, "NoneType"),
    ],
)
def test_of_refuses_what_has_no_input(batch, name):
    with pytest.raises(InputError, match=f"a sequence of an input and perhaps a target, got {name}"):
        Batch.of(batch)


def test_an_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


# tensors of a batch of any structure


class ImageAndPose(NamedTuple):
    image: torch.Tensor
    pose: torch.Tensor


def inputs_of(structure, value=0.0):
    image, pose = torch.full((2, 1, 3, 3), value), torch.full((2, 2), value, dtype=torch.float16)
    if structure is torch.Tensor:
        return image
    if structure is dict:
        return {"image": image, "pose": pose}
    return ImageAndPose(image, pose) if structure is ImageAndPose else structure([image, pose])


STRUCTURES = [torch.Tensor, tuple, list, dict, ImageAndPose]


def full_batch(structure=torch.Tensor):
    one, two = torch.eye(3)[:2], torch.eye(3)[1:]
    index, view = torch.tensor([4, 5]), torch.tensor([0, 7])
    partner = Batch(inputs_of(structure, 1.0), torch.tensor([1, 2]), torch.tensor([9, 8]), view)
    return Batch(
        inputs_of(structure),
        (one + two) / 2,
        index,
        view,
        counted=torch.tensor([True, False]),
        partner=partner,
        mixture=Mixture(torch.tensor([0.5, 0.5]), one, two, partner.index),
        when=(2, 3),
    )


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return list(itertools.chain.from_iterable(tensors_of(part) for part in values))


def parts_of(batch):
    """The tensors of a batch, without its key."""
    own = [batch.input, batch.target, batch.index, batch.view, batch.counted, batch.mixture]
    parts = tensors_of([part for part in own if part is not None])
    return parts if batch.partner is None else parts + parts_of(batch.partner)


def equal(one, other):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(parts_of(one), parts_of(other), strict=True))


@pytest.mark.parametrize("move", [Batch.to, move_data_to_device])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_batch_moves_with_all_but_its_key(structure, move):
    batch = full_batch(structure)
    moved = move(batch, torch.device("meta"))
    assert type(moved) is Batch
    assert type(moved.input) is structure
    assert type(moved.partner.input) is structure
    assert type(moved.mixture) is Mixture
    assert len(parts_of(moved)) == len(parts_of(batch))
    assert {part.device.type for part in parts_of(moved)} == {"meta"}
    assert [part.shape for part in parts_of(moved)] == [part.shape for part in parts_of(batch)]
    # Stores read the key without waiting for the device.
    assert (moved.key.index.tolist(), moved.key.view.tolist()) == ([4, 5], [0, 7])
    assert (moved.partner.key.index.tolist(), moved.partner.key.view.tolist()) == ([9, 8], [0, 7])
    assert (moved.size, moved.device.type, moved.when) == (2, "meta", (2, 3))
    assert {part.device.type for part in parts_of(batch)} == {"cpu"}


def test_moving_a_batch_keeps_its_type_and_its_missing_parts():
    moved = move_data_to_device(Batch(torch.zeros(2), torch.ones(2), torch.arange(2)), torch.device("meta"))
    assert isinstance(moved, Batch)
    assert [part.device.type for part in moved] == ["meta"] * 3
    assert (moved.view, moved.counted, moved.partner, moved.mixture) == (None, None, None, None)
    bare = move_data_to_device(Batch(torch.zeros(2)), "meta")
    assert (bare.target, bare.index, bare.key) == (None, None, None)


@pytest.mark.lightning(since=(2, 1))
@pytest.mark.parametrize("structure", STRUCTURES)
def test_lightnings_double_precision_converts_a_batch(structure):
    from pytorch_lightning.plugins import DoublePrecision

    batch = full_batch(structure)
    wide = DoublePrecision().convert_input(batch)
    assert type(wide) is Batch
    assert type(wide.input) is structure
    for part, other in zip(parts_of(wide), parts_of(batch), strict=True):
        assert part.dtype == (torch.float64 if other.is_floating_point() else other.dtype)
        assert torch.equal(part.to(other.dtype), other)
    assert wide.when == (2, 3)
    assert torch.equal(wide.key.index, batch.index)
    assert torch.equal(wide.draws(1).uniform(2), batch.draws(1).uniform(2))
    assert batch.input is not wide.input
    assert DoublePrecision().convert_input(Batch(torch.zeros(2))).target is None


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda batch: pickle.loads(pickle.dumps(batch))])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_copied_batch_is_the_same(structure, again):
    batch = full_batch(structure)
    copied = again(batch)
    assert type(copied) is Batch
    assert type(copied.input) is structure
    assert equal(copied, batch)
    assert copied.when == batch.when
    assert isinstance(copied.key, Key)
    assert torch.equal(copied.key.index, batch.index)
    assert torch.equal(copied.partner.key.view, batch.view)


def test_a_loader_pins_a_batch(monkeypatch):
    # Only a machine with an accelerator can pin; what is asked for shows on any.
    pinned = []

    def pin(tensor, device=None):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = full_batch(dict)
    moved = pin_memory(batch)
    assert type(moved) is Batch
    assert equal(moved, batch)
    assert all(any(part is one for one in pinned) for part in parts_of(moved))
    # The key is read on the host; what is copied from there keeps it.
    assert moved.key.index is moved.index
    assert torch.equal(moved.partner.key.index, batch.partner.index)
    assert pin_memory(Batch(torch.zeros(2))).key is None


def test_replacing_the_index_makes_a_new_key_and_replacing_others_keeps_it():
    batch = full_batch()
    assert batch.replace(input=torch.ones(2)).key is batch.key
    assert batch.replace(target=None).partner is batch.partner
    other = batch.replace(index=torch.tensor([1, 2]))
    assert other.key.index.tolist() == [1, 2]
    assert other.key.view is batch.view
    assert batch.replace(view=None).key == Key(batch.index, None)
    assert batch.replace(index=None).key is None
    assert batch.replace(index=other.index, key=batch.key).key is batch.key
    assert batch.key.index.tolist() == [4, 5]


def test_a_partner_is_a_field_like_others():
    plain = Batch(torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([4, 5]), torch.tensor([0, 0]))
    other = Batch(torch.ones(2, 1), torch.tensor([1, 1]), torch.tensor([7, 8]), torch.tensor([0, 0]))
    paired = plain.replace(partner=other)
    assert Batch.of(paired) is paired
    assert plain.partner is None
    assert paired.partner is other
    assert (paired.size, len(list(paired))) == (2, 4)
    replaced = paired.replace(input=torch.full((2, 1), 3.0))
    assert isinstance(replaced, Batch)
    assert replaced.input.sum() == 6
    assert replaced.partner is other


# what counts


def test_on_the_host_a_target_of_minus_100_does_not_count():
    target = torch.tensor([[0, -100], [1, 2]])
    batch = Batch(torch.zeros(2, 2), target)
    assert batch.counted.tolist() == [[True, False], [True, True]]
    # Whatever else does not count: a sample, with all its positions.
    both = Batch(torch.zeros(2, 2), target, counted=torch.tensor([True, False]))
    assert both.counted.tolist() == [[True, False], [False, False]]
    assert batch.replace(target=torch.eye(2)).counted is batch.counted
    moved = batch.to("meta")
    assert moved.counted.device.type == "meta"
    assert torch.equal(Batch.of((torch.zeros(2), torch.tensor([-100, 1]))).counted, torch.tensor([False, True]))


@pytest.mark.parametrize(
    "target",
    [
        torch.tensor([0, -1, 100]),
        torch.tensor([-100.0, 1.0, 0.0]),
        # What -100 would be in a byte.
        torch.tensor([156, 1, 0], dtype=torch.uint8),
        torch.zeros(0, dtype=torch.long),
        None,
    ],
)
def test_all_count_where_no_class_is_minus_100_or_none_can_be_read(target):
    assert Batch(torch.zeros(3), target).counted is None


def test_on_another_device_a_mask_tells_what_counts_without_a_look():
    counted = Batch(torch.zeros(3), torch.full((3,), -100, device="meta")).counted
    assert (counted.shape, counted.dtype, counted.device.type) == ((3,), torch.bool, "meta")


# random numbers


def test_the_draws_are_functions_of_seed_index_and_view():
    batch = full_batch()
    expected = Draws(3, batch.index, batch.view).uniform(2)
    assert torch.equal(batch.draws(3).uniform(2), expected)
    # What a row gets depends on no other row, nor on when it is drawn.
    alone = Batch(torch.zeros(1), None, batch.index[1:], batch.view[1:], when=(8, 9))
    assert torch.equal(alone.draws(3).uniform(2), expected[1:])
    for change in ({"index": batch.index + 1}, {"view": batch.view + 1}):
        assert not (batch.replace(**change).draws(3).uniform(2) == expected).any()
    assert not (batch.draws(4).uniform(2) == expected).any()
    assert torch.equal(batch.replace(index=batch.index.int(), view=batch.view.int()).draws(3).uniform(2), expected)


def test_the_draws_of_some_rows_and_of_copies():
    batch, rows = full_batch(), torch.tensor([1, 0, 1])
    drawn = batch.draws(3, rows=rows).uniform(2)
    assert torch.equal(drawn, batch.draws(3).uniform(2)[rows])
    copies = batch.draws(3, rows=rows, copies=torch.tensor([0, 0, 1])).uniform(2)
    assert torch.equal(copies[:2], drawn[:2])
    assert not (copies[2] == drawn[2]).any()


def test_without_an_index_the_draws_are_functions_of_when():
    bare = Batch(torch.zeros(3, 1))
    drawn = {when: bare.replace(when=when).draws(0).uniform(1) for when in itertools.product(range(3), range(3))}
    assert len(torch.cat(list(drawn.values())).unique()) == 27
    assert torch.equal(bare.replace(when=(2, 1)).draws(0).uniform(1), drawn[2, 1])
    assert torch.equal(bare.draws(0).uniform(1), drawn[0, 0])
    # With an index alone, the epoch stands for the view.
    indexed = bare.replace(index=torch.arange(3), when=(2, 1))
    assert torch.equal(indexed.draws(0).uniform(1), bare.replace(when=(2, 0)).draws(0).uniform(1))


# nests


def test_several_nests_are_mapped_together_by_name_and_place():
    first, second = inputs_of(dict, 1.0), dict(reversed(inputs_of(dict, 2.0).items()))
    added = map_tensors(torch.add, {"pair": first, "name": "a"}, {"name": "b", "pair": second})
    assert list(added) == ["pair", "name"]
    assert added["name"] == "a"
    assert {name: values.unique().tolist() for name, values in added["pair"].items()} == {"image": [3.0], "pose": [3.0]}
    assert type(map_tensors(torch.add, inputs_of(ImageAndPose), inputs_of(tuple))) is ImageAndPose


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("other", [{"image": 1}, (torch.zeros(2),), torch.zeros(2), None])
def test_nests_that_differ_are_refused(structure, other):
    if structure is torch.Tensor and isinstance(other, torch.Tensor):
        assert torch.equal(map_tensors(lambda a, b: b, inputs_of(structure), other), other)
        return
    with pytest.raises(InputError, match="another structure"):
        map_tensors(torch.add, inputs_of(structure), other)


def test_the_first_tensor_is_found_however_deep_it_lies():
    wanted = torch.zeros(3)
    assert first_tensor({"names": ["a", "b", "c"], "rest": [(), {"x": (wanted, torch.zeros(2))}]}) is wanted
    assert Batch([["left", "right"], wanted]).size == 3


@pytest.mark.parametrize("value", ["text", ["a", "b"], {}, (), None])
def test_an_input_without_a_tensor_is_refused(value):
    with pytest.raises(InputError, match="needs at least one tensor as its input"):
        Batch(value).size  # noqa: B018  (a property)
