"""What teachers gave for every view, kept once for any number of methods that ask them different things."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill_lightning.data.batch import Batch, map_tensors
from distill_lightning.errors import InputError
from distill_lightning.layers import FeatureTap, InputShape
from distill_lightning.layers.feature_tap import Channels
from distill_lightning.teachers.about import About
from distill_lightning.teachers.ensemble import TeacherEnsemble
from distill_lightning.teachers.questions import Logits
from distill_lightning.teachers.row_codec import Answers
from distill_lightning.teachers.store import TeacherStore
from distill_lightning.teachers.teachers import Teachers, refuse_non_finite

# What of a method's description the outputs of a network do not depend on.
_OF_METHODS = ("ensemble", "num_classes", "num_targets")

# Samples of a training's first batch about which the networks are asked, and a share of the range of what is kept, from
# which no rounding leads so far.
_LOOKED_AT = 4
_FAR = 0.05

Dtype = Literal["float16", "float32"]


class Tapped(NamedTuple):
    """An inner feature of a teacher.

    Attributes:
        teacher: its number, from 0.
        layer: dotted path of the tapped layer.
        channels: where the layer has its channels; ``None``: as the network's own operations tell.
    """

    teacher: int
    layer: str
    channels: Channels | None = None


class _Part(TeacherStore):
    """One teacher's output, or one feature of it."""

    def _keys(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        index, view = super()._keys(batch)
        # One view stands for all where they are alike; else there are as many here as the data have.
        return index, view % int(self._plan["views"])


class OutputsStore(TeacherStore):
    """Every teacher's output for every view, and features beside them, whatever a method makes of them.

    A `TeacherStore` of answers belongs to one method and its options, and one of logits to all methods that ask
    nothing else. This one answers any question about a batch's own inputs, the first teachers alone if a method has
    fewer, and each method reads no more of it than it needs. It is filled by `record`, ahead of the trainings::

        teacher_0/output/...          a store of teacher 0's outputs
        teacher_0/layer_stage3/...    and of its feature maps

    Args:
        path: its folder.
        networks: the teachers: as they were when it was filled, or the first of them.
        outputs: the type in which their outputs are kept; ``None``: they are not, or not read.
        tapped: the features that are kept, or read, in the teachers' order.
        features: the type in which these are kept.
        views_are_alike: whether all views of a sample are the same, so that one of them is kept.
        fill: ``"online"``: `record` fills it; ``"never"``: it is complete, and read.

    Raises:
        InputError: features of one teacher that are to be laid out in two ways.

    Example:
        >>> from tempfile import mkdtemp
        >>> from distill_lightning import KDModule
        >>> from distill_lightning.teachers.recorder import record
        >>> from distill_lightning.teachers.shared import AskedForAll, OutputsStore, ReadTeachers
        >>> from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer
        >>> data, networks, folder = TinyDataModule(views=2), [TinyNet(), TinyNet()], mkdtemp()
        >>> module = KDModule(TinyNet(), networks, num_classes=3)
        >>> module.teachers = AskedForAll(OutputsStore(folder, networks), data.input_shape)
        >>> record(tiny_trainer(), module, data).answers
        48
        >>> student = KDModule(TinyNet(), networks[:1], num_classes=3)
        >>> student.teachers = ReadTeachers.of(student.teachers, OutputsStore(folder, networks[:1], fill="never"))
        >>> tiny_trainer().fit(student, datamodule=data)
    """

    def __init__(
        self,
        path: str | Path,
        networks: nn.Module | Sequence[nn.Module],
        *,
        outputs: Dtype | None = "float32",
        tapped: Sequence[Tapped] = (),
        features: Dtype = "float16",
        views_are_alike: bool = False,
        fill: Literal["online", "never"] = "online",
    ) -> None:
        super().__init__(path, networks, fill=fill, keep="logits", dtype="float32")
        self.holds_features, self.views_are_alike = bool(tapped), views_are_alike
        self.outputs, self.tapped = outputs, tuple(tapped)
        ways = {(tap.teacher, tap.channels) for tap in tapped}
        if len(ways) > len({teacher for teacher, _ in ways}):
            raise InputError("OutputsStore: one teacher's features are laid out in one way: give the same channels")
        count = len(TeacherEnsemble.of(networks)) if outputs is not None else 0
        wanted: dict[tuple[int, str], Dtype] = {(teacher, "output"): outputs or "float32" for teacher in range(count)}
        wanted |= {(tap.teacher, f"layer_{tap.layer}"): features for tap in tapped}
        self.parts = {
            place: _Part(self.path / f"teacher_{place[0]}" / place[1], fill=fill, dtype=dtype)
            for place, dtype in wanted.items()
        }

    def begin(self, *, samples: int, views: int, made_by: Mapping[str, Any], rank: int = 0) -> None:
        """As of any store; every part is about its own teacher alone."""
        known = {name: value for name, value in made_by.items() if name not in _OF_METHODS}
        views = 1 if self.views_are_alike else views
        self._plan = {"samples": samples, "views": views, "made_by": dict(made_by)}
        for (teacher, _), part in self.parts.items():
            own = {**known, "teachers": made_by["teachers"][teacher]}
            part.begin(samples=samples, views=views, made_by=own, rank=rank)

    def read_or_ask(
        self, batch: Batch, ask: Callable[[], Answers] | None, *, device: torch.device | str
    ) -> dict[str, Tensor]:
        """What is kept about a batch: ``logits`` ``(N, M, ...)``, and the features in their teachers' order.

        Raises:
            InputError: something is not there.
        """
        rows = {place: part.read_or_ask(batch, None, device=device)["rows"] for place, part in self.parts.items()}
        outputs = [value for (_, name), value in rows.items() if name == "output"]
        maps = [rows[tap.teacher, f"layer_{tap.layer}"] for tap in self.tapped]
        found = {"logits": torch.stack(outputs, dim=1)} if outputs else {}
        return found | {f"feature_{number}": value for number, value in enumerate(maps)}

    def write(self, view: int, shard: int, *answers: Answers) -> None:
        """Keep the rows of a shard, as `AskedForAll` names them."""
        for place, part in self.parts.items():
            part.write(view, shard, *({"rows": piece[row_name(*place)]} for piece in answers))

    def narrowed(self, answers: Answers) -> dict[str, Tensor]:
        """On the host, each in its own type."""
        narrow = {row_name(*place): part.codec.narrow for place, part in self.parts.items()}
        return {name: narrow[name]({"rows": rows})["rows"] for name, rows in answers.items()}

    def claim(self) -> str | None:
        """The right to fill all of it."""
        holder = self._lock.take()
        if holder is None:
            for part in self.parts.values():
                part.resume()
            return None
        return "" if self.is_complete else holder

    def finish(self) -> None:
        """Make what was kept readable."""
        for part in self.parts.values():
            part.finish()

    def refresh(self) -> None:
        """Look at what others have made."""
        for part in self.parts.values():
            part.refresh()

    def unfinished(self) -> list[tuple[int, int]]:
        """The views and shards that are not complete in every part."""
        return sorted({place for part in self.parts.values() for place in part.unfinished()})

    @property
    def is_complete(self) -> bool:
        """Whether everything is known."""
        return all(part.is_complete for part in self.parts.values())

    @property
    def nbytes(self) -> int:
        """Bytes of one sample and view."""
        return sum(part.nbytes for part in self.parts.values())


def row_name(teacher: int, what: str) -> str:
    """How the rows of a teacher's output, or of a layer, are called while a store is filled."""
    return f"{teacher} {what}"


class AskedForAll(Teachers):
    """Teachers whom `record` asks for all that an `OutputsStore` keeps; each runs once.

    Args:
        store: with networks.
        input_shape: of a sample, by which features get the one layout in which methods read them.
    """

    def __init__(self, store: OutputsStore, input_shape: InputShape) -> None:
        super().__init__(store, ask=[Logits()])
        self.kept = store
        self.runs: list[Callable[[Any], Any]] = []
        for number, network in enumerate(self):
            own = [tap for tap in store.tapped if tap.teacher == number]
            if own:
                tap = FeatureTap(network, [tap.layer for tap in own], channels=own[0].channels)
                tap.shapes(input_shape)
            self.runs.append(tap if own else network)

    @torch.no_grad()
    def rows_to_store(self, batch: Batch) -> dict[str, Tensor]:
        """Every output and feature that the store keeps, ``(N, ...)``.

        Raises:
            InputError: no store can reproduce the inputs.
            NonFiniteError: a number that counts is nan or infinite.
        """
        inputs = self.inputs(batch)
        self.about.suffixes(batch, inputs)
        rows: dict[str, Tensor] = {}
        for number, given in enumerate(self.ensemble.each(inputs[""], self.runs) if self.ensemble else ()):
            output, features = given if isinstance(given, tuple) else (given, {})
            self.check(number, self[number], output.shape)
            rows |= {row_name(number, f"layer_{layer}"): feature for layer, feature in features.items()}
            if self.kept.outputs is not None:
                rows[row_name(number, "output")] = self._laid_out(number, output)
        refuse_non_finite(rows, batch)
        return rows


class ReadTeachers(Teachers):
    """Teachers who have said everything: a complete `OutputsStore` answers in training, and nobody in validation.

    In a training's first batch the networks are asked about a few samples, too: a method that hands them other inputs
    than the data's would get answers about something else.
    """

    _is_sure = False

    @classmethod
    def of(cls, teachers: Teachers, store: OutputsStore) -> ReadTeachers:
        """The same questions to the same networks, answered by a store."""
        read = cls(store, ask=teachers.questions, about=teachers.about)
        # Those that know already where their layers have the channels.
        read.taps = teachers.taps
        return read

    def training_starts(self, module: Any) -> None:
        """As of any `Teachers`; the first batch is looked at again."""
        super().training_starts(module)
        self._is_sure = False

    def _from_store(self, batch: Batch, store: TeacherStore) -> dict[str, Tensor]:
        if not self._is_sure:
            self._is_sure = True
            self._look_at(batch, store)
        return super()._from_store(batch, store)

    def _look_at(self, batch: Batch, store: TeacherStore) -> None:
        inputs = map_tensors(lambda values: values[:_LOOKED_AT], batch.input)
        index, view = (None if key is None else key[:_LOOKED_AT] for key in (batch.index, batch.view))
        few = Batch(inputs, index=index, view=view)
        said, kept = self._outputs_of(few), store.read_or_ask(few, None, device=batch.device)
        now = {"logits": torch.stack([self._laid_out(*one) for one in enumerate(said.outputs)], dim=1)}
        now |= {f"feature_{number}": feature for number, feature in enumerate(said.features)}
        # These few are not the batch's.
        self.heard = ()
        for name, read in kept.items():
            if (now[name] - read).abs().max() > _FAR * (read.max() - read.min()):
                raise InputError(
                    f"{self._who}: what is kept in {store.path} is not what the teachers say now. A method that asks "
                    "about other inputs than the data's views needs them at work (in compare: teachers_store: null)"
                )

    def prediction(self, inputs: Any) -> None:
        """None: the store knows of training samples alone, and the networks need not run."""

    def predictions(self, inputs: Any) -> list[Tensor]:
        """None, as of `prediction`."""
        return []


def reason_to_ask(module: Any) -> str:
    """Why a module's teachers must be asked in every step; empty: an `OutputsStore` can answer for them.

    Args:
        module: a `DistillationModule`, or any other.
    """
    teachers = getattr(module, "teachers", None)
    if not isinstance(teachers, Teachers) or teachers.ensemble is None or teachers.store is not None:
        return "it asks its teachers itself"
    if type(teachers.about) is not About:
        return "it asks about inputs of its own"
    mixing = [type(transform).__name__ for transform in module.transforms if transform.changes_inputs]
    if mixing:
        return f"{' and '.join(mixing)} changes the inputs"
    return ""
