"""Factor Transfer's first stage: one autoencoder for each teacher's feature map."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MetricCollection
from torchmetrics.regression import WeightedMeanAbsolutePercentageError

from distill_lightning.data.batch import Batch
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide
from distill_lightning.layers import FeatureTap, InputShape, Paraphraser, wake
from distill_lightning.layers.feature_tap import Channels
from distill_lightning.lightning_internals import convert_early, summarise_frozen
from distill_lightning.modules.options import LRSchedulerCallable, OptimizerCallable, default_optimizer
from distill_lightning.modules.parts.checkpoints import (
    RemembersArguments,
    check_format,
    hyperparameters,
    note_format,
)
from distill_lightning.modules.parts.distances import FactorDistance
from distill_lightning.modules.parts.evaluation import metrics_of
from distill_lightning.modules.parts.guard import check_loss
from distill_lightning.modules.parts.holds_frozen import HoldsFrozen
from distill_lightning.modules.parts.means import weight_of
from distill_lightning.modules.parts.optimization import plan_anew, with_schedule
from distill_lightning.networks import likely_input_shape
from distill_lightning.teachers import Frozen, TeacherEnsemble
from distill_lightning.teachers.layer_errors import explained

# The mean absolute error of features as they are.
_ERROR = FactorDistance(normalize="none")


class ParaphraserModule(RemembersArguments, HoldsFrozen):
    r"""Trains the `Paraphraser` of each teacher, which `FEEDModule` then takes as Factor Transfer does.

    .. math:: L = \sum_{m=1}^{M} \frac{1}{N D_m} \sum_{i,d} \left| G_m(E_m(F_m))_{id} - F_{m,id} \right|

    with teacher ``m``'s feature map ``F_m`` ``(N, C_m, H, W)``, its encoder ``E_m`` and its decoder ``G_m``. The
    paraphrasers share nothing, so each learns as it would alone. No label is looked at; the teachers are frozen and
    stand in no checkpoint.

    Logged: ``train/loss``, ``train/reconstruction_<m>``, ``val/loss`` (the sum), ``val/reconstruction_<m>`` (the mean
    absolute error) and ``val/relative_<m>`` (the error's L1 norm divided by the feature's, both over all validation
    images: 0 is perfect, zeros would have 1).

    ::

        stage = ParaphraserModule(teachers, layers="stage3")
        Trainer(max_epochs=5).fit(stage, datamodule)
        module = FEEDModule(student, teachers, paraphrasers=stage.paraphrasers, student_layer="stage3", ...)

    Kim, Park, Kwak: *Paraphrasing Complex Network: Network Compression via Factor Transfer*,
    https://arxiv.org/abs/1802.04977

    Args:
        teachers: a network, several, or a `TeacherEnsemble`.
        layers: dotted path (or glob) of the teachers' feature map, the layer that `FEEDModule` will tap: one for all,
            or one each.
        channels: where these layers have their channels, ``"first"`` or ``"last"``: one for all, or one each; ``None``:
            as the networks' own operations tell, see `layers.FeatureTap`.
        rate: factor channels per channel.
        batch_norm: BatchNorm in the paraphrasers.
        input_shape: shape of one input, see `TrainingOptions`; ``None``: the first convolution's channels at 32x32. One
            forward of zeros through every teacher finds the channel counts.
        optimizer: makes the optimiser from the paraphrasers' parameters. The default, Factor Transfer's, is made for
            thousands of steps; where there are few hundred, ``Adam`` with rate 0.001 gets further.
        lr_scheduler: makes the schedule from the optimiser. It is stepped after every epoch, `OneCycle` after every
            batch; `ReduceLROnPlateau` watches ``val/loss``.

    Raises:
        InputError: a layer that does not exist or does not give one feature map, a number of layers that does not fit,
            or a ``rate`` that leaves no channel.
    """

    def __init__(
        self,
        teachers: nn.Module | Sequence[nn.Module],
        *,
        layers: str | Sequence[str],
        channels: Channels | Sequence[Channels | None] | None = None,
        rate: float = 0.5,
        batch_norm: bool = False,
        input_shape: InputShape | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(hyperparameters(type(self), self.given_arguments()))
        self.teachers = Frozen([TeacherEnsemble.of(teachers)])
        ensemble: TeacherEnsemble = self.teachers[0]
        paths = [layers] * len(ensemble) if isinstance(layers, str) else list(layers)
        if len(paths) != len(ensemble):
            raise InputError(f"{len(paths)} layers for {len(ensemble)} teachers: give one for all, or one each")
        self.taps = ensemble.tapped(paths, channels)
        self.paraphrasers = nn.ModuleList(
            Paraphraser(_channels(number, tap, input_shape), rate=rate, batch_norm=batch_norm)
            for number, tap in enumerate(self.taps)
        )
        errors = MetricCollection(
            {"reconstruction": MeanAbsoluteError(), "relative": WeightedMeanAbsolutePercentageError()}
        )
        self.val_metrics = nn.ModuleList(
            errors.clone(prefix="val/", postfix=f"_{number}") for number in range(len(self.taps))
        )
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """The reconstruction ``(N, C_m, H, W)`` of each teacher's feature map."""
        return [reconstruction for reconstruction, _ in self._pairs(inputs)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean absolute error, summed over the teachers."""
        batch = Batch.of(batch)
        pairs = explained(self, self._pairs, batch.input, f"training batch {batch_idx}")
        errors = [_ERROR.over_counted(*pair, batch.counted) for pair in pairs]
        loss = torch.stack(errors).sum()
        logs = {"loss": loss, **{f"reconstruction_{number}": error for number, error in enumerate(errors)}}
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in logs.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=weight_of(batch.count, loss),
        )
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop on a loss that is not finite."""
        check_loss(self, outputs["loss"], Batch.of(batch), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the errors under ``val/``."""
        batch = Batch.of(batch)
        pairs = explained(self, self._pairs, batch.input, f"validation batch {batch_idx}")
        for errors, (reconstruction, feature) in zip(
            metrics_of(self, "val_metrics", dataloader_idx), pairs, strict=True
        ):
            chosen = slice(None) if batch.counted is None else batch.counted
            errors.update(wide(reconstruction[chosen]), wide(feature[chosen]))
            self.log_dict(errors, on_step=False, on_epoch=True, batch_size=batch.size)
        loss = torch.stack([_ERROR.over_counted(*pair, batch.counted) for pair in pairs]).sum()
        self.log(
            "val/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight_of(batch.count, loss)
        )

    def configure_optimizers(self) -> Any:
        """The optimiser over the paraphrasers and, if there is one, its schedule."""
        optimizer = self.optimizer(self.paraphrasers.parameters())
        return with_schedule(self, optimizer, self.lr_scheduler, monitor="val/loss")

    def on_fit_start(self) -> None:
        """A module that enters ``fit`` in eval mode would train in it."""
        self.teachers.fit_starts(self)
        wake(self)
        super().on_fit_start()
        summarise_frozen(self, self.extra_repr().splitlines())

    def on_train_start(self) -> None:
        """Plan the learning rates of a resumed training."""
        super().on_train_start()
        plan_anew(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note whose features these are."""
        super().on_save_checkpoint(checkpoint)
        note_format(checkpoint)
        checkpoint["hyper_parameters"] = dict(checkpoint.get("hyper_parameters", {}))
        checkpoint["fingerprints"] = self.teachers.fingerprints("teachers")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Warn of other teachers.

        Raises:
            InputError: the checkpoint is of another version of this package.
        """
        check_format(checkpoint, "the checkpoint")
        convert_early(self, self.teachers.networks)
        if checkpoint["fingerprints"] != self.teachers.fingerprints("teachers"):
            warnings.warn(
                "teachers: the weights are not those that these paraphrasers were trained with: train them anew",
                stacklevel=2,
            )

    def _pairs(self, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each teacher's reconstructed and real feature map."""
        features = [
            features[tap.layers[0]]
            for tap, (_, features) in zip(self.taps, self.teachers[0].each(inputs, self.taps), strict=True)
        ]
        return [
            (paraphraser(feature), feature) for paraphraser, feature in zip(self.paraphrasers, features, strict=True)
        ]


def _channels(number: int, tap: FeatureTap, input_shape: InputShape | None) -> int:
    _, features = tap.shapes(input_shape or likely_input_shape(tap.network))
    shape = features[tap.layers[0]]
    if len(shape) != 4:
        raise InputError(
            f"teacher {number}'s {tap.layers[0]!r} gives shape {tuple(shape)}, not (N, C, H, W): tap a convolutional "
            "layer"
        )
    return shape[1]
