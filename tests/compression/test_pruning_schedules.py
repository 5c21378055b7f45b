"""How much is pruned when."""

import pytest

from distill_lightning import InputError
from distill_lightning.compression import PruneUnits, PruneWeights
from distill_lightning.compression.steps.schedules import Cubic, Iterative, OneShot, Threshold

SCHEDULES = [
    OneShot(),
    Iterative(1),
    Iterative(4),
    Iterative(4, spacing="geometric"),
    Cubic(),
    Cubic(0.2, 0.8, every=7, initial=0.1),
    Cubic(every=1000),
]


def amounts(schedule, final, steps):
    return [schedule.amount(final, step=step, steps=steps) for step in range(steps + 2)]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("final", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 3, 50, 101])
def test_every_schedule_rises_and_ends_at_exactly_the_final_amount(schedule, final, steps):
    values = amounts(schedule, final, steps)
    assert values == sorted(values)
    assert values[steps] == values[-1] == final
    assert 0 <= values[0] <= final


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_an_amount_of_zero_prunes_nothing(schedule):
    if getattr(schedule, "initial", 0) == 0:
        assert set(amounts(schedule, 0.0, 50)) == {0.0}


def test_one_shot_is_at_once():
    assert OneShot().amount(0.7, step=0, steps=100) == 0.7


@pytest.mark.parametrize("every", [1, 10])
def test_cubic_is_the_formula_at_every_update(every):
    values = amounts(Cubic(every=every, initial=0.2), 0.9, 100)
    for step in range(101):
        update = step - step % every
        assert values[step] == pytest.approx(0.9 + (0.2 - 0.9) * (1 - update / 100) ** 3, rel=1e-12)


def test_cubic_runs_between_start_and_end():
    values = amounts(Cubic(0.2, 0.6), 0.8, 100)
    assert values[:21] == [0.0] * 21
    assert values[21] > 0
    assert values[40] == pytest.approx(0.8 * (1 - 0.5**3))
    assert values[59] < 0.8
    assert set(values[60:]) == {0.8}


def test_cubic_changes_only_at_updates():
    values = amounts(Cubic(every=10), 0.8, 95)
    changes = [step for step in range(1, len(values)) if values[step] != values[step - 1]]
    assert changes == [10, 20, 30, 40, 50, 60, 70, 80, 90, 95]


def test_iterative_names_the_final_amount_and_does_not_compound():
    values = amounts(Iterative(3), 0.6, 90)
    assert values[0] == values[29] == pytest.approx(0.2)
    assert values[30] == values[59] == pytest.approx(0.4)
    assert values[60] == values[91] == 0.6
    assert len(set(values)) == 3


def test_geometric_rounds_prune_the_same_share_of_what_is_left():
    values = sorted(set(amounts(Iterative(3, spacing="geometric"), 0.875, 30)))
    assert values == pytest.approx([0.5, 0.75, 0.875])


def test_a_schedule_is_a_function_of_the_step_alone():
    schedule = Cubic(every=10)
    values = amounts(schedule, 0.8, 100)
    assert [schedule.amount(0.8, step=step, steps=100) for step in reversed(range(102))] == values[::-1]


def test_a_threshold_rises_linearly():
    threshold = Threshold(2.0, start=0.25, end=0.75)
    values = [threshold.threshold(step=step, steps=100) for step in (0, 25, 50, 75, 100, 120)]
    assert values == pytest.approx([0, 0, 1, 2, 2, 2])
    assert Threshold(2.0).threshold(step=0, steps=100) == 2
    assert Threshold(2.0, start=0.5, end=0.5).threshold(step=49, steps=100) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Iterative(0), "rounds must be at least 1, got 0"),
        (lambda: Iterative(2.5), r"Iterative: rounds must be an integer, got 2\.5"),
        (lambda: Cubic(every=1.5), r"Cubic: every must be an integer, got 1\.5"),
        (lambda: Iterative(2, spacing="log"), "spacing must be one of linear, geometric, got 'log'"),
        (lambda: Cubic(0.5, 0.5), "0 <= start < end <= 1, got 0.5 and 0.5"),
        (lambda: Cubic(-0.1), "got -0.1 and 1.0"),
        (lambda: Cubic(0, 1.1), "got 0 and 1.1"),
        (lambda: Cubic(every=0), "every is a number of steps, at least 1, got 0"),
        (lambda: Cubic(initial=2), "initial must be between 0 and 1, got 2"),
        (lambda: Cubic(initial=0.5).amount(0.4, step=0, steps=2), "the amount 0.4 is below initial, 0.5"),
        (
            lambda: PruneWeights(amount=0.3, schedule=Cubic(initial=0.5), finetune_epochs=2),
            "amount 0.3 is below",
        ),
        (
            lambda: PruneUnits(unit="head", amount={"a": 0.9, "b": 0.3}, schedule=Cubic(initial=0.5)),
            "the amount 0.3 is below initial, 0.5",
        ),
        (lambda: PruneUnits(unit="channel", amount=0.5, round_to=2.5), "PruneUnits: round_to must be an integer"),
        (lambda: PruneWeights(amount=0.5, finetune_epochs=1.5), "PruneWeights: finetune_epochs must be an integer"),
        (lambda: Threshold(-1), "value must not be negative, got -1"),
        (lambda: Threshold(1, start=0.5, end=0.2), "Threshold: start and end are shares"),
        (lambda: Threshold(1, start=2, end=2), "got 2 and 2"),
    ],
)
def test_schedules_that_cannot_be_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
