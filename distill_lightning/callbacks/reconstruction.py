"""Probes that reconstruct feature maps: from themselves through a bottleneck, or a teacher's from the student's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanAbsoluteError, MetricCollection
from torchmetrics.regression import WeightedMeanAbsolutePercentageError

from distill_lightning import functional
from distill_lightning.callbacks.figures import log_figure
from distill_lightning.data.batch import Batch, map_tensors
from distill_lightning.errors import InputError, check_finite
from distill_lightning.layers import FeatureTap, Paraphraser, Translator, freeze, outputs_of, resolve_layer, unwrapped
from distill_lightning.layers.feature_tap import Channels
from distill_lightning.lightning_internals import TrainersBatches, drawing_parts, training_loaders, undrawn
from distill_lightning.plots import reconstruction_errors

OptimizerCallable = Callable[[Iterable], Optimizer]  # type: ignore[type-arg]  # jsonargparse needs the bare Iterable


def probe_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """SGD with the settings with which Factor Transfer trains its paraphrasers."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


class ReconstructionErrorProbe(pl.Callback):
    r"""Measures at the end of ``fit`` how well the feature maps of frozen networks can be reconstructed.

    ``kind="self"`` trains an autoencoder (a `Paraphraser`) on the tapped feature ``F`` of each network
    (the student, its teachers if it has any, and the control) and reports

    .. math:: \frac{1}{N D} \lVert R(F) - F \rVert_1 \quad \text{and} \quad
        \frac{\lVert R(F) - F \rVert_1}{\lVert F \rVert_1}.

    ``kind="teacher"`` trains a new `Translator` ``T`` from the student's feature map to each teacher's, and another one
    from the control's. The errors are those of the normalised features ``u(T(F_S))`` and ``u(F_m)``: the absolute one
    is `functional.factor_distance`, the ``L_m`` of FEED.

    An absolute error grows with the scale of the feature, so absolute errors of ``"self"`` cannot be compared between
    networks; relative ones can. The control is a network that was trained without teachers (or not at all): without it
    there is nothing to compare the numbers with.

    The probes learn from the training loader, with its augmentation, for some epochs; the errors are measured on the
    validation loader after each epoch, both on the samples that count. All networks see the same batches, and probes of
    equal shape begin with equal weights. ``limit_train_batches`` and ``limit_val_batches`` apply. Copies are probed in
    float32: the networks, their modes and the random state are left as they were. Of several processes, the first one
    measures, on its share of the data.

    Without a Trainer, call `measure`.

    The autoencoder, the default optimiser and about five epochs are those of Factor Transfer,
    https://arxiv.org/abs/1802.04977; reconstruction errors as an analysis are in FEED,
    https://arxiv.org/abs/1909.10754.

    Attributes:
        table: one dict for each network, target and epoch, with the keys ``network``, ``target``, ``epoch`` (from 1),
            ``absolute`` and ``relative``; names are ``student``, ``teacher_<m>`` and ``control``.
        figure: `distill_lightning.plots.reconstruction_errors` of the table; ``None`` before.

    Args:
        layer: dotted path (or glob) of the feature map in the student and the control: after the last ReLU, before
            pooling.
        kind: ``"self"`` or ``"teacher"``.
        control: a network to compare with, of the student's architecture.
        teacher_layers: the same for the teachers: one path for all, or one each; ``None`` for ``layer``.
        channels: where ``layer`` has its channels, ``"first"`` or ``"last"``; ``None``: as the networks' own operations
            tell, see `layers.FeatureTap`.
        teacher_channels: the same for the teachers, for all; ``None`` for ``channels``.
        epochs: epochs of the probes' training.
        rate: channels in the autoencoders' bottleneck per channel of the feature.
        beta: the factor of ``L_m`` in the translators' training (not in the table); the default is FEED's.
        optimizer: makes the optimiser from the parameters of all probes. The default, SGD with rate 0.1, momentum 0.9
            and weight decay 5e-4, is meant for thousands of steps; after a few hundred the relative error of an
            autoencoder is still close to 1, unlike with ``Adam`` and rate 0.001.
        seed: seed of the probes' weights and of what PyTorch draws while they are trained.

    Raises:
        InputError: an option is out of range; when the training starts: there is no validation data, there are several
            loaders, the module has no student (for ``"teacher"``: no teachers), or a layer does not fit.
    """

    def __init__(
        self,
        layer: str,
        *,
        kind: Literal["self", "teacher"] = "self",
        control: nn.Module | None = None,
        teacher_layers: str | Sequence[str] | None = None,
        channels: Channels | None = None,
        teacher_channels: Channels | None = None,
        epochs: int = 5,
        rate: float = 0.5,
        beta: float = 500.0,
        optimizer: OptimizerCallable = probe_optimizer,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kind not in ("self", "teacher"):
            raise InputError(f"kind must be 'self' or 'teacher', got {kind!r}")
        check_finite("beta", beta)
        check_finite("rate", rate)
        if epochs < 1 or not beta > 0:
            raise InputError(f"epochs and beta must be positive, got {epochs} and {beta}")
        self.layer, self.kind, self.control, self.teacher_layers = layer, kind, control, teacher_layers
        self.epochs, self.rate, self.beta, self.optimizer, self.seed = epochs, rate, beta, optimizer, seed
        self.channels, self.teacher_channels = channels, channels if teacher_channels is None else teacher_channels
        self.table: list[dict[str, Any]] = []
        self.figure: Figure | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse now what could otherwise only be refused after the training."""
        _, val_loader = _loaders(trainer, pl_module)
        networks, teachers = self._networks(pl_module)
        with isolate_rng():
            example = _first_input(val_loader)
        taps = self._taps(networks, teachers)
        try:
            self._plan(taps, example, teachers)
        finally:
            for tap in taps.values():
                tap.remove()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, and log the figure."""
        if not trainer.is_global_zero:
            return
        loader, val_loader = _loaders(trainer, pl_module)
        networks, teachers = self._networks(pl_module)
        limits = (trainer.num_training_batches, trainer.num_val_batches[0])
        train_batches, val_batches = (None if math.isinf(limit) else int(limit) for limit in limits)
        self.measure(
            networks, loader, val_loader, teachers=teachers, train_batches=train_batches, val_batches=val_batches
        )
        if self.figure is not None:
            log_figure(trainer, f"reconstruction/{self.kind}", self.figure, trainer.global_step)

    def measure(
        self,
        networks: Mapping[str, nn.Module],
        loader: Iterable[Any],
        val_loader: Iterable[Any],
        *,
        teachers: Mapping[str, nn.Module] | None = None,
        train_batches: int | None = None,
        val_batches: int | None = None,
    ) -> list[dict[str, Any]]:
        """Probe some networks; this also sets ``table`` and ``figure``.

        Args:
            networks: the networks to probe, by name, tapped at ``layer``.
            loader: batches from which the probes learn; it is read once per epoch.
            val_loader: batches on which the errors are measured.
            teachers: the teachers, by name, tapped at ``teacher_layers``: the targets of ``kind="teacher"``, or further
                networks for ``kind="self"``.
            train_batches: number of batches that are read from ``loader``; ``None`` for all.
            val_batches: the same for ``val_loader``.

        Returns:
            The table.

        Raises:
            InputError: a layer does not fit, a name is used twice, there are no teachers for ``kind="teacher"``, or a
                loader has no batch.
        """
        teachers = teachers or {}
        if set(networks) & set(teachers):
            raise InputError(f"networks and teachers share the names {sorted(set(networks) & set(teachers))}")
        rows: list[dict[str, Any]] = []
        with isolate_rng(), undrawn(loader), undrawn(val_loader):
            example = _first_input(val_loader)
            device = _device(next(iter({**networks, **teachers}.values())))
            copies = [{name: _copy(network, device) for name, network in some.items()} for some in (networks, teachers)]
            taps = self._taps(*copies)
            probes = [probe.to(device) for probe in self._plan(taps, example, teachers)]
            parameters = [parameter for probe in probes for parameter in probe.head.parameters()]
            optimizer = self.optimizer(parameters)
            torch.manual_seed(self.seed)
            for epoch in range(1, self.epochs + 1):
                _set_epoch(loader, epoch - 1)
                for inputs in _counted_inputs(loader, train_batches):
                    features = _features(taps, inputs, device)
                    optimizer.zero_grad()
                    torch.autograd.backward([probe.loss(features) for probe in probes])
                    optimizer.step()
                for inputs in _counted_inputs(val_loader, val_batches):
                    features = _features(taps, inputs, device)
                    for probe in probes:
                        probe.observe(features)
                rows += [{"network": p.network, "target": p.target, "epoch": epoch, **p.errors()} for p in probes]
        self.table = rows
        self.figure = reconstruction_errors(_curves(rows, "absolute"), _curves(rows, "relative"))
        return rows

    def _networks(self, pl_module: Any) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """The networks to probe, and the teachers."""
        student = getattr(pl_module, "student", None)
        if not isinstance(student, nn.Module):
            raise InputError(f"ReconstructionErrorProbe: {type(pl_module).__name__} has no student: call measure()")
        networks = {"student": student} | ({} if self.control is None else {"control": self.control})
        teachers = getattr(pl_module, "teachers", None)
        return networks, {f"teacher_{number}": network for number, network in enumerate(teachers or ())}

    def _taps(self, networks: Mapping[str, nn.Module], teachers: Mapping[str, nn.Module]) -> dict[str, FeatureTap]:
        given = self.layer if self.teacher_layers is None else self.teacher_layers
        paths = [given] * len(teachers) if isinstance(given, str) else list(given)
        if len(paths) != len(teachers):
            raise InputError(f"{len(paths)} teacher_layers for {len(teachers)} teachers: give one for all, or one each")
        layers = dict.fromkeys(networks, self.layer) | dict(zip(teachers, paths, strict=True))
        return {
            name: FeatureTap(
                network,
                resolve_layer(network, layers[name]),
                channels=self.teacher_channels if name in teachers else self.channels,
            )
            for name, network in {**networks, **teachers}.items()
        }

    def _plan(self, taps: Mapping[str, FeatureTap], example: Any, teachers: Iterable[str]) -> list[_Probe]:
        """The probes, untrained."""
        shapes = {name: _map_shape(name, tap, example) for name, tap in taps.items()}
        if self.kind == "self":
            pairs = [(name, name) for name in taps]
        else:
            pairs = [(name, teacher) for name in taps if name not in teachers for teacher in teachers]
            if not pairs:
                raise InputError("kind='teacher' needs teachers, and there are none: choose kind='self'")
        probes = []
        for network, target in pairs:
            if shapes[network][1:] != shapes[target][1:]:
                raise InputError(
                    f"{network}'s feature is {shapes[network]} and {target}'s {shapes[target]}: tap layers of the same "
                    "spatial size"
                )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                if self.kind == "self":
                    probes.append(_Probe(network, target, Paraphraser(shapes[network][0], rate=self.rate)))
                else:
                    head = Translator(shapes[network][0], shapes[target][0])
                    probes.append(_Probe(network, target, head, unit=True, weight=self.beta))
        return probes


class _Probe(nn.Module):
    """One trainable head between two feature maps, and its errors on the validation data.

    Args:
        network: name of the network whose feature is read.
        target: name of the network whose feature is reconstructed.
        head: the map.
        unit: whether normalised features are compared.
        weight: weight of the error in the loss.
    """

    def __init__(self, network: str, target: str, head: nn.Module, *, unit: bool = False, weight: float = 1.0) -> None:
        super().__init__()
        self.network, self.target, self.head = network, target, head
        self.unit, self.weight = unit, weight
        # Only the first process measures: it must not wait for the others.
        alone = {"sync_on_compute": False}
        self.metrics = MetricCollection(
            {"absolute": MeanAbsoluteError(**alone), "relative": WeightedMeanAbsolutePercentageError(**alone)}
        )

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The reconstruction and its target, which are compared."""
        reconstruction, target = self.head(features[self.network]), features[self.target]
        if self.unit:
            return functional.unit_feature(reconstruction), functional.unit_feature(target)
        return reconstruction, target

    def loss(self, features: Mapping[str, Tensor]) -> Tensor:
        """The loss of the head."""
        return self.weight * F.l1_loss(*self(features))

    @torch.no_grad()
    def observe(self, features: Mapping[str, Tensor]) -> None:
        """Add a batch to the errors."""
        self.metrics.update(*self(features))

    def errors(self) -> dict[str, float]:
        """The errors of everything observed since the last call."""
        values = {name: float(value) for name, value in self.metrics.compute().items()}
        self.metrics.reset()
        return values


def _copy(network: nn.Module, device: torch.device) -> nn.Module:
    return freeze(copy.deepcopy(unwrapped(network)).float().to(device))


def _device(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def _map_shape(name: str, tap: FeatureTap, example: Any) -> tuple[int, ...]:
    """``(C, H, W)`` of a network's tapped feature map."""
    _, features = tap.shapes(map_tensors(lambda part: part.shape[1:], example))
    shape = tuple(features[tap.layers[0]])
    if len(shape) != 4:
        raise InputError(f"{name}'s {tap.layers[0]!r} gives shape {shape}, not (N, C, H, W): tap a convolutional layer")
    return shape[1:]


@torch.no_grad()
def _features(taps: Mapping[str, FeatureTap], inputs: Any, device: torch.device) -> dict[str, Tensor]:
    inputs = map_tensors(lambda part: part.to(device, torch.float32 if part.is_floating_point() else None), inputs)
    return {name: outputs_of(tap, inputs)[1][tap.layers[0]] for name, tap in taps.items()}


def _counted_inputs(loader: Iterable[Any], limit: int | None) -> Iterator[Any]:
    """The inputs of the samples that count, batch by batch, where there are any."""
    for batch in map(Batch.of, islice(loader, limit)):
        if batch.counted is None or batch.counted.ndim > 1:
            yield batch.input
        elif batch.counted.any():
            yield map_tensors(itemgetter(batch.counted), batch.input)


def _first_input(loader: Iterable[Any]) -> Any:
    for batch in loader:
        inputs = Batch.of(batch).input
        if not isinstance(inputs, (Tensor, Mapping)):
            raise InputError(
                f"ReconstructionErrorProbe reads inputs that are one tensor or several by name, got "
                f"{type(inputs).__name__}: give them as a dict, or leave it out"
            )
        return inputs
    raise InputError("ReconstructionErrorProbe: the validation loader has no batch to measure errors on")


def _curves(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[tuple[str, str], list[float]]:
    curves: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        curves.setdefault((row["network"], row["target"]), []).append(row[kind])
    return curves


def _loaders(trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[Iterable[Any], Iterable[Any]]:
    """The Trainer's single loaders for training and for validation, with its hooks."""
    found = []
    for what, loaders in (("train", training_loaders(trainer)), ("val", trainer.val_dataloaders)):
        single = loaders[0] if isinstance(loaders, (list, tuple)) and len(loaders) == 1 else loaders
        if single is None or (what == "val" and not sum(trainer.num_val_batches)):
            raise InputError(
                "ReconstructionErrorProbe measures on validation data, and there are none: give the data module a "
                "val_dataloader and the Trainer a limit_val_batches above 0"
            )
        if isinstance(single, (list, tuple, Mapping)):
            raise InputError(f"ReconstructionErrorProbe needs one {what}_dataloader, got {len(single)}: call measure()")
        found.append(TrainersBatches(trainer, pl_module, single, number=0, training=what == "train"))
    return found[0], found[1]


def _set_epoch(loader: Any, epoch: int) -> None:
    """Give every epoch its own order and views, as in training."""
    for part in drawing_parts(loader):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
