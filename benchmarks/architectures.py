"""Half of the channels of many networks: which lose them and compute the same as with these at zero.

    python -m benchmarks.architectures

writes ``benchmarks/results/architectures.json`` and ``architectures.md``. It needs torchvision, timm, transformers and
torch-pruning; their networks, without weights, lose half of their channels, among which are Transformers' heads and
neurons, as far as these can be removed, with `PruneUnits` and beside it with Torch-Pruning's ``MagnitudePruner``.
Each runs with each in a process of its own, which is ended after ``--limit`` seconds of processor time. What both do
with a network is one of:

- works: something was removed, and the outputs are those of the network with the same weights at zero, to 1e-5 of the
  largest
- silent change: something was removed, and the outputs are others
- other shape: so are their shapes
- removes nothing
- refused: with the reason (ours only)
- crashed: with the error
- over the limit

What has run is kept in ``--runs``, so the same command goes on where it was stopped; ``--again refused crashed`` runs
those that ended so once more. ``--small`` tries few and small networks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import resource
import shlex
import signal
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.networks import NAMES
from benchmarks.pruned import AMOUNT, RAN, SILENT, WORKS, Row, prune, prune_with_torch_pruning
from distill_lightning.pages import machine, markdown_table

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("ours", "torch_pruning")
SMALL = ["torchvision squeezenet1_1", "timm test_resnet", "transformers bert"]
# Leaves over a point more of the parameters than the other.
POINT = 0.01
_WAYS = {"ours": prune, "torch_pruning": prune_with_torch_pruning}


def measure(library: str, name: str, *, limit: float) -> Row:
    """What becomes of a network, in a process of its own that is ended after ``limit`` seconds of processor time.

    The process is a fork, so the libraries' import does not count; nor does what else the machine computes.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, library, name, math.ceil(limit)))
    process.start()
    theirs.close()
    try:
        row: Row = ours.recv()
    except EOFError:
        process.join()
        over = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        row = {"status": "over the limit"} if over else {"status": "crashed", "why": f"exit code {process.exitcode}"}
    process.join()
    return row


def _send(pipe: Any, library: str, name: str, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    try:
        row = _WAYS[library](name)
    except Exception as error:  # whatever it is, it is the result
        why = (str(error) or type(error).__name__).splitlines()[0]
        row = {"status": "crashed", "why": f"{type(error).__name__}: {why}"}
    pipe.send(row)


def run(runs: Path, library: str, name: str, *, limit: float, again: Sequence[str]) -> Row:
    """`measure`, or what it has found before; nothing is measured without a limit."""
    path = runs / library / f"{name.replace(' ', '-')}.json"
    if path.exists():
        row: Row = json.loads(path.read_text())
        if row["status"] not in again:
            return row
    if not limit:
        return {"status": "not run"}
    row = measure(library, name, limit=limit)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row))
    told = f"{library:14}{name:48}{row['status']:16}{row.get('parameters', 0):6.2f}"
    print(told, row.get("why", "")[:160], flush=True)
    return row


def markdown(content: Mapping[str, Any]) -> str:
    """The page of the results."""
    results: dict[str, dict[str, Row]] = content["results"]
    about = "\n".join(f"- {key}: {value}" for key, value in content["about"].items())
    rows = [["network", "ours", "parameters", "MACs", "s", "Torch-Pruning", "parameters", "MACs", "s"]]
    for name, found in results.items():
        cells = [name]
        for library in LIBRARIES:
            row = found[library]
            shares = [f"{row[key]:.2f}" if key in row else "" for key in ("parameters", "macs")]
            cells += [row["status"], *shares, f"{row['seconds']:.1f}" if "seconds" in row else ""]
        rows.append(cells)
    ours, theirs = LIBRARIES
    lists = {
        "What Torch-Pruning does and ours does not": [
            f"{name}: {found[theirs]['status']}, {found[theirs]['parameters']:.2f} of the parameters left"
            for name, found in results.items()
            if _ran(found[theirs]) and found[ours]["status"] != WORKS
        ],
        "Where ours leaves over a point more of the parameters": [
            f"{name}: {found[ours]['parameters']:.2f}, Torch-Pruning {found[theirs]['parameters']:.2f}"
            for name, found in both(results).items()
            if leaves_more(found, ours, theirs)
        ],
        **{
            f"What {whose} does not do, and why": [
                f"{name}: {textwrap.shorten(found[library]['why'], 300, placeholder=' ...')}"
                for name, found in results.items()
                if "why" in found[library]
            ]
            for library, whose in zip(LIBRARIES, ("ours", "Torch-Pruning"), strict=True)
        },
    }
    return "\n\n".join([
        "# Half of the channels of many networks",
        about,
        markdown_table(summary(results)).strip(),
        "Shares of parameters and multiply-accumulates that are left. Works: the outputs are those of the network with "
        "the same weights at zero, to 1e-5 of the largest; silent change: they are others, of the same shape. "
        "Torch-Pruning normalises over the features that are left, which is meant to be another function.",
        markdown_table(rows).strip(),
        *(f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) for title, lines in lists.items() if lines),
    ]) + "\n"  # fmt: skip


def summary(results: Mapping[str, Mapping[str, Row]]) -> list[list[str]]:
    """How many networks ended how, and how much both leave where both remove something."""
    counts = {library: Counter(found[library]["status"] for found in results.values()) for library in LIBRARIES}
    statuses = dict.fromkeys([WORKS, SILENT, *counts["ours"], *counts["torch_pruning"]])
    listed = {name: found for name, found in results.items() if not name.startswith("transformers ")}
    pairs, shared = (LIBRARIES, LIBRARIES[::-1]), both(results).values()
    rows = [["", "ours", "Torch-Pruning"]]
    rows += [[status, *(str(counts[library][status]) for library in LIBRARIES)] for status in statuses]
    for title, counted in (
        (
            f"works, of the {len(listed)} of torchvision and timm",
            [sum(found[library]["status"] == WORKS for found in listed.values()) for library in LIBRARIES],
        ),
        (
            f"leaves over a point more parameters, of {len(shared)} where ours works and Torch-Pruning runs",
            [sum(leaves_more(found, *pair) for found in shared) for pair in pairs],
        ),
        (
            "works, and the other does not even run",
            [
                sum(found[one]["status"] == WORKS and not _ran(found[other]) for found in results.values())
                for one, other in pairs
            ],
        ),
    ):
        rows.append([title, *map(str, counted)])
    return rows


def both(results: Mapping[str, Mapping[str, Row]]) -> dict[str, Mapping[str, Row]]:
    """The networks with which ours works, and with which Torch-Pruning removes something and runs."""
    return {
        name: found
        for name, found in results.items()
        if found["ours"]["status"] == WORKS and _ran(found["torch_pruning"])
    }


def leaves_more(found: Mapping[str, Row], one: str, other: str) -> bool:
    """Whether one library leaves over a point more of the parameters than the other."""
    more: bool = found[one]["parameters"] > found[other]["parameters"] + POINT
    return more


def _ran(row: Row) -> bool:
    return row["status"] in RAN


def command(given: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """How this was run, without the folders, which are of this machine."""
    told = ["python", "-m", "benchmarks.architectures"]
    for name, value in vars(given).items():
        if name in ("output", "runs") or value == parser.get_default(name):
            continue
        told += [
            f"--{name}",
            *([] if value is True else map(str, value) if isinstance(value, list) else [f"{value:g}"]),
        ]
    return shlex.join(told)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing, print and write.

    Args:
        arguments: of the command line; ``None``: the process's.

    Returns:
        What is written as JSON.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=NAMES, help="names of networks, as in the table: 'timm resnet18'")
    parser.add_argument(
        "--libraries", nargs="*", choices=LIBRARIES, default=LIBRARIES, help="which run what is missing"
    )
    parser.add_argument("--limit", type=float, default=20, help="seconds of processor time for a network and library")
    parser.add_argument("--again", nargs="+", default=[], metavar="STATUS", help="run those that ended so once more")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of architectures.json and .md")
    parser.add_argument("--runs", type=Path, default=Path("results/architectures"), help="folder of finished runs")
    parser.add_argument("--small", action="store_true", help="three small networks, to see that everything runs")
    given = parser.parse_args(arguments)
    # Networks of one image gain nothing from a second one; and a fork must not have any.
    torch.set_num_threads(1)
    for library in ("timm", "transformers", "torch_pruning"):
        importlib.import_module(library)
    results = {
        name: {
            library: run(
                given.runs, library, name, again=given.again, limit=given.limit if library in given.libraries else 0
            )
            for library in LIBRARIES
        }
        for name in (SMALL if given.small else given.only)
    }  # fmt: skip
    content: dict[str, Any] = {
        "about": {
            "command": command(given, parser),
            "date": time.strftime("%Y-%m-%d"),
            **machine("torchvision", "timm", "transformers", "torch-pruning"),
            "amount": AMOUNT,
            "limit in seconds": given.limit,
        },
        "results": results,
    }
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "architectures.json").write_text(json.dumps(content, indent=1) + "\n")
    page = markdown(content)
    (given.output / "architectures.md").write_text(page)
    print(page)
    return content


if __name__ == "__main__":
    main()
