"""Learning rates that others find or plan: Lightning's LearningRateFinder, and PyTorch's cycles."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import FixedDiscriminator, KDModule, MEALV2Module, SupervisedModule
from distill_lightning.errors import InputError
from distill_lightning.schedules import GroupSchedules, InverseSquareRoot, OneCycle
from distill_lightning.testing import TinyNet, tiny_trainer

CLASSES = 3
INPUTS = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LOADER = DataLoader(TensorDataset(INPUTS, torch.arange(48) % CLASSES), batch_size=4)
STEPS = 24


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class Rates(pl.Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def rates_of(module, *callbacks):
    rates = Rates()
    tiny_trainer(max_epochs=2, callbacks=[*callbacks, rates]).fit(module, LOADER, LOADER)
    return rates.rates


def naive_rates(schedule, rate=0.1):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=rate, momentum=0.9)
    made, rates = schedule(optimizer), []
    for _ in range(STEPS):
        rates.append([optimizer.param_groups[0]["lr"]])
        optimizer.step()
        made.step()
    return rates


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: OneCycleLR(optimizer, max_lr=0.2, total_steps=STEPS),
        lambda optimizer: OneCycleLR(optimizer, max_lr=0.2, total_steps=2 * STEPS),
        lambda optimizer: CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, step_size_up=3),
        lambda optimizer: InverseSquareRoot(optimizer, warmup_steps=5),
    ],
)
def test_schedules_over_the_steps_are_stepped_after_every_batch(schedule):
    module = SupervisedModule(TinyNet(), num_classes=CLASSES, optimizer=sgd, lr_scheduler=schedule)
    assert rates_of(module) == naive_rates(schedule)


def test_a_cycle_that_is_too_short_is_refused_before_the_first_step():
    module = SupervisedModule(
        TinyNet(),
        num_classes=CLASSES,
        optimizer=sgd,
        lr_scheduler=lambda optimizer: OneCycleLR(optimizer, max_lr=0.2, total_steps=STEPS - 1),
    )
    with pytest.raises(InputError, match=r"OneCycleLR has 23 steps, and the training has 24: .* OneCycle"):
        rates_of(module)


def test_cycles_and_schedules_over_epochs_are_not_mixed():
    groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    factories = [lambda group: OneCycleLR(group, max_lr=0.2, total_steps=4), lambda group: StepLR(group, step_size=1)]
    with pytest.raises(InputError, match="OneCycleLR and StepLR cannot be stepped together, OneCycleLR after every"):
        GroupSchedules(torch.optim.SGD(groups, lr=0.1), factories)


METHODS = {
    "supervised": lambda **options: SupervisedModule(TinyNet(), num_classes=CLASSES, **options),
    "kd": lambda **options: KDModule(TinyNet(), TinyNet(), num_classes=CLASSES, **options),
    "meal_v2": lambda **options: MEALV2Module(
        TinyNet(), TinyNet(), num_classes=CLASSES, discriminator=FixedDiscriminator(lr=0.03), **options
    ),
}


@pytest.mark.filterwarnings("ignore:.*weights_only.*")
@pytest.mark.parametrize("build", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("schedule", [None, OneCycle])
def test_a_found_rate_is_trained_with(build, schedule, tmp_path):
    torch.manual_seed(0)
    module = build(optimizer=sgd, lr_scheduler=schedule)
    finder = pl.callbacks.LearningRateFinder(num_training_steps=20, update_attr=True)
    before = {name: value.clone() for name, value in module.student.state_dict().items()}
    rates = rates_of(module, finder)
    found = finder.optimal_lr.suggestion()
    assert module.lr == found != 0.1
    assert len(rates) == STEPS
    expected = [found] * STEPS
    if schedule is not None:
        expected = [rate for (rate,) in naive_rates(lambda optimizer: OneCycle(optimizer, total_steps=STEPS), found)]
    assert [rate[0] for rate in rates] == pytest.approx(expected)
    # The discriminator's own stays.
    assert all(rate == 0.03 for _, *others in rates for rate in others)
    assert any(not torch.equal(before[name], value) for name, value in module.student.state_dict().items())


def test_a_given_rate_is_that_of_the_optimizer():
    module = SupervisedModule(TinyNet(), num_classes=CLASSES, optimizer=sgd)
    module.lr = 0.02
    assert rates_of(module) == [[0.02]] * STEPS
