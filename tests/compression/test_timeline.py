"""When phases begin and end, and which orders are refused."""

import itertools

import pytest

from distill_lightning.compression import (
    Encode,
    HashShare,
    LowRank,
    Prune,
    Quantize,
    Regularise,
    ShareWeights,
    TieLayers,
)
from distill_lightning.compression.timeline import plan
from distill_lightning.errors import InputError


def times(steps, **options):
    return [(phase.begin, phase.end) for phase in plan(steps, **options)]


def test_phases_follow_each_other():
    steps = [Prune(amount=0.5, finetune_epochs=3), ShareWeights(finetune_epochs=2), Encode()]
    assert times(steps, epochs=10, dense_epochs=4) == [(4, 7), (7, 9), (9, 9)]
    assert [phase.name for phase in plan(steps, epochs=10)] == ["1 Prune weight", f"2 {steps[1]!r}", f"3 {steps[2]!r}"]


@pytest.mark.parametrize(
    ("at", "begin"), [(None, 2), (5, 5), (0.5, 5), (0.25, 2), (0.24, 2), (1.0, 10), ("end", 10), ("start", 0), (0, 0)]
)
def test_at_is_an_epoch_a_share_or_an_end(at, begin):
    # What says when it begins does not wait for the dense epochs that the others have.
    dense = 0 if begin < 2 else 2
    assert times([Prune(amount=0.5, at=at)], epochs=10, dense_epochs=dense) == [(begin, begin)]


@pytest.mark.parametrize("at", [-1, 1.5, -0.5, "middle", True])
def test_another_at_is_refused(at):
    with pytest.raises(InputError, match="at is an epoch, a fraction of all epochs, 'start' or 'end'"):
        Prune(amount=0.5, at=at)


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        ([Prune(amount=0.5, finetune_epochs=3), Encode()], {"epochs": 2}, "ends at 2: give the Trainer max_epochs=3"),
        ([Prune(amount=0.5, at=5)], {"epochs": 4}, "lasts from epoch 5 to 5"),
        ([Prune(amount=0.5, finetune_epochs=3), Encode(at=2)], {"epochs": 4}, "begins at epoch 2, and step 1"),
        ([Prune(amount=0.5, criterion="movement")], {"epochs": 4}, "learned while the network trains: give it"),
        ([Regularise(penalty="l1", weight=1.0)], {"epochs": 4}, "a penalty works while the network trains"),
        ([], {"epochs": 4, "dense_epochs": 5}, "dense_epochs=5 of max_epochs=4"),
        ([], {"epochs": 4, "dense_epochs": -1}, "dense_epochs=-1 of max_epochs=4"),
    ],
)
def test_what_does_not_fit_is_refused(steps, options, message):
    with pytest.raises(InputError, match=message):
        plan(steps, **options)


STRUCTURE = [Prune(amount=0.5, granularity="channel"), LowRank(rank=2), TieLayers(groups=[["a", "b"]])]
MASKS = [Prune(amount=0.5)]
VALUES = [ShareWeights(), HashShare(), Quantize()]
STORAGE = [Encode()]


def test_every_order_is_allowed_or_refused_by_what_it_does():
    ranked = list(enumerate([STRUCTURE, MASKS, VALUES, STORAGE]))
    pairs = [
        ((a, first), (b, second)) for a, ones in ranked for first in ones for b, others in ranked for second in others
    ]
    for (a, first), (b, second) in pairs:
        if a <= b:
            assert len(plan([first, second], epochs=1)) == 2
        else:
            with pytest.raises(InputError, match=r"step 2 .* cannot come after step 1 .*: .*; exchange them"):
                plan([first, second], epochs=1)


def test_a_step_without_an_order_stands_anywhere():
    free = Regularise(penalty="l1", weight=1.0, finetune_epochs=1)
    for steps in itertools.permutations([free, Prune(amount=0.5), Quantize()]):
        if steps.index(next(s for s in steps if isinstance(s, Prune))) < steps.index(
            next(s for s in steps if isinstance(s, Quantize))
        ):
            assert len(plan(steps, epochs=1)) == 3
        else:
            with pytest.raises(InputError, match="have no values of their own to prune"):
                plan(steps, epochs=1)
