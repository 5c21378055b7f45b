"""OneCycle against PyTorch's OneCycleLR."""

import math

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from distill_lightning import InputError, OneCycle


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
