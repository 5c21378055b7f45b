"""The batch that data modules yield and methods read."""

import copy
import pickle
from collections import OrderedDict, UserDict
from typing import NamedTuple

import pytest
import torch
from pytorch_lightning.utilities import move_data_to_device

from distill_lightning import Batch, InputError
from distill_lightning.data.batch import PairedBatch


def test_a_batch_unpacks_as_input_and_target():
    inputs, target = torch.zeros(2, 1), torch.ones(2)
    x, y, *rest = Batch(inputs, target)
    assert x is inputs
    assert y is target
    assert rest == [None, None]


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


@pytest.mark.parametrize("batch", [(torch.zeros(2), None), {"x": torch.zeros(2), "y": None}])
def test_of_takes_a_missing_label(batch):
    assert Batch.of(batch).target is None
    assert Batch.of(batch).size == 2


@pytest.mark.parametrize("batch", [{"input": 1}, {"label": 1, "index": 2}, {"pixels": 1, "labels": 2}, {}])
def test_of_says_which_keys_a_dict_needs(batch):
    with pytest.raises(InputError, match="needs input, image or x, and target, label or y, got") as error:
        Batch.of(batch)
    assert str(list(batch)) in str(error.value)


@pytest.mark.parametrize(
    ("batch", "name"),
    [
        (torch.zeros(2, 2), "Tensor"),
        ("xy", "str"),
        ((torch.zeros(1),), "tuple"),
        ([], "list"),
        (None, "NoneType"),
    ],
)
def test_of_refuses_what_is_no_pair(batch, name):
    with pytest.raises(InputError, match=rf"an \(input, target\) pair, got {name}"):
        Batch.of(batch)


def test_moving_a_batch_keeps_its_type_and_its_missing_parts():
    moved = move_data_to_device(Batch(torch.zeros(2), torch.ones(2), torch.arange(2)), torch.device("meta"))
    assert isinstance(moved, Batch)
    assert [part.device.type for part in moved[:3]] == ["meta"] * 3
    assert moved.view is None


def test_an_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


def test_a_paired_batch_is_a_batch_with_a_fifth_field():
    plain = Batch(torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([4, 5]), torch.tensor([0, 0]))
    other = Batch(torch.ones(2, 1), torch.tensor([1, 1]), torch.tensor([7, 8]), torch.tensor([0, 0]))
    paired = PairedBatch(*plain, other)
    assert Batch.of(paired) is paired
    assert plain.partner is None
    assert paired.partner is other
    assert (paired.size, len(paired), paired._fields[4]) == (2, 5, "partner")
    replaced = paired._replace(input=torch.full((2, 1), 3.0))
    assert isinstance(replaced, PairedBatch)
    assert replaced.input.sum() == 6
    assert replaced.partner is other
    for again in (copy.deepcopy(paired), pickle.loads(pickle.dumps(paired)), move_data_to_device(paired, "cpu")):
        assert isinstance(again, PairedBatch)
        assert torch.equal(again.partner.input, other.input)
        assert torch.equal(again.index, plain.index)
    assert move_data_to_device(paired, "meta").partner.target.device.type == "meta"
    assert repr(paired).startswith("PairedBatch(input=")
