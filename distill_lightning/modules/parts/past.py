"""Where Self-KD's past predictions come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill_lightning import functional
from distill_lightning.choices import Choice
from distill_lightning.data.batch import Batch
from distill_lightning.data.fingerprint import Fingerprint, data_difference, loader_fingerprint
from distill_lightning.data.mixing import mixup
from distill_lightning.errors import InputError, check_finite, refusing
from distill_lightning.functional.common import wide
from distill_lightning.lightning_internals import begins_anew, training_loaders
from distill_lightning.modules.parts.past_network import AveragedNetwork, PastNetwork
from distill_lightning.part import Part
from distill_lightning.storage import PredictionStore, Sidecar

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FOLDER = "self_kd_store"


class Past(Choice):
    """Where a network's past predictions come from; `start` makes what a training keeps of them."""

    @abstractmethod
    def start(self) -> RunningPast:
        """The past of one module."""


class RunningPast(Part, ABC):
    """What a module has of its past, through a training and its checkpoints.

    Args:
        kind: name of the choice that it belongs to.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        # Epochs whose end the past has seen; what a checkpoint tells, until the training starts.
        self._epochs = 0
        self._loaded: Mapping[str, Any] | None = None

    @abstractmethod
    def read(self, batch: Batch, like: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """Past predictions.

        Args:
            batch: as the student sees it.
            like: probabilities ``(N, K)``, or ``(N, T, K)`` of positions, that stand where nothing is known.
            temperature: that past predictions are softened with.

        Returns:
            Probabilities of that shape, and of which samples or positions there is a past, bool ``(N,)`` or ``(N, T)``.
        """

    def write(self, batch: Batch, logits: Tensor) -> None:
        """Keep what the student says of a batch, logits ``(N, K)`` or ``(N, T, K)`` without a graph."""

    @abstractmethod
    def begin(self, module: Any) -> None:
        """Get ready on the module's device."""

    @abstractmethod
    def forget(self) -> None:
        """Have no past, as before the first epoch."""

    @abstractmethod
    def advance(self, module: Any, before: int, epochs: int) -> None:
        """So many epochs are done, of which ``before`` were at the last call."""

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any], module: Any) -> None:
        """Take what `save` gave."""

    def training_starts(self, module: Any) -> None:
        """Begin, or go on where the checkpoint was made.

        Raises:
            InputError: the checkpoint has a past of another kind.
        """
        loaded, self._loaded = self._loaded, None
        if begins_anew(module.trainer):
            # A training that begins has no past, whatever this module was trained or loaded with before.
            loaded, self._epochs = None, 0
            self.forget()
        self.begin(module)
        if loaded is not None:
            if loaded["kind"] != self.kind:
                raise InputError(f"the checkpoint was trained with past={loaded['kind']}, not {self.kind}: set it so")
            self.restore(loaded["past"], module)
            self._epochs = loaded["epochs"]
        # A checkpoint may be older than the end of its epoch, and resumed behind it.
        self._finish(module, module.trainer.current_epoch)

    def epoch_ends(self, module: Any) -> None:
        """What this epoch said is the past of the next."""
        self._finish(module, module.trainer.current_epoch + 1)

    def _finish(self, module: Any, epochs: int) -> None:
        if epochs > self._epochs:
            self.advance(module, self._epochs, epochs)
            self._epochs = epochs

    def state_dict(self) -> dict[str, Any]:
        """The past, its kind and its epochs."""
        if self._loaded is not None:
            return dict(self._loaded)
        return {"kind": self.kind, "epochs": self._epochs, "past": self.save()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the past until training starts, when the size of the training set is known."""
        self._loaded = state


@dataclass(frozen=True)
class StoredPast(Past):
    """What the forward that a sample was last trained with in an earlier epoch gave, kept by the sample's index.

    It costs no forward of its own. A row of a mixed input is mixed from the rows of its two samples, and not stored.
    What a data module has mixed itself, as torchvision's ``v2.MixUp`` and ``v2.CutMix`` do, is not known to be mixed
    and kept like any other: leave the mixing to ``transforms``, or take `PastModel`.

    Args:
        dtype: of the stored probabilities: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        top_k: how many of a sample's largest probabilities are stored; ``None``: all.
        device: where the store is kept, see `PredictionStore` for its size; ``None``: on the training's device, where
            no step waits for it. ``"cpu"`` saves that memory and costs a copy per step.
        in_checkpoint: largest number of bytes of stored rows that a checkpoint holds itself. Larger stores are written
            to files at the end of every epoch (a checkpoint in its middle adds a file of what this epoch has written so
            far), and checkpoints name these. On the CPU the files are memory-mapped and shared by the processes of a
            node; on a GPU they serve checkpoints alone. See `Sidecar` for which files are kept.
        folder: of these files, which wins over the one that a checkpoint names: both may be moved. ``None``:
            ``self_kd_store`` in the Trainer's ``default_root_dir``. Two trainings that are resumed at once from one
            checkpoint need two. It is never taken from a checkpoint: give ``past`` to ``load_from_checkpoint`` again.
        keep: epochs whose files are kept, at least 2; a checkpoint that is older than these, and not the last one,
            cannot be resumed.
        num_samples: size of the training set whose indices the batches carry; ``None``: length of the training loader's
            data set.

    Tokens and other positions have no rows: `PastModel` and `MovingAverage` predict them.

    A checkpoint knows whose predictions it holds: a resumed training with other samples, labels, or another order of
    the data set is refused, as far as they are cheap to see (see `distill_lightning.data.fingerprint`; not if
    ``num_samples`` is another number than the data set's length). Start anew without ``ckpt_path`` on other data.

    Raises:
        InputError: an option is out of range; in training: the batches have no index, the training set no length, the
            checkpoint is of other data, or a file cannot be written, is gone, damaged or another one.

    Example:
        >>> from distill_lightning import SelfKDModule, SmallCNN, StoredPast
        >>> past = StoredPast(dtype="float16", top_k=5)
        >>> module = SelfKDModule(SmallCNN(num_classes=10), num_classes=10, past=past)
        >>> module.past.options.top_k
        5
    """

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    top_k: int | None = None
    device: str | None = None
    in_checkpoint: int = 2**26
    folder: str | Path | None = None
    keep: int = 2
    num_samples: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        self.check_known(dtype=list(_DTYPES))
        for name, count in (("top_k", self.top_k), ("num_samples", self.num_samples)):
            if count is not None and count < 1:
                raise InputError(f"StoredPast: {name} must be at least 1, got {count}")
        with refusing(f"StoredPast: device={self.device!r}", RuntimeError):
            torch.device(self.device or "cpu")
        if self.in_checkpoint < 0:
            raise InputError(
                f"StoredPast: in_checkpoint cannot be negative, got {self.in_checkpoint}: 0 keeps every store in files"
            )
        if self.keep < 2:
            raise InputError(
                f"StoredPast: keep must be at least 2, the new rows and those of the last checkpoint, got {self.keep}"
            )

    def start(self) -> RunningPast:
        """The past of one module; its store is made when the training starts."""
        return RunningStore(self)


@dataclass(frozen=True)
class PastModel(Past):
    """The paper's equation: a copy of the student predicts, in eval mode, for the very input that the student sees.

    One more forward per step.

    Args:
        refresh_epochs: epochs from one copy to the next.

    Raises:
        InputError: ``refresh_epochs`` is below 1.

    Example:
        >>> from distill_lightning import PastModel, SelfKDModule, SmallCNN
        >>> module = SelfKDModule(SmallCNN(num_classes=10), num_classes=10, past=PastModel(refresh_epochs=2))
        >>> module.past.network.every
        2
    """

    refresh_epochs: int = 1

    def __post_init__(self) -> None:
        """Check the number."""
        check_finite("refresh_epochs", self.refresh_epochs)
        if self.refresh_epochs < 1:
            raise InputError(f"PastModel: refresh_epochs must be at least 1, got {self.refresh_epochs}")

    def start(self) -> RunningPast:
        """The past of one module; its network is made during the training."""
        return RunningNetwork(type(self).__name__, PastNetwork(self.refresh_epochs))


@dataclass(frozen=True)
class MovingAverage(Past):
    """The moving average of the student's parameters and buffers, an extension; it predicts from the second epoch on.

    Args:
        decay: what remains of the average in every optimiser step.

    Raises:
        InputError: ``decay`` is not in ``[0, 1)``.

    Example:
        >>> from distill_lightning import MovingAverage, SelfKDModule, SmallCNN
        >>> module = SelfKDModule(SmallCNN(num_classes=10), num_classes=10, past=MovingAverage(decay=0.99))
        >>> module.past.network.decay
        0.99
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        """Check the number."""
        if not 0 <= self.decay < 1:
            raise InputError(f"MovingAverage: decay must be in [0, 1), got {self.decay}")

    def start(self) -> RunningPast:
        """The past of one module; its network is made during the training."""
        return RunningNetwork(type(self).__name__, AveragedNetwork(self.decay))


class RunningStore(RunningPast):
    """A `PredictionStore` in a training.

    Args:
        options: of the store.
    """

    def __init__(self, options: StoredPast) -> None:
        super().__init__(type(options).__name__)
        self.options = options
        self.store: PredictionStore | None = None
        # Of the data whose samples the rows belong to; as plain values, empty where nothing is known of them.
        self.data: Fingerprint = {}
        # Whether batches may come that are not finite.
        self._checks = False

    def joined(self, module: Any) -> None:
        """Look at the number of classes.

        Raises:
            InputError: ``top_k`` is larger.
        """
        self._checks = module.skipping.is_on
        top_k = self.options.top_k
        if top_k is not None and top_k > module.num_classes:
            raise InputError(f"StoredPast: top_k cannot be larger than num_classes={module.num_classes}, got {top_k}")

    def read(self, batch: Batch, like: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """Rows by the samples' indices; of mixed inputs mixed, the two labels in the place of what is not known."""
        past, known = self._rows(batch.index, temperature)
        mixture = batch.mixture
        if mixture is None:
            return torch.where(known[:, None], past, like), known
        other, other_known = self._rows(mixture.index, temperature)
        own = torch.where(known[:, None], past, mixture.first)
        other = torch.where(other_known[:, None], other, mixture.second)
        return mixup(own, other, mixture.share), known | (other_known & (mixture.share < 1))

    def write(self, batch: Batch, logits: Tensor) -> None:
        """Keep the probabilities of samples that count and were not mixed."""
        probs, keep = wide(logits).softmax(dim=-1), batch.counted
        if batch.mixture is not None:
            whole = batch.mixture.share == 1
            keep = whole if keep is None else keep & whole
        if self._checks:
            finite = probs.isfinite().all(dim=1)
            keep = finite if keep is None else keep & finite
        self._made().write(_index(batch.index), probs, keep)

    def begin(self, module: Any) -> None:
        """Make the store, or go on with the one of a training that goes on.

        Raises:
            InputError: it is about other data.
        """
        is_new = self.store is None
        self.store = (self.store or self._new(module)).to(self.options.device or module.device)
        found = self._data(module)
        if not is_new:
            _refuse_other_data(self.data, found)
        self.data = found

    def forget(self) -> None:
        """There is no store before the training starts."""
        self.store = None

    def advance(self, module: Any, before: int, epochs: int) -> None:
        """What was written can be read."""
        self._made().advance()

    def save(self) -> dict[str, Any]:
        """The store's rows, or what its files are called; and a fingerprint of the data that they are about."""
        return {} if self.store is None else {**self.store.state_dict(), "data": self.data}

    def restore(self, state: Mapping[str, Any], module: Any) -> None:
        """Take the rows.

        Raises:
            InputError: they are about other data.
        """
        if not state:
            return
        if not isinstance(state.get("data"), Mapping):
            raise InputError(
                "the checkpoint does not tell which data its past predictions are about, it is of an older version: "
                "start anew without it"
            )
        _refuse_other_data(state["data"], self.data)
        self._made().load_state_dict(state, folder=self.options.folder)

    def fit_ends(self, module: Any) -> None:
        """As Lightning does with the module, what is kept beside it leaves the device."""
        if self.store is not None:
            self.store.to("cpu")

    def _rows(self, index: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
        past, known = self._made().read(_index(index))
        return functional.soften(past, temperature=temperature), known

    def _made(self) -> PredictionStore:
        if self.store is None:
            raise RuntimeError("StoredPast makes its store when a Trainer starts to train the module")
        return self.store

    def _data(self, module: Any) -> Fingerprint:
        trainer = module.trainer
        view = 0 if hasattr(getattr(trainer, "datamodule", None), "views") else None
        found = loader_fingerprint(training_loaders(trainer), view=view)
        # Where they are not as many, it is not the data set's own indices that the batches carry.
        return found if found["count"] == self._made().num_samples else {}

    def _new(self, module: Any) -> PredictionStore:
        options, trainer, num_classes = self.options, module.trainer, module.num_classes
        num_samples = options.num_samples
        if num_samples is None:
            try:
                num_samples = len(getattr(training_loaders(trainer), "dataset", None))  # type: ignore[arg-type]  # raises
            except (TypeError, NotImplementedError):
                raise InputError(
                    "StoredPast needs the size of the training set, which the training loader does not tell: give "
                    "num_samples"
                ) from None
        layout: dict[str, Any] = {"dtype": _DTYPES[options.dtype], "top_k": options.top_k}
        sidecar = None
        if num_samples * PredictionStore.row_bytes(num_classes, **layout) > options.in_checkpoint:
            folder = self._folder(str(trainer.default_root_dir))
            sidecar = Sidecar(folder, keep=options.keep, writes=trainer.local_rank == 0)
        return PredictionStore(num_samples, num_classes, sidecar=sidecar, **layout)

    def _folder(self, root: str) -> Path:
        if self.options.folder is not None:
            return Path(self.options.folder)
        if "://" in root:
            raise InputError(
                f"StoredPast cannot map predictions in default_root_dir={root}: name a local folder, or raise "
                "in_checkpoint"
            )
        return Path(root, _FOLDER)


class RunningNetwork(RunningPast):
    """A past network in a training.

    Args:
        kind: name of the choice that it belongs to.
        network: what predicts.
    """

    def __init__(self, kind: str, network: PastNetwork) -> None:
        super().__init__(kind)
        self.network = network
        self._output: Any = None

    def joined(self, module: Any) -> None:
        """The network's outputs are laid out like those of the module's student."""
        self._output = module.output

    @property
    def model(self) -> nn.Module | None:
        """The network itself, for what else it can be asked; ``None`` while there is no past."""
        return self.network.model if self.network.ready else None

    def read(self, batch: Batch, like: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """What the network predicts for the input, mixed or not."""
        known = torch.full(like.shape[:-1], self.network.ready, device=like.device)
        past = self.network.predict(batch.input, laid_out=self._output.laid_out) if self.network.ready else like
        return functional.soften(past, temperature=temperature), known

    def begin(self, module: Any) -> None:
        """Move to the module's device."""
        self.network.to(module.device)

    def forget(self) -> None:
        """There is no network before the end of the first epoch."""
        self.network.forget()

    def step_ends(self, module: Any) -> None:
        """Take the step into an average."""
        self.network.after_step(module.student)

    def advance(self, module: Any, before: int, epochs: int) -> None:
        """Copy the student when it is time."""
        self.network.after_epochs(before, epochs, module.student)

    def save(self) -> dict[str, Any]:
        """The network's weights."""
        self.network.share_buffers()
        return self.network.state_dict()

    def restore(self, state: Mapping[str, Any], module: Any) -> None:
        """Take the weights."""
        self.network.load_state_dict(state, module.student)

    def fit_ends(self, module: Any) -> None:
        """As Lightning does with the module, what is kept beside it leaves the device."""
        self.network.to("cpu")


def _refuse_other_data(known: Fingerprint, present: Fingerprint) -> None:
    difference = data_difference(known, present)
    if difference:
        raise InputError(
            f"the past predictions are about other training data ({difference}): go on with the data that they were "
            "made with, or start anew without a checkpoint"
        )


def _index(index: Tensor | None) -> Tensor:
    if index is None:
        raise InputError(
            "StoredPast needs to know which sample is which, and the batches have no index: wrap the data in "
            "IndexedDataModule(datamodule), or use past=PastModel()"
        )
    return index.long()
