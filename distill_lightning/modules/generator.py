"""A generator of inputs, for Extracurricular Learning's samples beyond the training set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from distill_lightning import functional
from distill_lightning.data.batch import Batch
from distill_lightning.data.views import Draws
from distill_lightning.errors import InputError
from distill_lightning.layers import ImageDecoder, ImageEncoder
from distill_lightning.lightning_internals import PortableModule, place_of
from distill_lightning.modules.options import LRSchedulerCallable, OptimizerCallable
from distill_lightning.modules.parts.checkpoints import (
    RemembersArguments,
    check_format,
    hyperparameters,
    note_format,
)
from distill_lightning.modules.parts.guard import check_loss
from distill_lightning.modules.parts.means import weight_of
from distill_lightning.modules.parts.optimization import plan_anew, with_schedule
from distill_lightning.networks.weights import write_weights

# Keeps the codes' random numbers apart from those that crop and flip the images of the same views.
_STREAM = 0x47454E


def _adam(parameters: Iterable[Any]) -> Optimizer:
    return Adam(parameters, lr=1e-3)


class GeneratorModule(RemembersArguments, PortableModule):
    r"""A variational autoencoder of the training inputs; its decoder ``G`` makes new ones from ``z ~ N(0, I)``.

    .. math:: L = \frac{1}{N} \sum_i \left[ \sum_d \tfrac12 \left( s + (x_{id} - G(z_i)_d)^2 e^{-s} + \log 2\pi \right)
        + \mathrm{KL}\big(q(z \mid x_i) \,\|\, \mathcal N(0, I)\big) \right]

    the negative evidence lower bound in nats, with one learnt log-variance ``s`` of the pixels and one draw
    :math:`z_i \sim q(z \mid x_i)` from the encoder's diagonal Gaussian. Labels are not looked at. Train it on the
    training inputs alone, then give ``module.generator`` to `GeneratorSampler`. Logged: ``loss``, ``reconstruction``
    and ``kl`` under ``train/`` and ``val/``.

    The draws depend on the seed and on each sample's index and view, so a resumed run equals an uninterrupted one and
    two processes equal one.

    Kingma, Welling: *Auto-Encoding Variational Bayes*, https://arxiv.org/abs/1312.6114; the learnt variance: Rybkin,
    Daniilidis, Levine: *Simple and Effective VAE Training with Calibrated Decoders*, https://arxiv.org/abs/2006.13202

    Args:
        input_shape: ``(C, H, W)``.
        latent_dim: length of ``z``.
        output_range: smallest and largest value of a pixel, as the data module gives them.
        width: channels of the encoder's first and the decoder's last hidden layer.
        seed: of the draws.
        optimizer: makes the optimiser from the parameters; default: Adam with learning rate 0.001.
        lr_scheduler: makes the schedule from the optimiser. It is stepped after every epoch, `OneCycle` after every
            batch; `ReduceLROnPlateau` watches ``val/loss``.

    Raises:
        InputError: a size or range that cannot be used; in training: images that do not lie in the range.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        latent_dim: int = 16,
        output_range: tuple[float, float],
        width: int = 32,
        seed: int = 0,
        optimizer: OptimizerCallable = _adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(hyperparameters(type(self), self.given_arguments()))
        self.generator = ImageDecoder(input_shape, latent_dim, output_range=output_range, width=width)
        self.encoder = ImageEncoder(input_shape, latent_dim, width=width)
        self.pixel_log_var = nn.Parameter(torch.zeros(()))
        self.seed = seed
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

    def forward(self, codes: Tensor) -> Tensor:
        """Inputs ``(N, C, H, W)`` from codes ``(N, latent_dim)``."""
        images: Tensor = self.generator(codes)
        return images

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        if self.global_step == 0:
            self._check_range(Batch.of(batch).input)
        return self._step(Batch.of(batch), batch_idx, "train")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop on a loss that is not finite."""
        check_loss(self, outputs["loss"], Batch.of(batch), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The loss of a batch, logged under ``val/``."""
        self._step(Batch.of(batch), batch_idx, "val")

    def _step(self, batch: Batch, batch_idx: int, stage: str) -> Tensor:
        images = batch.input
        mean, log_var = functional.split_gaussian(self.encoder(images))
        codes = mean + (log_var / 2).exp() * self._draws(batch, batch_idx).normal(mean.shape[1])
        pixels = self.generator(codes.to(images.dtype)).flatten(1).float()
        errors = functional.gaussian_nll_rows(pixels, self.pixel_log_var.expand_as(pixels), images.flatten(1))
        reconstruction = functional.counted_mean(errors, batch.counted)
        prior = torch.zeros_like(mean)
        kl = functional.counted_mean(functional.gaussian_kl_rows(mean, log_var, prior, prior), batch.counted)
        terms = {"loss": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}
        self.log_dict(
            {f"{stage}/{name}": value.detach() for name, value in terms.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=weight_of(batch.count, terms["loss"]),
        )
        return terms["loss"]

    def _check_range(self, images: Tensor) -> None:
        low, high = self.generator.low, self.generator.high
        smallest, largest = float(images.min()), float(images.max())
        slack = 1e-3 * (high - low)
        if smallest < low - slack or largest > high + slack:
            raise InputError(
                f"output_range is ({low:.3f}, {high:.3f}), but the images go from {smallest:.3f} to {largest:.3f}: "
                "give (0 - mean) / std and (1 - mean) / std of the data"
            )

    def _draws(self, batch: Batch, batch_idx: int) -> Draws:
        return batch.replace(when=place_of(self, batch_idx)).draws(self.seed + _STREAM)

    def configure_optimizers(self) -> Any:
        """The optimiser and, if there is one, its schedule."""
        optimizer = self.optimizer(self.parameters())
        return with_schedule(self, optimizer, self.lr_scheduler, monitor="val/loss")

    def on_train_start(self) -> None:
        """Plan the learning rates of a resumed training."""
        super().on_train_start()
        plan_anew(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the version of the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        note_format(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the version.

        Raises:
            InputError: the checkpoint is of another version of this package.
        """
        check_format(checkpoint, "the checkpoint")

    def export_generator(self, path: str | Path) -> Path:
        """Write the decoder's state dict; a fresh `layers.ImageDecoder` of its sizes loads it with ``strict=True``.

        Args:
            path: ``.safetensors``, or ``.pt`` / ``.pth``.

        Returns:
            The path.

        Raises:
            InputError: another suffix.
        """
        return write_weights(self.generator, Path(path))
