"""What frozen teachers say about the augmented training samples, kept so that they need not say it twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill_lightning.data.batch import Batch
from distill_lightning.data.fingerprint import data_difference
from distill_lightning.errors import InputError
from distill_lightning.storage import (
    Field,
    FillingLock,
    Rows,
    ShardedRecords,
    read_fields,
    read_header,
    sweep_records,
)
from distill_lightning.teachers.questions import feature_names
from distill_lightning.teachers.row_codec import Answers, RowCodec, shapes


class TeacherStore:
    """The teachers' answers about every view of every training sample, in a directory.

    A view of a sample is a function of the data module's seed, the sample's index and the view's number alone, so what
    the teachers said about it stays true. Give the data module a number of ``views``; epoch ``e`` reads view ``e``
    modulo that, or as many views as the data module's ``views_per_load`` says. With ``fill="online"`` the epochs that
    read a view for the first time run the teachers and keep what they say, later ones read; ``distill-lightning
    record`` fills a store ahead of time. Where it is complete, it needs no ``networks``.

    ::

        model:
          class_path: KDModule
          init_args:
            student: {class_path: SmallResNet, init_args: {width: 8}}
            teachers: {class_path: TeacherStore, init_args: {path: results/store}}
        data:
          class_path: FashionMNISTDataModule
          init_args: {views: 8}

    The store knows the data, the views, the teachers' weights and the options that its answers depend on; with any of
    them changed it is refused, and the message says which. See `ShardedRecords` for the files. Any number of trainings
    may read a store; one at a time may fill it, however many processes it has, and another one that would is refused.

    Of the data, it knows the number, names, labels, order and contents of the training samples, as far as they are
    cheap to see: all of what is in memory; of image files the names and sizes of all, and the contents of 256; of other
    data sets what they have in tensors, arrays or lists, or else 256 samples, spread evenly. An image that was changed
    and kept its size may so be missed, or a sample that is only made when it is asked for. ``made_by.data.seen`` in the
    store's ``header.json`` says what was looked at.

    Args:
        path: its folder.
        networks: the teachers that fill it: a network, several, or a `TeacherEnsemble`; ``None``: it is complete.
        fill: ``"online"``: what is not known is asked for and kept; ``"never"``: what is not known is an error.
        keep: ``"answers"``: what the method asks for, the ensemble's softened prediction say; ``"logits"``: each
            teacher's logits, ``(M, K)`` for a sample: ``M`` times the bytes, and `KDModule` and `MEALV2Module` can be
            trained at any temperature with the same store.
        dtype: of what is kept, ``"float16"`` or ``"float32"``. Half precision is off by less than ``2 ** -11`` of each
            number; probabilities are divided by their sum when read. Training gets answers rounded so from the first
            epoch on, whether they were asked for or read.
        top_k: how many of a row's largest probabilities are kept, the rest being spread evenly over the other classes;
            ``None``: all.
        shard_size: samples in a file.
        data: names the data, where their data module has no ``fingerprint()``; the name is then compared with the
            store, too, and what the loader makes of 16 samples. They must always be the same: what is not augmented, or
            in numbered views.

    Raises:
        InputError: an option is out of range.

    Example:
        >>> from tempfile import mkdtemp
        >>> from distill_lightning import KDModule, TeacherStore
        >>> from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer
        >>> store = TeacherStore(mkdtemp(), TinyNet())
        >>> trainer = tiny_trainer(max_epochs=2)
        >>> trainer.fit(KDModule(TinyNet(), store, num_classes=3), datamodule=TinyDataModule(views=2))
        >>> store.is_complete, store.shapes()
        (True, {'probabilities': (3,)})
        >>> alone = KDModule(TinyNet(), TeacherStore(store.path), num_classes=3)
        >>> tiny_trainer().fit(alone, datamodule=TinyDataModule(views=2))
    """

    # Whether there are features beside the logits of keep="logits".
    holds_features = False

    def __init__(
        self,
        path: str | Path,
        networks: nn.Module | Sequence[nn.Module] | None = None,
        *,
        fill: Literal["online", "never"] = "online",
        keep: Literal["answers", "logits"] = "answers",
        dtype: Literal["float16", "float32"] = "float16",
        top_k: int | None = None,
        shard_size: int = 4096,
        data: str | None = None,
    ) -> None:
        for name, value, known in (
            ("fill", fill, ("online", "never")),
            ("keep", keep, ("answers", "logits")),
            ("dtype", dtype, ("float16", "float32")),
        ):
            if value not in known:
                raise InputError(f"TeacherStore: {name} must be one of {', '.join(known)}, got {value!r}")
        for name, number in (("top_k", top_k), ("shard_size", shard_size)):
            if number is not None and number < 1:
                raise InputError(f"TeacherStore: {name} must be at least 1, got {number}")
        if keep == "logits" and top_k is not None:
            raise InputError("TeacherStore: top_k keeps the largest probabilities; with keep='logits' leave it out")
        self.networks = networks
        self.path, self.fill, self.keep, self.dtype = Path(path), fill, keep, dtype
        self.top_k, self.shard_size, self.data = top_k, shard_size, data
        self.codec = RowCodec(dtype, top_k)
        # For a look at a training: what is asked for is forgotten, and no file is made or changed.
        self.is_read_only = False
        # The header of the store that `begin` has found.
        self.found: dict[str, Any] = {}
        self._records: ShardedRecords | None = None
        self._plan: dict[str, Any] = {}
        self._rank = 0
        self._new: set[int] = set()
        self._lock, self._only_reads = FillingLock(self.path), False

    def begin(self, *, samples: int, views: int, made_by: Mapping[str, Any], rank: int = 0) -> None:
        """Say what the answers are about; a store that is there is compared with it.

        Args:
            samples: size of the training set.
            views: of each sample.
            made_by: plain values, by name, of everything that the answers depend on.
            rank: of this process.

        Raises:
            InputError: the store was made by something else, or it is to be read alone and is not there.
        """
        self._plan = {
            "samples": samples,
            "views": views,
            "made_by": {**made_by, "keep": self.keep, "top_k": self.top_k, "dtype": self.dtype},
        }
        self._rank, self._records, self.found = rank, None, {}
        self._only_reads = False
        self._new.clear()
        if self.fill == "never" or (self.path / "header.json").exists():
            self.found = header = read_header(self.path)
            self._make(read_fields(self.path, header))

    def read_or_ask(
        self, batch: Batch, ask: Callable[[], Answers] | None, *, device: torch.device | str
    ) -> dict[str, Tensor]:
        """The teachers' answers about a batch: from the store if all of it is known, else from themselves.

        Args:
            batch: with the samples' indices and, unless there is one view alone, views.
            ask: asks the teachers; ``None``: there are none.
            device: where the answers are wanted.

        Returns:
            Float32 tensors ``(N, ...)`` by name, as they are read: what is asked for is rounded like what is kept, so
            that a run that was interrupted, and finds answers that it had kept before, is the uninterrupted one.

        Raises:
            InputError: an answer is not there, and there is nobody to ask; or the disk is full.
        """
        index, view = self._keys(batch)
        known = np.zeros(len(index), dtype=np.bool_)
        if self._records is not None:
            rows, known = self._records.read(index, view)
            if known.all():
                return self._unpacked(rows, device)
        if ask is None or self.fill == "never" or self._only_reads:
            raise self._unknown(index, view, known)
        packed = self.codec.pack(ask())
        if not self.is_read_only:
            self._keep(index, view, known, packed)
        return self._unpacked(packed, device)

    def finish(self) -> None:
        """Make what was kept readable; one process calls it while the others wait."""
        if self._records is not None:
            # Another process may have kept something of a view of which this one kept nothing.
            for view in range(self._records.views):
                self._records.seal(view)

    def refresh(self) -> None:
        """Look at what `finish` has made."""
        self._new.clear()
        if self._records is not None:
            self._records.refresh()

    def claim(self) -> str | None:
        """Claim the right to fill the store, and `resume`; one process calls it for all of its training.

        Returns:
            ``None``: it may be filled. Otherwise who fills it; empty if it is complete, so that there is nothing to
            fill and it can be read.

        Raises:
            InputError: its folder cannot be written to, and is not complete.
        """
        if self.path.exists() and not os.access(self.path, os.W_OK) and self.is_complete:
            return ""
        holder = self._lock.take()
        if holder is None:
            self.resume()
            return None
        return "" if self.is_complete else holder

    def only_read(self) -> None:
        """Ask and keep nothing, because somebody else has filled the store."""
        self._only_reads = True

    def release(self) -> None:
        """Let others fill the store."""
        self._lock.release()

    def resume(self) -> None:
        """Take up what a killed process had kept, and remove what it was writing.

        Call it from one process, while no other writes.
        """
        # Its first file may have been the one that it did not finish.
        sweep_records(self.path)
        self.finish()

    def write(self, view: int, shard: int, *answers: Answers) -> None:
        """Keep the answers about all samples of a shard.

        Args:
            view: of all of them.
            shard: which.
            answers: about `samples_of` it, in order, in one piece or several.

        Raises:
            InputError: the disk is full, or the answers are of other shapes than those before.
        """
        packed = list(map(self.codec.pack, answers))
        self._made(packed[0]).write_shard(view, shard, *packed)

    def narrowed(self, answers: Answers) -> dict[str, Tensor]:
        """Answers on the host, in no more memory than they need there until they are written."""
        return self.codec.narrow(answers)

    def unfinished(self) -> list[tuple[int, int]]:
        """The views and shards that are not complete."""
        if self._records is not None:
            return self._records.unfinished()
        shards = -(-self._plan["samples"] // self.shard_size)
        return [(view, shard) for view in range(self._plan["views"]) for shard in range(shards)]

    def samples_of(self, shard: int) -> range:
        """The samples in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self._plan["samples"]))

    @property
    def fills(self) -> bool:
        """Whether a training adds to the store; one that only reads leaves all files as they are."""
        return self.fill == "online" and self.networks is not None and not (self._only_reads or self.is_read_only)

    @property
    def is_complete(self) -> bool:
        """Whether every view of every sample is known."""
        return self._records is not None and not self._records.unfinished()

    @property
    def answers(self) -> int:
        """Samples and views that are known, of those that `finish` has made readable."""
        return 0 if self._records is None else self._records.known()

    @property
    def wanted(self) -> int:
        """Samples and views that there are, once `begin` was called."""
        return int(self._plan.get("samples", 0) * self._plan.get("views", 0))

    @property
    def nbytes(self) -> int:
        """Bytes of one sample and view."""
        return 0 if self._records is None else self._records.record_bytes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one sample's answers, by name, as a store that is there tells them.

        Raises:
            InputError: there is none.
        """
        header = read_header(self.path)
        fields = [field.as_plain() for field in read_fields(self.path, header)]
        return shapes(fields, header["made_by"]["num_classes"])

    def feature_shapes(self) -> list[tuple[int, ...]]:
        """Shapes ``(1, C, H, W)`` of the teachers' features, in the teachers' order.

        Raises:
            InputError: there is no store, or none of features.
        """
        found = self.shapes()
        names = feature_names(found)
        if not names:
            raise InputError(f"the store {self.path} holds no feature maps: give one that this method has filled")
        return [(1, *found[name]) for name in names]

    # Records and keys

    def _made(self, packed: Mapping[str, NDArray[Any]]) -> ShardedRecords:
        """The records, of what is first kept in them."""
        if not self._plan:
            raise RuntimeError("TeacherStore.begin was not called")
        if self._records is None:
            return self._make([Field(name, str(rows.dtype), rows.shape[1:]) for name, rows in packed.items()])
        return self._records

    def _make(self, fields: list[Field]) -> ShardedRecords:
        self._records = ShardedRecords(
            self.path,
            samples=self._plan["samples"],
            views=self._plan["views"],
            fields=fields,
            shard_size=self.shard_size,
            made_by=self._plan["made_by"],
            compare={"data": _compare_data},
        )
        self._records.create()
        return self._records

    def _keep(self, index: NDArray[np.int64], view: NDArray[np.int64], known: NDArray[np.bool_], packed: Rows) -> None:
        records = self._made(packed)
        for number in np.unique(view[~known]):
            chosen = ~known & (view == number)
            if int(number) not in self._new:
                records.mend_log(int(number), self._rank)
                self._new.add(int(number))
            records.append(
                int(number), self._rank, index[chosen], {name: rows[chosen] for name, rows in packed.items()}
            )

    def _unpacked(self, rows: Rows, device: torch.device | str) -> dict[str, Tensor]:
        return self.codec.unpack(rows, self._plan["made_by"].get("num_classes"), device)

    def _keys(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if batch.key is None:
            raise InputError(
                "a TeacherStore needs to know which sample is which, and the batches have no index: wrap the data in "
                "IndexedDataModule(datamodule)"
            )
        index = batch.key.index.cpu().numpy().astype(np.int64, copy=False)
        if batch.key.view is not None:
            return index, batch.key.view.cpu().numpy().astype(np.int64, copy=False)
        if self._plan.get("views") != 1:
            raise InputError(
                "a TeacherStore of several views needs batches that tell the view of each sample: give the data module "
                "views=1, or yield Batch(..., view=...)"
            )
        return index, np.zeros_like(index)

    def _unknown(self, index: NDArray[np.int64], view: NDArray[np.int64], known: NDArray[np.bool_]) -> InputError:
        row = int(np.flatnonzero(~known)[0])
        where = f"view {view[row]} of sample {index[row]}"
        if self._records is None:
            return InputError(
                f"there is no store in {self.path} and there are no teachers to fill it: give networks, or the path of "
                "a filled store"
            )
        shard = int(index[row]) // self.shard_size
        state = self._records.state_of(int(view[row]), shard)
        return InputError(
            f"the store {self.path} does not know {where} ({self._records.path_of(int(view[row]), shard).name} is "
            f"{state}): fill it with 'distill-lightning record', or give teachers and fill='online'"
        )


def _compare_data(found: Any, wanted: Any) -> str:
    """In what the data differ, as `differences` says it; their number is compared by itself."""
    if not isinstance(wanted, Mapping):
        # What a data module of one's own says of itself.
        return "" if found == wanted else f"is {found}, not {wanted}"
    if not isinstance(found, Mapping):
        return "has no fingerprint that this version reads"
    difference = "" if found.get("count") != wanted["count"] else data_difference(found, wanted)
    return f"has {difference}" if difference else ""
