"""What ``configure_optimizers`` returns, and what is seen of it before a training."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from distill_lightning import GeneratorModule, InputError, OneCycle, ParaphraserModule, SupervisedModule
from distill_lightning.modules.parts.optimization import check_optimizer, compile_networks, with_schedule
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


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
        (ReduceLROnPlateau, {"interval": "epoch", "monitor": "val/nll", "frequency": 1}),
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


class TwoLoaders(TinyDataModule):
    """The second one's labels are other than the first one's."""

    def val_dataloader(self):
        first, second = super().val_dataloader(), super().val_dataloader()
        other = [batch.replace(target=(batch.target + 1) % 3) for batch in second]
        return [first, torch.utils.data.DataLoader(other, batch_size=None)]


plateau = partial(ReduceLROnPlateau, patience=0, factor=0.5, threshold=0.0)
MODULES = {
    "student": lambda: module_of(optimizer=partial(SGD, lr=0.5), lr_scheduler=plateau),
    "paraphraser": lambda: ParaphraserModule(
        TinyNet(), layers="features", input_shape=(1, 8, 8), optimizer=partial(SGD, lr=0.5), lr_scheduler=plateau
    ),
    "generator": lambda: GeneratorModule(
        input_shape=(1, 8, 8), output_range=(-2.0, 3.0), width=2, optimizer=partial(SGD, lr=1e-4), lr_scheduler=plateau
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("options", [{}, {"num_sanity_val_steps": 0}], ids=["checked", "unchecked"])
def test_of_several_validation_loaders_the_first_is_watched(kind, options):
    seen, name = [], "val/nll" if kind == "student" else "val/loss"

    class Look(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append(float(trainer.callback_metrics[f"{name}/dataloader_idx_0"]))

    module = MODULES[kind]()
    trainer = tiny_trainer(max_epochs=4, callbacks=[Look()], **options)
    trainer.fit(module, datamodule=TwoLoaders())
    # By hand: a value that is no better than the best so far halves the rate.
    rate, best = (1e-4 if kind == "generator" else 0.5), float("inf")
    for value in seen:
        rate, best = (rate, value) if value < best else (rate / 2, best)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)
    assert float(trainer.lr_scheduler_configs[0].scheduler.best) == pytest.approx(min(seen))
    assert len(seen) == 4
