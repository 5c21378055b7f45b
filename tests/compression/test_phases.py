"""When phases begin and end, and which orders are refused."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest

from distill_lightning.compression import (
    L0,
    Cubic,
    Encode,
    HashShare,
    LearnMask,
    LowRank,
    MixedPrecision,
    Movement,
    OneShot,
    PruneUnits,
    PruneWeights,
    Quantize,
    Regularise,
    Sensitivity,
    ShareWeights,
    SoftMovement,
    Threshold,
    TieLayers,
)
from distill_lightning.compression.run.phases import plan
from distill_lightning.compression.steps.base import TrainedStep
from distill_lightning.errors import InputError


def times(steps, **options):
    return [(phase.begin, phase.end) for phase in plan(steps, **options)]


def test_phases_follow_each_other():
    steps = [PruneWeights(amount=0.5, finetune_epochs=3), ShareWeights(finetune_epochs=2), Encode()]
    assert times(steps, epochs=10, dense_epochs=4) == [(4, 7), (7, 9), (9, 9)]
    assert [phase.name for phase in plan(steps, epochs=10)] == ["1 PruneWeights", "2 ShareWeights", "3 Encode deflate"]


@pytest.mark.parametrize(
    ("at", "begin"), [(None, 2), (5, 5), (0.5, 5), (0.25, 2), (0.24, 2), (1.0, 10), ("end", 10), ("start", 0), (0, 0)]
)
def test_at_is_an_epoch_a_share_or_an_end(at, begin):
    # What says when it begins does not wait for the dense epochs that the others have.
    dense = 0 if begin < 2 else 2
    assert times([PruneWeights(amount=0.5, at=at)], epochs=10, dense_epochs=dense) == [(begin, begin)]


@pytest.mark.parametrize("at", [-1, 1.5, -0.5, "middle", True])
def test_another_at_is_refused(at):
    for make in (lambda: PruneWeights(amount=0.5, at=at), lambda: Encode(at=at)):
        with pytest.raises(InputError, match="at is an epoch, a fraction of all epochs, 'start' or 'end'"):
            make()


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (
            [PruneWeights(amount=0.5, finetune_epochs=3), Encode()],
            {"epochs": 2},
            "ends at 2: train for 3 epochs \\(max_epochs of a Trainer, epochs of a Compressor",
        ),
        ([PruneWeights(amount=0.5, at=5)], {"epochs": 4}, "lasts from epoch 5 to 5"),
        ([PruneWeights(amount=0.5, finetune_epochs=3), Encode(at=2)], {"epochs": 4}, "begins at epoch 2, and step 1"),
        ([LearnMask(Movement(0.5))], {"epochs": 4}, "learned while the network trains: give it"),
        (
            [Regularise(penalty="l1", weight=1.0)],
            {"epochs": 4},
            "a penalty has an effect only while the network trains",
        ),
        ([], {"epochs": 4, "dense_epochs": 5}, "dense_epochs=5 of 4 epochs: train for more"),
        ([], {"epochs": 4, "dense_epochs": -1}, "dense_epochs must not be negative, got -1"),
    ],
)
def test_what_does_not_fit_is_refused(steps, options, message):
    with pytest.raises(InputError, match=message):
        plan(steps, **options)


STRUCTURE = [PruneUnits(amount=0.5, unit="channel"), LowRank(rank=2), TieLayers(groups=[["a", "b"]])]
MASKS = [PruneWeights(amount=0.5)]
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
            with pytest.raises(InputError, match=r"step 2 .* cannot come after step 1 .*: .*; swap them"):
                plan([first, second], epochs=1)


@pytest.mark.parametrize("penalty", ["l1", "group_lasso", "bn_gamma"])
def test_a_penalty_comes_before_its_weights_are_computed_or_stored(penalty):
    free = Regularise(penalty=penalty, weight=1.0, finetune_epochs=1)
    assert len(plan([PruneWeights(amount=0.5), free, Quantize(), Encode()], epochs=1)) == 4
    with pytest.raises(InputError, match=r"step 2 \(Regularise.* cannot come after step 1 \(Encode.*swap them"):
        plan([Encode(), free], epochs=1)
    if penalty == "bn_gamma":  # scales of BatchNorm stay float
        assert len(plan([Quantize(), free], epochs=1)) == 2
        return
    for first in (Quantize(), ShareWeights()):
        with pytest.raises(InputError, match="no values of their own to prune or to regularise; swap them"):
            plan([first, free], epochs=1)


def test_heads_are_regularised_before_masks_because_attention_is_converted():
    heads = Regularise(penalty="group_lasso", granularity="head", weight=1.0, finetune_epochs=1)
    assert len(plan([PruneUnits(amount=0.5, unit="head"), heads], epochs=1)) == 2
    with pytest.raises(InputError, match="masks belong to weights"):
        plan([PruneWeights(amount=0.5), heads], epochs=1)


@pytest.mark.parametrize("first", STRUCTURE)
def test_a_ticket_of_before_the_structure_changed_is_refused(first):
    def ticket(rewind):
        return PruneWeights(amount=0.5, rewind=rewind, at=4, finetune_epochs=1)

    first = replace(first, at=2)
    for rewind in ("start", 1, 2):
        with pytest.raises(InputError, match=r"step 2 \(PruneWeights\) goes back to .* step 1 .* rewind=3 or later"):
            plan([first, ticket(rewind)], epochs=5)
    for rewind in (3, "random"):
        assert len(plan([first, ticket(rewind)], epochs=5)) == 2


def test_units_that_leave_at_the_end_make_a_ticket_of_before_useless():
    def steps(rewind, schedule):
        shrink = PruneUnits(amount=0.5, unit="channel", schedule=schedule, at=1, finetune_epochs=2)
        return [shrink, PruneWeights(amount=0.5, rewind=rewind, at=4, finetune_epochs=1)]

    assert len(plan(steps(2, OneShot()), epochs=5)) == len(plan(steps(4, Cubic()), epochs=5)) == 2
    for rewind, schedule in ((1, OneShot()), (2, Cubic()), (3, Cubic())):
        with pytest.raises(InputError, match="has other parameters than it will find"):
            plan(steps(rewind, schedule), epochs=5)


def test_a_ticket_is_not_of_a_phase_with_learned_masks():
    def steps(rewind):
        movement = LearnMask(Movement(0.3), at=1, finetune_epochs=2)
        return [movement, PruneWeights(amount=0.5, rewind=rewind, at=4, finetune_epochs=1)]

    for rewind in (2, 3):
        with pytest.raises(InputError, match="rewind=4 or later"):
            plan(steps(rewind), epochs=5)
    for rewind in ("start", 1, 4):
        assert len(plan(steps(rewind), epochs=5)) == 2


def test_a_penalty_may_stand_before_and_after_masks():
    free = Regularise(penalty="l1", weight=1.0, finetune_epochs=1)
    for steps in itertools.permutations([free, PruneWeights(amount=0.5), Quantize()]):
        if steps.index(free) > next(place for place, step in enumerate(steps) if isinstance(step, Quantize)):
            continue
        if steps.index(next(s for s in steps if isinstance(s, PruneWeights))) < steps.index(
            next(s for s in steps if isinstance(s, Quantize))
        ):
            assert len(plan(steps, epochs=1)) == 3
        else:
            with pytest.raises(InputError, match="have no values of their own to prune"):
                plan(steps, epochs=1)


NAN = math.nan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneWeights(schedule=Threshold(NAN)), "Threshold: value must be a finite number, got nan"),
        (lambda: Regularise(penalty="l1", weight=NAN), "Regularise: weight must be a finite number"),
        (lambda: LearnMask(L0(NAN)), "L0: weight must be a finite number"),
        (lambda: LearnMask(SoftMovement(penalty_weight=NAN)), "SoftMovement: penalty_weight must be a finite number"),
        (lambda: LowRank(rank=2, data_aware=True, damping=NAN), "LowRank: damping must be a finite number"),
        (lambda: PruneWeights(amount=NAN), "PruneWeights: amount must be a finite number"),
        (lambda: PruneWeights(amount={"a": 0.5, "b": NAN}), "PruneWeights: amount must be a finite number"),
        (lambda: PruneWeights(amount=0.5, at=NAN), "PruneWeights: at must be a finite number"),
        (lambda: PruneWeights(scope=Sensitivity(max_drop=NAN)), "Sensitivity: max_drop must be a finite number"),
        (lambda: Sensitivity(max_drop=0.1, levels=[0.1, NAN]), "Sensitivity: levels must be a finite number"),
        (lambda: MixedPrecision(ratio=math.inf), "MixedPrecision: ratio must be a finite number, got inf"),
        (lambda: Encode(at=NAN), "Encode: at must be a finite number"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_new_step_refuses_them_unasked():
    @dataclass(frozen=True, kw_only=True)
    class Clamp(TrainedStep):
        limit: float = 1.0
        times: int = 1

        def act(self, piece):
            piece.changed = True

    with pytest.raises(InputError, match="Clamp: limit must be a finite number, got inf"):
        Clamp(limit=math.inf)
    with pytest.raises(InputError, match=r"Clamp: times must be an integer, got 1\.5"):
        Clamp(times=1.5)
