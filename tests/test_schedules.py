"""OneCycle against PyTorch's OneCycleLR; several schedules on one optimiser against each on its own."""

import math
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from distill_lightning import GroupSchedules, InputError, InverseSquareRoot, OneCycle, SupervisedModule
from distill_lightning.testing import TinyNet, tiny_trainer


def optimizer_with(*peaks):
    return SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": peak} for peak in peaks], lr=1.0)


def rates_of(schedule, steps):
    """The groups' rates before each of these steps, and after the last."""
    rates = [[group["lr"] for group in schedule.optimizer.param_groups]]
    for _ in range(steps):
        schedule.optimizer.step()
        schedule.step()
        rates.append([group["lr"] for group in schedule.optimizer.param_groups])
    return rates


@pytest.mark.slow
@pytest.mark.parametrize("total", [2, 3, 10, 97])
@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.5, 0.99])
@pytest.mark.parametrize(("start", "end"), [(0.04, 1e-4), (0.5, 0.01), (1.0, 1.0)])
def test_a_full_run_is_that_of_pytorch(total, warmup, start, end):
    ours = OneCycle(optimizer_with(0.1, 2.0), warmup=warmup, start=start, end=end, total_steps=total)
    theirs = OneCycleLR(
        optimizer_with(0.1, 2.0),
        max_lr=[0.1, 2.0],
        total_steps=total,
        # PyTorch's peak is at step pct_start * total - 1, ours at warmup * (total - 1).
        pct_start=(warmup * (total - 1) + 1) / total,
        anneal_strategy="cos",
        cycle_momentum=False,
        div_factor=1 / start,
        final_div_factor=start / end,
    )
    for our, their in zip(rates_of(ours, total - 1), rates_of(theirs, total - 1), strict=True):
        assert our == pytest.approx(their, rel=1e-9)


@pytest.mark.parametrize("total", [2, 11, 50])
def test_the_rates_are_the_formula(total):
    schedule = OneCycle(optimizer_with(3.0), warmup=0.25, start=0.1, end=0.02, total_steps=total)
    for step, (rate,) in enumerate(rates_of(schedule, total - 1)):
        share = step / (total - 1)
        if share < 0.25:
            factor = 0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi * share / 0.25))
        else:
            factor = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (share - 0.25) / 0.75))
        assert rate == pytest.approx(3.0 * factor, rel=1e-12)


def test_the_cycle_begins_peaks_and_ends_where_documented():
    rates = [rate for (rate,) in rates_of(OneCycle(optimizer_with(0.5), total_steps=101), 100)]
    assert rates[0] == pytest.approx(0.5 * 0.04)
    assert rates[30] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.5 * 1e-4)
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)


def test_without_warmup_the_cycle_begins_at_the_peak_and_falls():
    rates = [rate for (rate,) in rates_of(OneCycle(optimizer_with(0.5), warmup=0, end=0.01, total_steps=9), 8)]
    assert rates[0] == pytest.approx(0.5)
    assert rates[4] == pytest.approx(0.5 * (1 + 0.01) / 2)
    assert rates[8] == pytest.approx(0.5 * 0.01)


def test_a_warmup_of_the_whole_training_rises_to_the_peak():
    rates = [rate for (rate,) in rates_of(OneCycle(optimizer_with(0.5), warmup=1, total_steps=9), 8)]
    assert rates == sorted(rates)
    assert rates[8] == pytest.approx(0.5)


def test_steps_after_the_last_keep_the_last_rate():
    rates = rates_of(OneCycle(optimizer_with(0.5), end=0.01, total_steps=5), 8)
    assert [rate for (rate,) in rates[4:]] == pytest.approx([0.5 * 0.01] * 5)


def test_a_training_of_one_step_has_a_finite_rate():
    schedule = OneCycle(optimizer_with(0.5), total_steps=1)
    assert rates_of(schedule, 1)[0] == pytest.approx([0.5 * 0.04])


@pytest.mark.parametrize("warmup", [1, 4, 30])
def test_the_inverse_square_root_is_that_of_the_first_transformers(warmup):
    width = 512
    schedule = InverseSquareRoot(optimizer_with(width**-0.5 * warmup**-0.5, 2.0), warmup_steps=warmup)
    for step, (first, second) in enumerate(rates_of(schedule, 20), start=1):
        assert first == pytest.approx(width**-0.5 * min(step**-0.5, step * warmup**-1.5), rel=1e-12)
        assert second == pytest.approx(first * 2.0 / (width**-0.5 * warmup**-0.5), rel=1e-12)
    restored = InverseSquareRoot(optimizer_with(width**-0.5 * warmup**-0.5, 2.0))
    restored.load_state_dict(schedule.state_dict())
    assert rates_of(restored, 3)[1:] == rates_of(schedule, 3)[1:]


def test_a_rise_of_no_steps_is_refused():
    with pytest.raises(InputError, match="InverseSquareRoot: warmup_steps must be at least 1, got 0"):
        InverseSquareRoot(optimizer_with(1.0), warmup_steps=0)


@pytest.mark.parametrize("warmup", [0, 0.3, 1])
def test_the_factor_at_half_the_rise_and_half_the_fall_is_the_mean_of_its_ends(warmup):
    schedule = OneCycle(optimizer_with(1.0), warmup=warmup, start=0.2, end=0.1)
    if warmup > 0:
        assert schedule.factor(warmup / 2) == pytest.approx(0.6)
    if warmup < 1:
        assert schedule.factor((1 + warmup) / 2) == pytest.approx(0.55)


@pytest.mark.parametrize("done", [1, 4, 12])
def test_a_restored_state_goes_on_as_the_uninterrupted_run(done):
    whole = rates_of(OneCycle(optimizer_with(0.1, 2.0), warmup=0.4, start=0.3, end=0.2, total_steps=20), 19)
    first = OneCycle(optimizer_with(0.1, 2.0), warmup=0.4, start=0.3, end=0.2, total_steps=20)
    rates_of(first, done)
    second = OneCycle(optimizer_with(0.1, 2.0))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert rates_of(second, 19 - done) == whole[done:]


def test_the_state_is_plain_numbers_that_a_weights_only_load_reads(tmp_path):
    schedule = OneCycle(optimizer_with(0.1), total_steps=20)
    torch.save(schedule.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == schedule.state_dict()


def test_the_number_of_steps_may_be_set_after_construction():
    late = OneCycle(optimizer_with(0.1))
    late.total_steps = 10
    assert rates_of(late, 9) == rates_of(OneCycle(optimizer_with(0.1), total_steps=10), 9)


def test_stepping_before_the_number_of_steps_is_known_is_refused():
    schedule = OneCycle(optimizer_with(0.1))
    schedule.optimizer.step()
    with pytest.raises(InputError, match="total_steps is not set"):
        schedule.step()


@pytest.mark.parametrize("warmup", [-0.1, 1.1, 30, math.nan])
def test_a_warmup_that_is_no_share_is_refused(warmup):
    with pytest.raises(InputError, match="between 0 and 1, got"):
        OneCycle(optimizer_with(0.1), warmup=warmup, total_steps=10)


# GroupSchedules


def warmed_up(optimizer):
    return SequentialLR(
        optimizer,
        [LinearLR(optimizer, start_factor=0.1, total_iters=3), ExponentialLR(optimizer, gamma=0.7)],
        milestones=[3],
    )


EPOCH_WISE = {
    "steps": partial(MultiStepLR, milestones=[2, 5], gamma=0.1),
    "cosine": partial(CosineAnnealingLR, T_max=7),
    "lambda": partial(LambdaLR, lr_lambda=lambda epoch: 1 / (1 + epoch)),
    "warmup": warmed_up,
    "constant": None,
}


def alone(factory, peak, steps):
    """The rates of one schedule on an optimiser of its own."""
    optimizer = optimizer_with(peak)
    if factory is None:
        return [peak] * (steps + 1)
    return [rate for (rate,) in rates_of(factory(optimizer), steps)]


@pytest.mark.parametrize("first", EPOCH_WISE)
@pytest.mark.parametrize("second", EPOCH_WISE)
def test_every_group_has_the_rates_that_its_schedule_gives_alone(first, second):
    factories = [EPOCH_WISE[first], EPOCH_WISE[second]]
    rates = rates_of(GroupSchedules(optimizer_with(0.1, 2.0), factories), 9)
    for number, (factory, peak) in enumerate(zip(factories, (0.1, 2.0), strict=True)):
        assert [each[number] for each in rates] == pytest.approx(alone(factory, peak, 9), rel=1e-12)


def test_two_one_cycles_have_their_own_shapes():
    factories = [partial(OneCycle, warmup=0.2, total_steps=10), partial(OneCycle, warmup=0.6, total_steps=10)]
    rates = rates_of(GroupSchedules(optimizer_with(0.1, 2.0), factories), 9)
    assert [first for first, _ in rates] == pytest.approx(alone(factories[0], 0.1, 9))
    assert [second for _, second in rates] == pytest.approx(alone(factories[1], 2.0, 9))


def test_pytorchs_one_cycle_moves_its_own_groups_momentum_alone():
    optimizer = SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=0.1, momentum=0.7)
    schedule = GroupSchedules(optimizer, [partial(OneCycleLR, max_lr=0.1, total_steps=10), None])
    assert rates_of(schedule, 3)[-1][1] == 0.1
    assert optimizer.param_groups[0]["momentum"] != 0.7
    assert optimizer.param_groups[1]["momentum"] == 0.7


def test_the_optimiser_of_the_schedules_is_the_real_one_and_the_last_rates_are_its_groups():
    optimizer = optimizer_with(0.1, 2.0)
    schedule = GroupSchedules(optimizer, [EPOCH_WISE["steps"], None])
    assert schedule.optimizer is optimizer
    assert isinstance(schedule, LRScheduler)
    assert schedule.get_last_lr() == [0.1, 2.0]
    rates_of(schedule, 2)
    assert schedule.get_last_lr() == pytest.approx([0.01, 2.0])
    assert schedule.last_epoch == 2


def test_a_rate_that_someone_else_sets_stays_where_the_schedule_is_none():
    optimizer = optimizer_with(0.1, 2.0)
    schedule = GroupSchedules(optimizer, [EPOCH_WISE["steps"], None])
    optimizer.param_groups[1]["lr"] = 0.3
    assert rates_of(schedule, 3)[-1] == pytest.approx([0.01, 0.3])


def test_plateau_sees_the_metric_and_the_other_group_does_not():
    factories = [partial(ReduceLROnPlateau, patience=0, factor=0.5), EPOCH_WISE["steps"]]
    optimizer = optimizer_with(0.1, 2.0)
    schedule = GroupSchedules(optimizer, factories)
    found = []
    for metric in (1.0, 2.0, 0.5, 0.6):
        optimizer.step()
        schedule.step(metric)
        found.append([group["lr"] for group in optimizer.param_groups])
    assert [first for first, _ in found] == pytest.approx([0.1, 0.05, 0.05, 0.025])
    assert [second for _, second in found] == pytest.approx([2.0, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("done", [1, 3, 6])
def test_restored_group_schedules_go_on_as_the_uninterrupted_run(done, tmp_path):
    factories = [EPOCH_WISE["steps"], EPOCH_WISE["cosine"], None]

    def fresh():
        parameters = [torch.ones(2, requires_grad=True) for _ in range(3)]
        optimizer = Adam([{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.1, 2.0, 0.4), strict=True)])
        return GroupSchedules(optimizer, factories)

    whole = rates_of(fresh(), 9)
    first = fresh()
    rates_of(first, done)
    torch.save({"optimizer": first.optimizer.state_dict(), "schedule": first.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = fresh()
    # Lightning's order; loading gives the optimiser new groups, which the schedules must find.
    second.optimizer.load_state_dict(state["optimizer"])
    second.load_state_dict(state["schedule"])
    assert rates_of(second, 9 - done) == whole[done:]
    assert second.last_epoch == 9


def test_a_state_of_other_groups_is_refused():
    state = GroupSchedules(optimizer_with(0.1, 2.0), [EPOCH_WISE["steps"], None]).state_dict()
    other = GroupSchedules(optimizer_with(0.1, 2.0), [EPOCH_WISE["steps"], EPOCH_WISE["cosine"]])
    with pytest.raises(InputError, match="belongs to schedules of other parameter groups"):
        other.load_state_dict(state)


def test_stepping_before_the_optimiser_is_still_warned_about_and_after_it_is_not():
    schedule = GroupSchedules(optimizer_with(0.1), [EPOCH_WISE["steps"]])
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        schedule.step()
    # Warnings are errors here.
    rates_of(GroupSchedules(optimizer_with(0.1), [EPOCH_WISE["steps"]]), 2)


@pytest.mark.parametrize("factories", [[], [None], [None, None, None]])
def test_there_must_be_one_schedule_per_group(factories):
    with pytest.raises(InputError, match=f"{len(factories)} schedules for 2 parameter groups: give one each"):
        GroupSchedules(optimizer_with(0.1, 2.0), factories)


@pytest.mark.parametrize("turned", [False, True])
def test_one_cycle_beside_an_epoch_wise_schedule_is_refused(turned):
    factories = [OneCycle, EPOCH_WISE["steps"]]
    with pytest.raises(InputError, match="cannot be stepped together, OneCycle after every batch"):
        GroupSchedules(optimizer_with(0.1, 2.0), factories[::-1] if turned else factories)
    assert len(GroupSchedules(optimizer_with(0.1, 2.0), [None, OneCycle]).schedules) == 2


# Lengths that are not known, and that change


class Stream(IterableDataset):
    """Images without a length."""

    def __iter__(self):
        for number in range(20):
            yield torch.rand(1, 8, 8), number % 3


class Rates(pl.Callback):
    """The rate of every step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer, *_):
        self.seen.append(optimizer.param_groups[0]["lr"])


def cycle(**options):
    torch.manual_seed(0)
    return SupervisedModule(
        TinyNet(), num_classes=3, optimizer=partial(SGD, lr=0.1), lr_scheduler=partial(OneCycle, **options)
    )


def loader(batch_size=8):
    return DataLoader(TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 3), batch_size=batch_size)


def rates_in(module, data, **options):
    rates = Rates()
    path = options.pop("ckpt_path", None)
    trainer = tiny_trainer(callbacks=[rates, *options.pop("callbacks", [])], limit_val_batches=0, **options)
    trainer.fit(module, data, loader(), ckpt_path=path)
    return rates.seen, trainer


def expected(start, steps, **options):
    """The cycle's rates from a step on."""
    schedule = OneCycle(optimizer_with(0.1), total_steps=steps, **options)
    return [0.1 * schedule.factor(step / (steps - 1)) for step in range(start, steps)]


def test_data_without_a_length_are_refused_unless_the_steps_are_given():
    data = DataLoader(Stream(), batch_size=4)
    with pytest.raises(InputError, match="limit_train_batches where the training data have no length, or OneCycle tot"):
        rates_in(cycle(), data, max_epochs=2)
    assert rates_in(cycle(), data, max_epochs=2, max_steps=8)[0] == pytest.approx(expected(0, 8))
    assert rates_in(cycle(), data, max_epochs=2, limit_train_batches=3)[0] == pytest.approx(expected(0, 6))
    assert rates_in(cycle(total_steps=10), data, max_epochs=2)[0] == pytest.approx(expected(0, 10))


def stopped(tmp_path, epochs=2, **options):
    """A checkpoint of the end of a training."""
    _, trainer = rates_in(cycle(**options), loader(), max_epochs=epochs)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    return tmp_path / "end.ckpt"


@pytest.mark.slow
def test_a_training_that_is_resumed_with_more_epochs_is_planned_anew(tmp_path):
    path = stopped(tmp_path)
    with pytest.warns(UserWarning, match="planned for 10 steps, and this training has 20"):
        seen, _ = rates_in(cycle(), loader(), max_epochs=4, ckpt_path=path)
    assert seen == pytest.approx(expected(10, 20))


@pytest.mark.slow
def test_a_training_that_is_resumed_with_smaller_batches_ends_with_the_cycle(tmp_path):
    path = tmp_path / "middle.ckpt"

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(path)

    rates_in(cycle(), loader(), max_epochs=4, callbacks=[Save()])
    with pytest.warns(UserWarning, match="planned for 20 steps, and this training has 30"):
        seen, _ = rates_in(cycle(), loader(4), max_epochs=4, ckpt_path=path)
    assert seen == pytest.approx(expected(10, 30))


@pytest.mark.lightning(since=(2, 5))
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:the checkpoint was made between two optimiser steps",
)
@pytest.mark.parametrize("after", [3, 7, 10, 12])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_training_that_is_resumed_as_it_was_keeps_its_plan(tmp_path, after, accumulated):
    """No warning of ours, which would be an error here, wherever the checkpoint was made."""
    path = tmp_path / "middle.ckpt"

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch * 5 + batch_idx + 1 == after:
                trainer.save_checkpoint(path)

    options = {"max_epochs": 3, "accumulate_grad_batches": accumulated}
    whole, _ = rates_in(cycle(), loader(), callbacks=[Save()], **options)
    seen, _ = rates_in(cycle(), loader(), ckpt_path=path, **options)
    assert seen == whole[len(whole) - len(seen) :]
    assert whole == pytest.approx(expected(0, len(whole)))


@pytest.mark.slow
def test_a_number_of_steps_that_was_given_is_kept(tmp_path):
    path = stopped(tmp_path, total_steps=40)
    seen, _ = rates_in(cycle(total_steps=40), loader(), max_epochs=4, ckpt_path=path)
    assert seen == pytest.approx(expected(10, 40)[:10])
    seen, _ = rates_in(cycle(total_steps=25), loader(), max_epochs=4, ckpt_path=path)
    # The first step's rate is the checkpoint's.
    assert seen[1:] == pytest.approx(expected(11, 25)[:9])


def test_the_peaks_of_pytorchs_cycle_and_ours_are_where_the_documentation_says():
    total, warmup = 24, 0.25
    ours = OneCycle(optimizer_with(1.0), warmup=warmup, total_steps=total)
    theirs = OneCycleLR(optimizer_with(1.0), max_lr=1.0, total_steps=total, pct_start=warmup, cycle_momentum=False)
    (our,), (their,) = (zip(*rates_of(schedule, total - 1), strict=True) for schedule in (ours, theirs))
    assert their.index(max(their)) == warmup * total - 1 == 5
    assert our.index(max(our)) == round(warmup * (total - 1)) == 6
