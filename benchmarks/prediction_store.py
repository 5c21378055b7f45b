"""What a `PredictionStore` costs: memory, disk and seconds, by really writing, saving and loading one.

    python benchmarks/prediction_store.py            # a small one
    python benchmarks/prediction_store.py --full     # ImageNet's size; 12 GB of memory and of disk, some minutes

Rows are those of one random batch with their classes rolled, in the order of a shuffled epoch. Every case runs in
processes of its own, one that writes and one that resumes. Files that were just written are read from the page cache.
Linux alone tells a process's memory as it is asked for here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distill_lightning
from distill_lightning.storage import PredictionStore, Sidecar

RESULTS = Path(__file__).parent / "results" / "prediction_store.json"
COLUMNS = {
    "write_s": "write an epoch, s",
    "read_s": "read an epoch, s",
    "advance_s": "advance, s",
    "save_s": "save, s",
    "save_mid_epoch_s": "save mid-epoch, s",
    "load_s": "load, s",
    "anonymous": "own memory, GiB",
    "peak": "peak of both, GiB",
    "mapped": "mapped file, GiB",
    "checkpoint_bytes": "checkpoint, GiB",
    "files_bytes": "files, GiB",
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure every case, print a table and write what was measured.

    Args:
        arguments: of the command line; ``None``: the process's.

    Returns:
        What is written as JSON.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--full", action="store_true", help="1,281,167 samples of 1000 classes")
    parser.add_argument("--folder", help="for the files that are written and removed again")
    parser.add_argument("--output", type=Path, help=f"JSON; with --full {RESULTS.name} in benchmarks/results")
    parser.add_argument(
        "--here", action="store_true", help="no processes; the memory is then that of everything before"
    )
    options = parser.parse_args(arguments)
    if options.full:
        options.samples, options.classes = 1_281_167, 1000
        options.output = options.output or RESULTS
    result = {
        "samples": options.samples,
        "classes": options.classes,
        "batch": options.batch,
        "versions": {
            "distill_lightning": distill_lightning.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "cases": [
            _case(options, top_k=top_k, files=files) for top_k in (None, options.top_k) for files in (True, False)
        ],
    }
    _print(result)
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _case(options: argparse.Namespace, *, top_k: int | None, files: bool) -> dict[str, Any]:
    """A store in files, or in the checkpoint."""
    # How much else the machine had to do.
    busy = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        about = {"folder": folder, "samples": options.samples, "classes": options.classes, "top_k": top_k}
        arguments = ({**about, "files": files}, options.batch)
        if options.here:
            measured = {**training(*arguments), **resuming(*arguments)}
        else:
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                measured = {
                    name: value for step in (training, resuming) for name, value in pool.apply(step, arguments).items()
                }
    kept = "in files" if files else "in the checkpoint"
    return {"top_k": top_k, "dtype": "float16", "kept": kept, **measured, "load_average_before": busy}


def training(about: dict[str, Any], batch: int) -> dict[str, Any]:
    """An epoch that is written, one that is read and half written, and a checkpoint after each."""
    before, seconds = _memory(), dict.fromkeys(("write_s", "read_s", "advance_s", "save_s", "save_mid_epoch_s"), 0.0)
    store = _store(about)
    for index, rows in _epoch(about, batch):
        with _timed(seconds, "write_s"):
            store.write(index, rows)
    with _timed(seconds, "advance_s"):
        store.advance()
    path = Path(about["folder"]) / "end.ckpt"
    with _timed(seconds, "save_s"):
        torch.save(store.state_dict(), path)
    size, beside = path.stat().st_size, _files_bytes(about)
    for index, rows in _epoch(about, batch):
        with _timed(seconds, "read_s"):
            probs, known = store.read(index)
        if not known.all() or (about["top_k"] is None and not torch.allclose(probs, rows, atol=1e-3)):
            raise RuntimeError("the store does not read what was written")
    after = _memory()
    half = -(-about["samples"] // batch) // 2
    for number, (index, rows) in enumerate(_epoch(about, batch)):
        if number < half:
            store.write(index, rows)
    with _timed(seconds, "save_mid_epoch_s"):
        torch.save(store.state_dict(), Path(about["folder"]) / "middle.ckpt")
    memory = {name: after[name] - before[name] for name in ("anonymous", "mapped")}
    memory["peak"] = _memory()["peak"] - before["anonymous"] - before["mapped"]
    sizes = {"checkpoint_bytes": size, "files_bytes": beside, "files_mid_epoch_bytes": _files_bytes(about)}
    return {**seconds, **memory, **sizes}


def resuming(about: dict[str, Any], batch: int) -> dict[str, float]:
    """Going on from the checkpoint in the middle of the epoch."""
    seconds = {"load_s": 0.0}
    store = _store(about)
    with _timed(seconds, "load_s"):
        store.load_state_dict(torch.load(Path(about["folder"]) / "middle.ckpt", weights_only=True))
    index, rows = next(_epoch(about, batch))
    probs, known = store.read(index)
    if not known.all() or (about["top_k"] is None and not torch.allclose(probs, rows, atol=1e-3)):
        raise RuntimeError("the loaded store does not read what was written")
    return seconds


def _store(about: dict[str, Any]) -> PredictionStore:
    sidecar = Sidecar(Path(about["folder"]) / "rows") if about["files"] else None
    kind = {"dtype": torch.float16, "top_k": about["top_k"]}
    return PredictionStore(about["samples"], about["classes"], **kind, sidecar=sidecar)


def _epoch(about: dict[str, Any], batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices and rows in the order of a shuffled epoch, every time the same."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(batch, about["classes"], generator=generator) * 3).softmax(1)
    order = torch.randperm(about["samples"], generator=generator)
    for number, index in enumerate(order.split(batch)):
        yield index, rows.roll(number, dims=1)[: len(index)]


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def _memory() -> dict[str, int]:
    """Bytes of this process: its own, of files that it has mapped, and the most of both together so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"anonymous": "RssAnon", "mapped": "RssFile", "peak": "VmHWM"}
    return {name: int(lines[key].split()[0]) * 1024 for name, key in names.items()}


def _files_bytes(about: dict[str, Any]) -> int:
    return sum(path.stat().st_size for path in (Path(about["folder"]) / "rows").glob("*"))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _print(result: dict[str, Any]) -> None:
    cases = result["cases"]
    print(f"N={result['samples']:,}, K={result['classes']}, float16, batches of {result['batch']}")
    print(
        f"{'':20}"
        + "".join(f"{'dense' if case['top_k'] is None else 'top ' + str(case['top_k']):>20}" for case in cases)
    )
    print(f"{'':20}" + "".join(f"{case['kept']:>20}" for case in cases))
    for name, label in COLUMNS.items():
        scale, digits = (1, 2) if name.endswith("_s") else (2**30, 3)
        print(f"{label:20}" + "".join(f"{case[name] / scale:20.{digits}f}" for case in cases))


if __name__ == "__main__":
    main()
