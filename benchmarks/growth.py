"""How an epoch's time grows with the number of samples and of teachers, and what a store's reads cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import RandomImages, quiet_trainer, sgd, trained
from benchmarks.timing import Figure, stopwatch, take_turns
from distill_lightning import Batch, KDModule, SmallResNet, SupervisedModule, TeacherStore
from distill_lightning.teachers.recorder import record

_CLASSES, _BATCH_SIZE = 10, 256


def small_network(width: int, seed: int) -> SmallResNet:
    """A network for 10 classes."""
    torch.manual_seed(seed)
    return SmallResNet(_CLASSES, width=width)


def epochs(folder: Path, *, counts: tuple[int, ...], teachers: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Seconds of an epoch of a tiny student on 8x8 images, whose own cost hides little of a store's.

    Args:
        folder: for the stores.
        counts: numbers of samples, with 2 teachers.
        teachers: numbers of teachers, with the second of ``counts``.
        rounds: epochs that are measured.

    Returns:
        One row for each: ``samples``, ``teachers``, and the figures of plain training (``alone``), of KD with a full
        store (``store``) and with its teachers at work (``online``).
    """
    cases = [(count, 2) for count in counts] + [(counts[1], number) for number in teachers if number != 2]
    rows = []
    for count, number in cases:
        data = RandomImages(count, size=8, channels=1, classes=_CLASSES, batch_size=_BATCH_SIZE)
        frozen = [small_network(4, seed) for seed in range(1, number + 1)]
        path = folder / f"growth_{count}_{number}"
        options: dict[str, Any] = {"num_classes": _CLASSES, "optimizer": sgd}
        record(quiet_trainer(), KDModule(small_network(2, 0), TeacherStore(path, frozen), **options), data)
        modules = {
            "alone": SupervisedModule(small_network(2, 0), **options),
            "store": KDModule(small_network(2, 0), TeacherStore(path, fill="never"), **options),
            "online": KDModule(small_network(2, 0), frozen, **options),
        }
        measured = take_turns({name: trained(module, data) for name, module in modules.items()}, rounds=rounds)
        steps = -(-count // _BATCH_SIZE)
        figures = {name: Figure.of(steps * value for value in values) for name, values in measured.items()}
        rows.append({"samples": count, "teachers": number, **figures})
    return rows


def reads(path: Path, *, samples: int, classes: int, top_k: int, rounds: int) -> dict[str, Any]:
    """Samples that a top-k store reads in a second, in batches of 256 in a random order, and what they take on disk."""
    store = TeacherStore(path, top_k=top_k)
    store.begin(samples=samples, views=1, made_by={"num_classes": classes})
    generator = torch.Generator().manual_seed(0)
    for shard in range(len(store.unfinished())):
        logits = 3 * torch.randn(len(store.samples_of(shard)), classes, generator=generator)
        store.write(0, shard, {"probabilities": logits.softmax(dim=1)})
    rates = []
    for _ in range(rounds + 1):
        order = torch.randperm(samples, generator=generator)
        with stopwatch() as seconds:
            for index in order.split(_BATCH_SIZE):
                batch = Batch(index, index, index, torch.zeros_like(index))
                store.read_or_ask(batch, None, device="cpu")
        rates.append(samples / seconds())
    on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"reads_per_second": Figure.of(rates[1:]), "bytes": on_disk / samples, "samples": samples}
