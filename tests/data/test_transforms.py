"""Batch transforms against loops over rows, their invariances, their edges and their refusals."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch

from distill_lightning import Batch, InputError
from distill_lightning.data import transforms
from distill_lightning.data.batch import Mixture
from distill_lightning.data.mixing import cutmix, cutout
from distill_lightning.data.transforms import BatchTransform, CutMix, Cutout, LabelSmoothing, Mixup
from distill_lightning.data.views import uniform_draws

K = 3
MIXING = [Mixup, CutMix]
# The numbers that keep a transform's draws apart from those of the views.
STREAMS = {Mixup: 0x4D495855, CutMix: 0x43555458, Cutout: 0x4355544F}
# Quantiles of Beta(alpha, alpha) that can be written down.
QUANTILES = {0.5: lambda level: math.sin(math.pi * level / 2) ** 2, 1.0: lambda level: level}


def batch_of(rows, *, seed=0, partners=False, height=6, width=8, dtype=torch.float32, **changes):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(rows, 2, height, width, generator=generator).to(dtype) + 0.1
    target = torch.randint(K, (rows,), generator=generator)
    # Ten thousand samples, so that no two rows are the same.
    index = torch.randperm(10_000, generator=generator)[:rows]
    view = torch.randint(9, (rows,), generator=generator)
    partner = batch_of(rows, seed=seed + 1000, height=height, width=width, dtype=dtype) if partners else None
    return Batch(images, target, index, view, partner=partner).replace(**changes)


def one_hot(label):
    return [0.0] * K if label == -100 else [float(label == one) for one in range(K)]


def take(batch, rows):
    partner = None if batch.partner is None else take(batch.partner, rows)
    fields = ("input", "target", "index", "view", "counted")
    taken = {name: getattr(batch, name) for name in fields}
    return Batch(**{k: None if v is None else v[rows] for k, v in taken.items()}, partner=partner)


def equal(one, other, *, mixture=True):
    pairs = [(one.input, other.input), (one.target, other.target), (one.index, other.index)]
    if mixture:
        pairs += list(zip(one.mixture, other.mixture, strict=True))
    return all(torch.equal(*pair) for pair in pairs)


def naive(transform, batch):
    """Row by row in plain Python: (second's row or None for the partner, share wanted, centre)."""
    table = uniform_draws(transform.seed + STREAMS[type(transform)], batch.index, batch.view, 5).tolist()
    order = sorted(range(len(table)), key=lambda row: table[row][4])
    after = {row: order[(place + 1) % len(order)] for place, row in enumerate(order)}
    found = []
    for row, (chosen, level, *centre, _) in enumerate(table):
        share = QUANTILES[transform.alpha](level) if chosen < transform.probability else 1.0
        found.append((None if batch.partner is not None else after[row], share, centre))
    return found


def naive_mixed(transform, batch):
    rows, labels, shares, indices = [], [], [], []
    for row, (second, wanted, centre) in enumerate(naive(transform, batch)):
        pool, place = (batch.partner, row) if second is None else (batch, second)
        share = wanted
        image, other = batch.input[row].double(), pool.input[place].double()
        if isinstance(transform, CutMix):
            height, width = image.shape[1:]
            side, made, taken = math.sqrt(1 - share), image.clone(), 0
            starts = [round((at - side / 2) * length) for at, length in zip(centre, (height, width), strict=True)]
            sizes = [round(side * length) for length in (height, width)]
            for y in range(height):
                for x in range(width):
                    if starts[0] <= y < starts[0] + sizes[0] and starts[1] <= x < starts[1] + sizes[1]:
                        made[:, y, x] = other[:, y, x]
                        taken += 1
            share = 1 - taken / (height * width)
        else:
            made = share * image + (1 - share) * other
        one, two = one_hot(batch.target[row].item()), one_hot(pool.target[place].item())
        rows.append(made)
        labels.append([share * a + (1 - share) * b for a, b in zip(one, two, strict=True)])
        shares.append(share)
        indices.append(pool.index[place].item())
    return torch.stack(rows), torch.tensor(labels), torch.tensor(shares), indices


# Mixup and CutMix


@pytest.mark.slow
@pytest.mark.parametrize("partners", [False, True])
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("kind", MIXING)
def test_mixing_is_the_loop(kind, rows, alpha, probability, partners):
    transform, batch = kind(alpha, probability, seed=5), batch_of(rows, partners=partners)
    mixed = transform(batch, num_classes=K)
    inputs, labels, shares, indices = naive_mixed(transform, batch)
    assert torch.allclose(mixed.input.double(), inputs, atol=1e-5)
    assert torch.allclose(mixed.target, labels, atol=1e-5)
    assert mixed.mixture.share.tolist() == pytest.approx(shares.tolist(), abs=2e-6)
    assert mixed.mixture.index.tolist() == indices
    assert mixed.mixture.first.tolist() == [one_hot(label) for label in batch.target.tolist()]
    assert mixed.target.dtype == mixed.mixture.first.dtype == mixed.mixture.share.dtype == torch.float32
    assert (mixed.index, mixed.view, mixed.key, mixed.partner) == (batch.index, batch.view, batch.key, batch.partner)


@pytest.mark.parametrize("partners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MIXING)
def test_a_row_that_is_not_drawn_is_the_same_bit_for_bit(kind, dtype, partners):
    batch = batch_of(64, dtype=dtype, partners=partners)
    batch.input[:, 0, 0] = -0.0
    (batch if batch.partner is None else batch.partner).input[:, 1, 1] = math.inf
    before = copy.deepcopy(batch)
    mixed = kind(probability=0.5)(batch, num_classes=K)
    still = mixed.mixture.share == 1
    assert 16 < still.sum() < 48
    whole = torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(mixed.input[still].view(whole), batch.input[still].view(whole))
    assert torch.equal(mixed.target[still], mixed.mixture.first[still])
    assert mixed.input.dtype == dtype
    assert mixed.target.dtype == torch.float32
    assert equal(batch, before, mixture=False)


def test_of_several_images_all_are_whole_where_the_first_is():
    plain = batch_of(200, height=3, width=3)
    large = torch.rand(200, 1, 64, 64)
    mixed = CutMix(alpha=0.3, probability=1.0)(plain.replace(input=(plain.input, large)), num_classes=K)
    whole = mixed.mixture.share == 1
    assert 20 < whole.sum() < 180
    assert torch.equal(mixed.input[1][whole], large[whole])
    assert (mixed.input[1] != large).flatten(1).any(1)[~whole].sum() > 20


@pytest.mark.parametrize("kind", MIXING)
def test_with_a_probability_of_0_nothing_changes(kind):
    batch = batch_of(9)
    mixed = kind(probability=0)(batch, num_classes=K)
    assert torch.equal(mixed.input, batch.input)
    assert mixed.mixture.share.tolist() == [1.0] * 9
    assert mixed.target.argmax(1).tolist() == batch.target.tolist()


@pytest.mark.parametrize("kind", MIXING)
def test_about_as_many_rows_are_mixed_as_asked_for(kind):
    shares = kind(probability=0.3)(batch_of(4000, height=9, width=9), num_classes=K).mixture.share
    # A standard deviation of 29; CutMix's smallest rectangles have no pixel at all.
    assert abs((shares < 1).sum().item() - 1200) < 120


@pytest.mark.parametrize("partners", [False, True])
@pytest.mark.parametrize("kind", MIXING)
def test_the_order_of_the_batch_does_not_matter(kind, partners):
    batch = batch_of(9, partners=partners)
    rows = torch.randperm(9)
    mixed = kind(seed=2)(batch, num_classes=K)
    again = kind(seed=2)(take(batch, rows), num_classes=K)
    for one, other in zip(
        [mixed.input, mixed.target, *mixed.mixture], [again.input, again.target, *again.mixture], strict=True
    ):
        assert torch.equal(one[rows], other)


@pytest.mark.parametrize("transform", [Mixup(), CutMix(), Cutout(3), LabelSmoothing(0.1)])
def test_with_partners_a_batch_can_be_shared_out(transform):
    batch = batch_of(10, partners=True)
    whole = transform(batch, num_classes=K)
    for rows in (slice(0, 4), slice(4, 10), slice(1, None, 2), slice(7, 8)):
        part = transform(take(batch, rows), num_classes=K)
        assert torch.equal(part.input, whole.input[rows])
        assert torch.equal(part.target, whole.target[rows])
        assert torch.equal(part.partner.input, whole.partner.input[rows])


@pytest.mark.parametrize("kind", MIXING)
def test_without_partners_every_row_is_mixed_in_once_and_none_with_itself(kind):
    batch = batch_of(12)
    index = kind(probability=1.0)(batch, num_classes=K).mixture.index
    assert sorted(index.tolist()) == sorted(batch.index.tolist())
    assert not (index == batch.index).any()


def test_the_other_rows_of_a_batch_have_their_own_key():
    batch = batch_of(12)
    other = transforms._next_rows(batch, batch.draws(0))
    assert not torch.equal(other.index, batch.index)
    assert torch.equal(other.key.index, other.index)
    assert torch.equal(other.key.view, other.view)
    assert transforms._next_rows(batch.replace(index=None, view=None), batch.draws(0)).key is None


@pytest.mark.parametrize("kind", MIXING)
def test_the_draws_depend_on_the_seed_the_index_and_the_view(kind):
    batch = batch_of(9, partners=True)
    shares = kind(probability=1.0)(batch, num_classes=K).mixture.share
    assert torch.equal(kind(probability=1.0)(batch, num_classes=K).mixture.share, shares)
    assert not torch.equal(kind(probability=1.0, seed=1)(batch, num_classes=K).mixture.share, shares)
    for change in ({"index": batch.index + 1}, {"view": batch.view + 1}):
        assert not torch.equal(kind(probability=1.0)(batch.replace(**change), num_classes=K).mixture.share, shares)


@pytest.mark.parametrize("kind", MIXING)
def test_without_an_index_the_draws_depend_on_when(kind):
    batch = batch_of(9, index=None, view=None)
    found = [kind()(batch.replace(when=when), num_classes=K) for when in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(found[0].input, found[3].input)
    assert not torch.equal(found[0].input, found[1].input)
    assert not torch.equal(found[0].input, found[2].input)
    assert found[0].mixture.index is None


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("missing", ["counted", "class"])
@pytest.mark.parametrize("of_partner", [False, True])
def test_rows_that_do_not_count_are_neither_mixed_nor_mixed_in(kind, missing, of_partner):
    batch = batch_of(8, partners=of_partner)
    where = batch.partner if of_partner else batch
    gone = torch.tensor([2, 5])
    counted = torch.ones(8, dtype=torch.bool).index_fill(0, gone, False)
    changed = (
        where.replace(counted=counted)
        if missing == "counted"
        else where.replace(target=where.target.index_fill(0, gone, -100))
    )
    # What a target of -100 does to a batch shows on the host, before it is moved.
    assert torch.equal(changed.counted, counted)
    batch = batch.replace(partner=changed) if of_partner else changed
    mixed = kind(probability=1.0)(batch, num_classes=K)
    found = mixed.mixture
    if not of_partner:
        assert not mixed.counted[gone].any()
        after = [row for row in range(8) if found.index[row] in batch.index[gone]]
        assert len(after) == 2
        still = torch.tensor(sorted({*gone.tolist(), *after}))
    else:
        assert mixed.counted is None
        still = gone
    assert (found.share[still] == 1).all()
    assert torch.equal(mixed.input[still], batch.input[still])
    assert torch.equal(mixed.target[still], found.first[still])
    assert torch.isfinite(mixed.target).all()
    if missing == "class":
        assert not (found.second[gone] if of_partner else mixed.target[gone]).any()
    others = kind(probability=1.0)(batch_of(8, partners=of_partner), num_classes=K).mixture.share
    rest = [row for row in range(8) if row not in still.tolist()]
    assert torch.equal(found.share[rest], others[rest])


@pytest.mark.parametrize("kind", MIXING)
def test_distributions_are_mixed_like_classes(kind):
    batch = batch_of(9, partners=True)
    hard = batch.replace(
        target=torch.eye(K)[batch.target], partner=batch.partner.replace(target=torch.eye(K)[batch.partner.target])
    )
    assert equal(kind()(batch, num_classes=K), kind()(hard, num_classes=K))


@pytest.mark.parametrize("kind", MIXING)
def test_two_classes_and_one_sample(kind):
    batch = batch_of(1, target=torch.tensor([1]))
    mixed = kind(probability=1.0)(batch, num_classes=2)
    assert mixed.target.tolist() == [[0.0, 1.0]]
    assert torch.allclose(mixed.input, batch.input)
    assert mixed.mixture.index.tolist() == batch.index.tolist()


@pytest.mark.parametrize("structure", [tuple, dict])
@pytest.mark.parametrize("partners", [False, True])
@pytest.mark.parametrize("kind", MIXING)
def test_inputs_of_several_tensors_are_mixed_together(kind, partners, structure):
    def both(batch):
        poses = batch.input[:, :, 0, 0].clone()
        return (batch.input, poses) if structure is tuple else {"image": batch.input, "pose": poses}

    plain = batch_of(9, partners=partners)
    batch = plain.replace(input=both(plain))
    if partners:
        batch = batch.replace(partner=plain.partner.replace(input=both(plain.partner)))
    mixed, alone = kind(probability=1.0)(batch, num_classes=K), kind(probability=1.0)(plain, num_classes=K)
    assert type(mixed.input) is structure
    image, pose = mixed.input if structure is tuple else (mixed.input["image"], mixed.input["pose"])
    assert torch.equal(image, alone.input)
    assert torch.equal(mixed.target, alone.target)
    pool = plain.partner if partners else plain
    second = torch.stack([pool.input[pool.index == index][0, :, 0, 0] for index in alone.mixture.index])
    share = alone.mixture.share[:, None]
    assert torch.allclose(pose, share * plain.input[:, :, 0, 0] + (1 - share) * second)


def test_a_row_that_is_mixed_already_is_not_mixed_again():
    batch = batch_of(40, partners=True)
    once = Mixup(probability=0.5)(batch, num_classes=K)
    twice = CutMix(probability=1.0)(once, num_classes=K)
    earlier = once.mixture.share < 1
    assert 10 < earlier.sum() < 30
    assert torch.equal(twice.input[earlier], once.input[earlier])
    assert torch.equal(twice.target[earlier], once.target[earlier])
    for now, then in zip(twice.mixture, once.mixture, strict=True):
        assert torch.equal(now[earlier], then[earlier])
    alone = CutMix(probability=1.0)(batch, num_classes=K)
    assert torch.equal(twice.input[~earlier], alone.input[~earlier])
    assert torch.equal(twice.target[~earlier], alone.target[~earlier])
    assert torch.equal(twice.mixture.index, batch.partner.index)


def test_mixing_again_needs_partners():
    mixed = Mixup(probability=0.5)(batch_of(4), num_classes=K)
    with pytest.raises(InputError, match="CutMix: these rows are mixed already: give the data module partners=True"):
        CutMix()(mixed, num_classes=K)


# Cutout


@pytest.mark.parametrize("size", [1, 3, 20])
def test_cutout_is_the_loop(size):
    batch = batch_of(9)
    table = uniform_draws(4 + STREAMS[Cutout], batch.index, batch.view, 2).tolist()
    cut = Cutout(size, seed=4)(batch, num_classes=K)
    for row, centre in enumerate(table):
        starts = [round((at - size / length / 2) * length) for at, length in zip(centre, (6, 8), strict=True)]
        for y in range(6):
            for x in range(8):
                gone = starts[0] <= y < starts[0] + size and starts[1] <= x < starts[1] + size
                expected = torch.zeros(2) if gone else batch.input[row, :, y, x]
                assert torch.equal(cut.input[row, :, y, x], expected)
    assert cut.target is batch.target
    assert cut.key is batch.key
    assert cut.mixture is None
    assert (batch.input > 0).all()


def test_cutout_cuts_partners_by_their_own_draws():
    batch = batch_of(9, partners=True)
    cut = Cutout(3)(batch, num_classes=K)
    assert torch.equal(cut.partner.input, Cutout(3)(batch.partner, num_classes=K).input)
    assert torch.equal(cut.partner.target, batch.partner.target)
    assert torch.equal(cut.partner.key.index, batch.partner.index)


@pytest.mark.parametrize("structure", [tuple, dict])
def test_cutout_cuts_the_images_alone(structure):
    batch = batch_of(5)
    poses = torch.ones(5, 2)
    both = (poses, batch.input) if structure is tuple else {"pose": poses, "image": batch.input}
    cut = Cutout(3)(batch.replace(input=both), num_classes=K).input
    pose, image = cut if structure is tuple else (cut["pose"], cut["image"])
    assert pose is poses
    assert torch.equal(image, Cutout(3)(batch, num_classes=K).input)


@pytest.mark.parametrize("kind", MIXING)
def test_cutout_before_mixing_cuts_both_samples_and_after_it_one(kind):
    batch, cut, mix = batch_of(9, partners=True), Cutout(3, seed=1), kind(probability=1.0)
    before = mix(cut(batch, num_classes=K), num_classes=K)
    centres = [part.draws(1 + STREAMS[Cutout]).uniform(2) for part in (batch, batch.partner)]
    first, second = (
        cutout(part.input, 3, centre) for part, centre in zip((batch, batch.partner), centres, strict=True)
    )
    _, level, down, right = batch.draws(STREAMS[kind]).uniform(4).unbind(1)
    if kind is Mixup:
        share = level.float().view(-1, 1, 1, 1)
        expected = share * first + (1 - share) * second
    else:
        expected, _ = cutmix(first, second, level.float(), torch.stack([down, right], 1).float())
    assert torch.allclose(before.input, expected, atol=1e-6)
    after = cut(mix(batch, num_classes=K), num_classes=K)
    assert torch.equal(after.input, cutout(mix(batch, num_classes=K).input, 3, centres[0]))
    assert torch.equal(after.target, before.target)


@pytest.mark.parametrize("partners", [False, True])
def test_cutout_leaves_the_targets_of_a_regression_alone(partners):
    plain, target = batch_of(5, partners=partners), torch.randn(5, 2)
    batch = plain.replace(target=target)
    if partners:
        batch = batch.replace(partner=plain.partner.replace(target=target + 1))
    cut = Cutout(3)(batch, num_classes=0)
    assert cut.target is target
    assert torch.equal(cut.input, Cutout(3)(plain, num_classes=K).input)
    if partners:
        assert torch.equal(cut.partner.target, target + 1)


# label smoothing


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_label_smoothing_is_the_formula(classes, epsilon):
    batch = batch_of(9).replace(target=torch.randint(classes, (9,)))
    smooth = LabelSmoothing(epsilon)(batch, num_classes=classes).target
    assert smooth.dtype == torch.float32
    for row, label in enumerate(batch.target.tolist()):
        expected = [(1 - epsilon) * (one == label) + epsilon / classes for one in range(classes)]
        assert smooth[row].tolist() == pytest.approx(expected, abs=1e-7)
    assert smooth.sum(1).tolist() == pytest.approx([1.0] * 9, abs=1e-6)


def test_label_smoothing_smooths_given_distributions_and_partners():
    probs = torch.rand(9, K).softmax(1)
    batch = batch_of(9, partners=True, target=probs)
    smooth = LabelSmoothing(0.3)(batch, num_classes=K)
    assert torch.allclose(smooth.target, 0.7 * probs + 0.1)
    assert torch.allclose(smooth.partner.target, 0.7 * torch.eye(K)[batch.partner.target] + 0.1)
    assert smooth.input is batch.input


@pytest.mark.parametrize("partners", [False, True])
@pytest.mark.parametrize("kind", MIXING)
def test_label_smoothing_is_the_same_before_and_after_mixing(kind, partners):
    batch = batch_of(12, partners=partners)
    # Also of a sample that has no class, which does not count.
    batch = batch.replace(target=batch.target.index_fill(0, torch.tensor([3]), -100))
    smooth, mix = LabelSmoothing(0.2), kind(probability=0.7)
    before = mix(smooth(batch, num_classes=K), num_classes=K)
    after = smooth(mix(batch, num_classes=K), num_classes=K)
    assert torch.equal(before.input, after.input)
    assert torch.allclose(before.target, after.target, atol=1e-6)
    for one, other in zip(before.mixture, after.mixture, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    rows = torch.arange(12) != 3
    assert before.target[rows].sum(1).tolist() == pytest.approx([1.0] * 11, abs=1e-5)
    assert not before.target[3].any()
    assert before.counted.tolist() == after.counted.tolist() == rows.tolist()
    assert mix(batch, num_classes=K).target.max() > after.target.max()


def test_label_smoothing_of_positions():
    target = torch.tensor([[0, 1, -100], [2, 2, 1]])
    batch = Batch(torch.zeros(2, 3), target)
    smooth = LabelSmoothing(0.3)(batch, num_classes=K)
    assert smooth.target.shape == (2, 3, K)
    assert smooth.target[1, 2].tolist() == pytest.approx([0.1, 0.8, 0.1])
    assert smooth.target[0, 2].tolist() == [0, 0, 0]
    assert smooth.counted.tolist() == (target != -100).tolist()
    assert torch.allclose(LabelSmoothing(0.3)(smooth, num_classes=K).target[1], 0.7 * smooth.target[1] + 0.1)


# all of them

ALL = [Mixup(0.4), CutMix(1.0, 1.0), Cutout(3), LabelSmoothing(0.1)]


@pytest.mark.parametrize("transform", ALL, ids=lambda one: type(one).__name__)
def test_a_transform_says_what_it_changes_and_needs(transform):
    batch = batch_of(9)
    assert transform.changes_inputs is not torch.equal(transform(batch, num_classes=K).input, batch.input)
    without = batch.replace(target=torch.randn(9, 2))
    if transform.needs_classes:
        with pytest.raises(InputError, match="needs classes"):
            transform(without, num_classes=0)
    else:
        assert transform(without, num_classes=0).target is without.target


@pytest.mark.parametrize("transform", ALL, ids=lambda one: type(one).__name__)
def test_a_transform_is_an_immutable_description(transform):
    assert isinstance(transform, BatchTransform)
    assert not dataclasses.is_dataclass(BatchTransform)
    with pytest.raises(TypeError, match="abstract"):
        BatchTransform()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(transform, dataclasses.fields(transform)[0].name, 1)
    values = {field.name: getattr(transform, field.name) for field in dataclasses.fields(transform)}
    assert type(transform)(**values) == transform == pickle.loads(pickle.dumps(transform))
    assert {type(value) for value in values.values()} <= {int, float}


@pytest.mark.parametrize("partners", [False, True])
@pytest.mark.parametrize("transform", ALL, ids=lambda one: type(one).__name__)
def test_a_transform_never_waits_for_the_device(transform, partners):
    # On the meta device there are no values, so that asking for one is an error.
    batch = batch_of(5, partners=partners).to("meta")
    made = transform(batch, num_classes=K)
    assert made.input.shape == batch.input.shape
    assert made.input.device.type == made.target.device.type == "meta"
    assert torch.equal(made.key.index, batch_of(5).index)


@pytest.mark.parametrize("transform", ALL, ids=lambda one: type(one).__name__)
def test_a_transform_leaves_the_batch_and_the_global_generator_alone(transform):
    batch = batch_of(5, partners=True)
    before, state = copy.deepcopy(batch), torch.get_rng_state()
    made = transform(batch, num_classes=K)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(batch, before, mixture=False)
    assert equal(batch.partner, before.partner, mixture=False)
    assert batch.mixture is None
    assert (made.index, made.view, made.when) == (batch.index, batch.view, batch.when)


def test_the_transforms_draw_different_numbers():
    batch = batch_of(5)
    drawn = [batch.draws(stream).uniform(2) for stream in (0, *STREAMS.values())]
    assert len(torch.cat(drawn).flatten().unique()) == 40


@pytest.mark.parametrize("transform", [Mixup(), CutMix(), LabelSmoothing(0.1)], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(
    "target", [None, torch.rand(4, 2), torch.rand(4), torch.rand(4, 1, K + 1), torch.rand(()), [0, 1, 2, 0]]
)
def test_targets_of_another_kind_are_refused(transform, target):
    with pytest.raises(InputError, match=rf"{type(transform).__name__} needs classes \(N,\) or distributions \(N, 3\)"):
        transform(batch_of(4, target=target), num_classes=K)


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("target", [torch.zeros(4, 5, dtype=torch.long), torch.rand(4, 5, K)])
def test_targets_of_positions_are_not_mixed(kind, target):
    with pytest.raises(InputError, match=rf"{kind.__name__} needs classes"):
        kind()(batch_of(4, target=target), num_classes=K)


@pytest.mark.parametrize(
    ("transform", "inputs", "message"),
    [
        (Mixup(), torch.arange(12).view(4, 3), "Mixup needs inputs of a floating type"),
        (CutMix(), torch.rand(4, 3), r"CutMix needs images \(N, C, H, W\)"),
        (Cutout(2), (torch.rand(4, 3), torch.rand(4, 2, 3)), r"Cutout needs images \(N, C, H, W\)"),
    ],
)
def test_inputs_of_another_kind_are_refused(transform, inputs, message):
    with pytest.raises(InputError, match=message):
        transform(batch_of(4, input=inputs), num_classes=K)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *[
            (lambda kind=kind, alpha=alpha: kind(alpha=alpha), rf"{kind.__name__}: alpha must be positive and finite")
            for kind in MIXING
            for alpha in (0, -1.0, math.nan, math.inf)
        ],
        *[
            (lambda kind=kind, part=part: kind(probability=part), rf"{kind.__name__}: probability must be in \[0, 1\]")
            for kind in MIXING
            for part in (-0.1, 1.1, math.nan)
        ],
        *[(lambda size=size: Cutout(size), "Cutout: size must be at least 1 pixel") for size in (0, -3)],
        *[(lambda e=e: LabelSmoothing(e), r"epsilon must be in \[0, 1\)") for e in (-0.1, 1.0, math.nan)],
    ],
)
def test_options_that_are_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_mixture_says_what_the_target_is_made_of():
    mixed = Mixup()(batch_of(9), num_classes=K)
    assert isinstance(mixed.mixture, Mixture)
    share, first, second, _ = mixed.mixture
    assert torch.equal(mixed.target, share[:, None] * first + (1 - share[:, None]) * second)
