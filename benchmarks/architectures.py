"""Half of the channels of many networks: which lose them and compute the same as with these at zero.

    python -m benchmarks.architectures

writes ``benchmarks/results/architectures.json`` and ``architectures.md``. Networks of torchvision, timm and
transformers without weights lose half of the channels (of CNNs) or of the heads and neurons (of Transformers), as far
as these can be removed, with `PruneUnits` and beside it with Torch-Pruning's ``MagnitudePruner``. Each runs in a
process of its own, which is ended after ``--limit`` seconds of processor time. Ours *works* if something was removed
and the outputs are those of the network with the same weights at zero, to 1e-5 of the largest. Torch-Pruning has no
masks to compare with, so there it is enough that something was removed and the outputs have the same shape.

What has run is kept in ``--runs``; ``--again refused crashed`` runs those that ended so once more. ``--small`` tries
few and small networks.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import multiprocessing
import resource
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import CLASSES, NAMES, build
from distill_lightning.compression.costs.macs import count_macs
from distill_lightning.compression.costs.parameters import count_parameters
from distill_lightning.compression.run.compressor import Compressor
from distill_lightning.compression.steps import units
from distill_lightning.compression.steps.prune_units import PruneUnits
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.errors import InputError
from distill_lightning.pages import machine, markdown_table

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("ours", "torch_pruning")
SMALL = ["torchvision squeezenet1_1", "timm test_resnet", "transformers bert"]
AMOUNT = 0.5
EQUAL = 1e-5
Row = dict[str, Any]


def prune(name: str) -> Row:
    """Remove half of a network's units with `PruneUnits`, and compare with the same units masked."""
    network, inputs = build(name)
    begin = time.process_time()
    step = PruneUnits(unit="channel", amount=AMOUNT, scope="layer")
    small = copy.deepcopy(network)
    try:
        Compressor(small, [step], inputs).apply()
    except InputError as error:
        return {"status": "refused", "why": str(error), "seconds": time.process_time() - begin}
    seconds = time.process_time() - begin
    masked = _masked(network, inputs)
    difference = _difference(masked, small, inputs)
    if difference > EQUAL:
        # In single precision a deep network's rounding may be more than that.
        precise = tuple(value.double() if value.is_floating_point() else value for value in inputs)
        difference = _difference(masked.double(), copy.deepcopy(small).double(), precise)
    row = {"status": "works" if difference <= EQUAL else "differs", "difference": difference, "seconds": seconds}
    return row | _left(network, small, inputs)


def _masked(network: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """A copy of the network with the units at zero that `PruneUnits` removes."""
    masked = copy.deepcopy(network)
    piece = Workpiece(masked, inputs)
    families = units.find_families(piece, "channel", targets=None, exclude=())
    scores = units.score_units(piece, families, "magnitude")
    kept = units.choose_units(families, scores, AMOUNT, scope="layer", relative=True)
    with torch.no_grad():
        for path, mask in units.unit_masks(masked, families, kept).kept.items():
            masked.get_parameter(path).masked_fill_(~mask, 0)
    return masked


@torch.no_grad()
def _difference(one: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """The largest difference of two networks' outputs, as a part of the largest output."""
    first, second = _output(one.eval()(*inputs)), _output(other.eval()(*inputs))
    if first.shape != second.shape:
        return float("inf")
    largest = float((first - second).abs().max() / first.abs().max())
    return largest if largest == largest else float("inf")  # noqa: PLR0124  # not a number


def _output(output: Any) -> Tensor:
    """The first tensor that a network returns."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output


def _left(network: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...]) -> Row:
    """The shares of the parameters and multiply-accumulates that are left."""
    parameters, macs = (
        [of(one) for one in (small, network)]
        for of in (lambda n: count_parameters(n).stored, lambda n: count_macs(n, inputs).dense)
    )
    return {"parameters": parameters[0] / parameters[1], "macs": macs[0] / macs[1]}


def prune_with_torch_pruning(name: str) -> Row:
    """Remove half of a network's channels with Torch-Pruning, but none of the classifier's outputs."""
    network, inputs = build(name)
    library = importlib.import_module("torch_pruning")
    begin = time.process_time()
    small = copy.deepcopy(network)
    ends = [layer for layer in small.modules() if _channels(layer) == CLASSES]
    pruner = library.pruner.MagnitudePruner(
        small, inputs if len(inputs) > 1 else inputs[0], importance=library.importance.MagnitudeImportance(p=2),
        pruning_ratio=AMOUNT, ignored_layers=ends,
    )  # fmt: skip
    pruner.step()
    with torch.no_grad():
        one, other = _output(network(*inputs)), _output(small.eval()(*inputs))
    row = _left(network, small, inputs) | {"seconds": time.process_time() - begin}
    if one.shape != other.shape:
        return {"status": "differs", "why": f"outputs of shape {tuple(other.shape)}"} | row
    return {"status": "works" if row["parameters"] < 1 else "removes nothing"} | row


def _channels(layer: nn.Module) -> Any:
    return getattr(layer, "out_features", getattr(layer, "out_channels", None))


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
    refused = [f"- {name}: {found['ours']['why']}" for name, found in results.items() if "why" in found["ours"]]
    return "\n\n".join([
        "# Half of the channels of many networks",
        about,
        markdown_table(summary(results)).strip(),
        "Shares of parameters and multiply-accumulates that are left. Ours works if the outputs are those of the "
        "network with the same weights at zero; of Torch-Pruning only the outputs' shape is asked.",
        markdown_table(rows).strip(),
        *(["## What ours does not do, and why", "\n".join(refused)] if refused else []),
    ]) + "\n"  # fmt: skip


def summary(results: Mapping[str, Mapping[str, Row]]) -> list[list[str]]:
    """How many networks ended how, and how much both leave where both work."""
    counts = {library: Counter(found[library]["status"] for found in results.values()) for library in LIBRARIES}
    both = [found for found in results.values() if all(found[library]["status"] == "works" for library in LIBRARIES)]
    statuses = dict.fromkeys(["works", *counts["ours"], *counts["torch_pruning"]])
    rows = [["", "ours", "Torch-Pruning"]]
    rows += [[status, *(str(counts[library][status]) for library in LIBRARIES)] for status in statuses]
    more = [
        str(sum(found[one]["parameters"] > found[other]["parameters"] + 0.01 for found in both))
        for one, other in (LIBRARIES, LIBRARIES[::-1])
    ]
    rows.append([f"leaves over a point more parameters, of {len(both)} where both work", *more])
    alone = [
        str(sum(found[one]["status"] == "works" != found[other]["status"] for found in results.values()))
        for one, other in (LIBRARIES, LIBRARIES[::-1])
    ]
    return [*rows, ["works, and the other does not", *alone]]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is missing, print and write.

    Args:
        arguments: of the command line; ``None``: the process's.

    Returns:
        What is written as JSON.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=NAMES, help="names of networks, as in the table")
    parser.add_argument(
        "--libraries", nargs="*", choices=LIBRARIES, default=LIBRARIES, help="which run what is missing"
    )
    parser.add_argument("--limit", type=float, default=20, help="seconds for a network and library")
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
    told = sys.argv[1:] if arguments is None else arguments
    content: dict[str, Any] = {
        "about": {
            "command": f"python -m benchmarks.architectures {shlex.join(told)}".strip(),
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
