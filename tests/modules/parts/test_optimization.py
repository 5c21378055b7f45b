"""What ``configure_optimizers`` returns, and what is seen of it before a training."""

from functools import partial

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from distill_lightning import InputError, OneCycle, SupervisedModule
from distill_lightning.modules.parts.optimization import check_optimizer, compile_networks, with_schedule
from distill_lightning.testing import TinyNet


def module_of(**options):
    return SupervisedModule(TinyNet(), num_classes=3, **options)


def test_without_a_schedule_there_is_the_optimiser_alone():
    module = module_of()
    optimizer = SGD(module.parameters(), lr=0.1)
    assert with_schedule(module, optimizer, None, monitor="val/nll") is optimizer


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (partial(StepLR, step_size=1), {"interval": "epoch"}),
        (ReduceLROnPlateau, {"interval": "epoch", "monitor": "val/nll"}),
        (partial(OneCycle, total_steps=7), {"interval": "step"}),
    ],
)
def test_a_schedule_is_stepped_at_its_own_pace(schedule, expected):
    module = module_of()
    optimizer = SGD(module.parameters(), lr=0.1)
    found = with_schedule(module, optimizer, schedule, monitor="val/nll")
    config = found["lr_scheduler"]
    assert found["optimizer"] is optimizer
    assert {name: value for name, value in config.items() if name != "scheduler"} == expected
    assert config["scheduler"].optimizer is optimizer


def test_optimiser_and_schedule_are_tried_before_a_training():
    assert check_optimizer(module_of()) is None
    assert isinstance(check_optimizer(module_of(lr_scheduler=partial(StepLR, step_size=1))), StepLR)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": partial(SGD, lr=-1.0)}, "optimizer: .*Invalid learning rate"),
        ({"lr_scheduler": partial(StepLR, steps=1)}, "lr_scheduler: .*steps"),
    ],
)
def test_what_they_refuse_is_named(options, message):
    with pytest.raises(InputError, match=message):
        check_optimizer(module_of(**options))


def test_what_is_compiled_is_not_compiled_again(monkeypatch):
    compiled = []

    def compile_in_place(network):
        compiled.append(network)
        network._compiled_call_impl = network.forward

    monkeypatch.setattr(torch.nn.Module, "compile", compile_in_place)
    module = module_of()
    compile_networks(module)
    compile_networks(module)
    assert compiled == [module.student]
