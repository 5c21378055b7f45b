"""The past's share, as it grows with a training, and what keeps it from its end."""

import pytest
import pytorch_lightning as pl
import torch

from distill_lightning import InputError, PastModel, SelfKDModule
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


def module_of(norm="group", **options):
    return SelfKDModule(TinyNet(norm=norm), num_classes=3, past=PastModel(), **options)


def fitted(module, **options):
    trainer = tiny_trainer(**options)
    trainer.fit(module, datamodule=TinyDataModule())
    return trainer


class Logged(pl.Callback):
    """What is logged of every training epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(float(trainer.callback_metrics["train/alpha"]))


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "alpha"), [(1, 0.8), (3, 0.8), (7, 0.3), (12, 1.0)])
def test_alpha_grows_by_equal_steps_to_exactly_alpha_t(epochs, alpha):
    logged = Logged()
    fitted(module_of(alpha_T=alpha), max_epochs=epochs, callbacks=[logged], limit_train_batches=1)
    seen = logged.epochs
    assert seen == pytest.approx([alpha * (epoch + 1) / epochs for epoch in range(epochs)], rel=1e-6)
    assert seen[-1] == float(torch.tensor(alpha))
    assert seen == sorted(seen)


class Alphas(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(pl_module.alpha.at(trainer))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulate", "expected"),
    [(1, [step / 6 for step in (1, 2, 3, 4, 5, 6)]), (2, [step / 4 for step in (1, 1, 2, 3, 3, 4)])],
)
def test_alpha_by_step_follows_the_optimiser(accumulate, expected):
    alphas = Alphas()
    module = module_of(alpha_unit="step", alpha_T=0.7)
    fitted(module, max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[alphas])
    assert alphas.seen == pytest.approx([0.7 * share for share in expected])
    assert alphas.seen[-1] == 0.7


@pytest.mark.slow
def test_alpha_by_a_function_by_a_constant_and_beyond_its_end():
    def after_warm_up(progress):
        return max(0.0, 2 * progress - 1)

    for options, expected in (
        ({"alpha_schedule": after_warm_up}, [0, 0, 0.4, 0.8]),
        ({"alpha_schedule": "constant"}, [0.8] * 4),
        ({"total_epochs": 2}, [0.4, 0.8, 0.8, 0.8]),
        ({"total_epochs": 2, "alpha_unit": "step"}, [0.4, 0.8, 0.8, 0.8]),
    ):
        alphas = Alphas()
        fitted(module_of(**options), max_epochs=4, callbacks=[alphas], limit_train_batches=1)
        assert alphas.seen == pytest.approx(expected), options


def test_a_function_that_leaves_the_range_is_refused():
    with pytest.raises(InputError, match=r"alpha_schedule\(0.5\) times alpha_T is 1.5: let it stay in \[0, 1\]"):
        fitted(module_of(alpha_T=1.0, alpha_schedule=lambda progress: 3 * progress), max_epochs=2)


@pytest.mark.slow
def test_a_training_of_unknown_length_is_refused_unless_alpha_is_constant():
    with pytest.raises(InputError, match=r"length is not known: give total_epochs or Trainer\(max_epochs\)"):
        fitted(module_of(), max_epochs=-1, max_steps=4)
    assert fitted(module_of(alpha_schedule="constant"), max_epochs=-1, max_steps=4).global_step == 4
    with pytest.warns(UserWarning, match="max_steps=4"):
        fitted(module_of(total_epochs=2), max_epochs=-1, max_steps=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "trainer", "reason"),
    [
        ({"total_epochs": 3}, {"max_epochs": 2}, "max_epochs=2"),
        ({}, {"max_epochs": 3, "max_steps": 8}, "max_steps=8"),
        ({"alpha_unit": "step"}, {"max_epochs": 3, "max_steps": 8}, "max_steps=8"),
        # Three batches make two steps.
        ({}, {"max_epochs": 2, "max_steps": 3, "accumulate_grad_batches": 2}, "max_steps=3"),
        ({}, {"callbacks": [pl.callbacks.EarlyStopping("val/nll")], "max_epochs": 2}, "EarlyStopping"),
        ({}, {"max_time": "00:01:00:00", "max_epochs": 2}, "a time limit"),
        ({"total_epochs": 4}, {"max_epochs": 2, "max_steps": 4}, "max_epochs=2 and max_steps=4"),
    ],
)
def test_what_keeps_alpha_from_its_end_is_warned_about_once(options, trainer, reason):
    module = module_of(**options)
    with pytest.warns(UserWarning, match=f"alpha_T=0.8 in epoch .* because of {reason}: set total_epochs") as caught:
        fitted(module, **trainer)
    assert len([line for line in caught if "alpha reaches" in str(line.message)]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "trainer"),
    [
        ({}, {"max_epochs": 2, "max_steps": 6}),
        ({}, {"max_epochs": 2, "max_steps": 4, "accumulate_grad_batches": 2}),
        ({"total_epochs": 1}, {"max_epochs": 2}),
        ({"alpha_schedule": "constant"}, {"max_epochs": 2, "max_steps": 1}),
        ({}, {"max_epochs": 2, "callbacks": [pl.callbacks.Timer()]}),
    ],
)
def test_a_training_that_comes_to_its_end_is_not_warned_about(options, trainer):
    fitted(module_of(**options), **trainer)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_epoch_that_stochastic_averaging_adds_is_not_planned_for(unit, norm, recwarn):
    """With BatchNorm it is a fifth epoch, which trains nothing."""
    alphas, trained = Alphas(), []

    class Trained(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            trained.append(pl_module.alpha.at(trainer))

    module = module_of(norm, alpha_unit=unit)
    averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    fitted(module, max_epochs=4, callbacks=[averaging, alphas, Trained()])
    progress = [(step + 1) / 12 if unit == "step" else (step // 3 + 1) / 4 for step in range(12)]
    assert trained == pytest.approx([0.8 * part for part in progress])
    assert trained[-1] == 0.8
    assert len(alphas.seen) == (15 if norm == "batch" else 12)
    assert set(alphas.seen[12:]) <= {0.8}
    assert not [line for line in recwarn if "alpha" in str(line.message)]


@pytest.mark.slow
def test_under_stochastic_averaging_a_training_that_ends_early_is_warned_about():
    averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    with pytest.warns(UserWarning, match="may end earlier because of max_epochs=3: set total_epochs"):
        fitted(module_of("batch", total_epochs=4), max_epochs=3, callbacks=[averaging])
