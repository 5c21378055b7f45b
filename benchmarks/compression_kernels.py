"""What compression saves of three networks: bytes of files that are read again, and time, against limits.

    python -m benchmarks.compression_kernels

writes ``benchmarks/results/compression/kernels.json`` and ``kernels.md``; 5 minutes on one core. The networks have
random weights, which decide neither bytes nor time. Dense and compressed take turns in one process with one thread. A
ratio of times goes by the batch size at which it is worst. A limit that does not hold is reported with the profile of
both networks. ``--small`` runs everything on tiny networks, ``--only`` one of the three.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import onnxruntime
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from distill_lightning.compression.access.batch_sizes import at_batch
from distill_lightning.compression.access.computed import computed, original_of
from distill_lightning.compression.access.weights import weight_names
from distill_lightning.compression.file.format import read_packed, write_packed
from distill_lightning.compression.file.packed import Packed, pack_dense, pack_stored
from distill_lightning.compression.onnx.export import export_onnx
from distill_lightning.compression.onnx.int8 import quantize_onnx
from distill_lightning.compression.report.claims import claim_of
from distill_lightning.compression.report.measure_stage import measure_stage
from distill_lightning.compression.report.report import LEGEND, circumstances
from distill_lightning.compression.report.stage import Stage
from distill_lightning.compression.shrink.attention import convert_attention
from distill_lightning.compression.shrink.channels import channel_groups
from distill_lightning.compression.shrink.groups import Group, shrink
from distill_lightning.compression.shrink.recurrent import in_blocks, unit_groups
from distill_lightning.compression.shrink.sizes import set_sizes, sizes_of
from distill_lightning.compression.shrink.transformer import head_groups, neuron_groups
from distill_lightning.compression.values.codebook import share_weights
from distill_lightning.compression.values.quantizer import quantize_weights
from distill_lightning.compression.values.scheme import Scheme
from distill_lightning.networks import SmallResNet
from distill_lightning.networks.weights import load_strictly

RESULTS = Path(__file__).parent / "results/compression"
VOCABULARY, LENGTH, CLASSES = 200, 64, 10
BUSY = 0.5  # of the system's load for each core, beyond which times say little


class LanguageModel(nn.Module):
    """Two LSTM layers between an embedding and the next token's logits ``(N, T, V)``.

    Args:
        hidden: units of a layer; the embedding has half as many features.
    """

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden // 2)
        self.rnn = nn.LSTM(hidden // 2, hidden, 2, batch_first=True)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of tokens ``(N, T)``."""
        logits: Tensor = self.head(self.rnn(self.embedding(tokens))[0])
        return logits


class Encoder(nn.Module):
    """A Transformer encoder of two layers that classifies token sequences.

    Args:
        size: features of a token; 4 heads, and four times as many neurons.
    """

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size)
        layer = nn.TransformerEncoderLayer(size, 4, 4 * size, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(size, CLASSES)
        # The encoder begins with copies of one layer, which an ONNX file would store once.
        for module in self.encoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.xavier_uniform_(module.in_proj_weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(N, K)`` of tokens ``(N, T)``."""
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)).mean(1))
        return logits


@dataclass(frozen=True)
class Gate:
    """A ratio that must not exceed a limit."""

    network: str
    what: str
    ratio: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the ratio is within the limit."""
        return self.ratio <= self.limit


@dataclass(frozen=True)
class Subject:
    """A network that is compressed.

    Args:
        name: as the tables have it.
        build: makes it, dense.
        inputs: example inputs.
        batch_sizes: at which time is measured.
        int8: how ONNX Runtime quantizes it.
        ways: by name, what makes a compressed one of a copy.
        limits: by way: what is limited, and to how much of dense.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Tensor
    batch_sizes: tuple[int, ...]
    int8: Literal["static", "dynamic"]
    ways: Mapping[str, Callable[[nn.Module, Tensor], object]]
    limits: Mapping[str, Mapping[str, float]]


def write(network: nn.Module, path: Path) -> None:
    """Codes of quantized weights, indices of shared ones, every other tensor as it is, and the sizes of the layers."""
    tensors: dict[str, Packed] = {}
    for name, module in network.named_modules():
        if "parametrizations" in name:
            continue
        prefix = f"{name}." if name else ""
        own = {key: value for key, value in module.state_dict().items() if "." not in key}
        tensors |= {prefix + key: pack_dense(value) for key, value in own.items()}
        for key, entry in computed(module).items():
            stored = entry.stored(original_of(module, key))
            if stored is not None:
                tensors[prefix + key] = pack_stored(stored)[0]
    write_packed(path, tensors, {"sizes": sizes_of(network)})


def reader(build: Callable[[], nn.Module]) -> Callable[[Path], nn.Module]:
    """What reads a file by `write`, with the network's own constructor."""

    def read(path: Path) -> nn.Module:
        header, tensors = read_packed(path)
        network = set_sizes(build(), header["sizes"])
        load_strictly(network, tensors, source=str(path))
        return network

    return read


def half_channels(network: nn.Module, images: Tensor) -> None:
    """Remove the half of each group of channels whose weights are smallest."""
    _shrink_half(network, channel_groups(network, images))


def half_units(network: nn.Module, tokens: Tensor) -> None:
    """Remove every other hidden unit of each layer."""
    for group in unit_groups(network, tokens):
        rnn: Any = network.get_submodule(group.name)
        blocks = [range(0, rnn.hidden_size, 2)] * rnn.num_layers
        shrink(network, {group: in_blocks(network, group, blocks)})


def half_heads_and_neurons(network: nn.Module, _tokens: Tensor) -> None:
    """Remove the half of the heads and of the feed-forward neurons whose weights are smallest."""
    convert_attention(network)
    _shrink_half(network, [*head_groups(network), *neuron_groups(network)])


def four_bits(network: nn.Module, _inputs: Tensor) -> None:
    """Quantize every weight to 4 bits for each channel."""
    for layer in _layers(network):
        quantize_weights(layer, scheme=Scheme(bits=4))


def sixteen_values(network: nn.Module, _inputs: Tensor) -> None:
    """Let the weights of every layer share 16 values."""
    for layer in _layers(network):
        share_weights(layer, k=16)


def unchanged(_network: nn.Module, _inputs: Tensor) -> None:
    """Leave it to ONNX Runtime."""


def _layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if weight_names(module)]


def _shrink_half(network: nn.Module, groups: Sequence[Group]) -> None:
    values = {name: parameter.detach().square() for name, parameter in network.named_parameters()}
    keep = {
        group: sorted(group.scores(network, values).topk(max(1, group.size // 2)).indices.tolist()) for group in groups
    }
    shrink(network, keep)


def subjects(*, small: bool) -> list[Subject]:
    """The three networks.

    Args:
        small: tiny ones in their place, to see that everything runs.
    """
    tokens = torch.randint(VOCABULARY, (4, LENGTH))
    side = 16 if small else 64

    def resnet() -> nn.Module:
        if small:
            return SmallResNet(CLASSES, in_channels=3)
        network: nn.Module = torchvision.models.resnet18(num_classes=CLASSES)
        return network

    return [
        Subject(
            "ResNet-18",
            resnet,
            torch.randn(4, 3, side, side),
            (4,),
            "static",
            {
                "int8": unchanged,
                "half the channels": half_channels,
                "4 bits": four_bits,
                "16 shared values": sixteen_values,
            },
            {
                "int8": {"int8 ONNX bytes": 0.30, "time in ONNX Runtime": 0.65},
                "half the channels": {"parameters": 0.30, "MACs": 0.30, "bytes": 0.30, "time": 0.60},
                "4 bits": {"bytes": 0.16},
                "16 shared values": {"bytes": 0.15},
            },
        ),
        Subject(
            "LSTM language model",
            lambda: LanguageModel(32 if small else 256),
            tokens,
            (1, 32),
            "dynamic",
            {"int8": unchanged, "half the hidden units": half_units},
            {"int8": {"int8 ONNX bytes": 0.30}, "half the hidden units": {"bytes": 0.35, "time": 0.60}},
        ),
        Subject(
            "Transformer encoder",
            lambda: Encoder(32 if small else 128),
            tokens,
            (1, 32),
            "dynamic",
            {"int8": unchanged, "half the heads and neurons": half_heads_and_neurons},
            {"int8": {"int8 ONNX bytes": 0.32}, "half the heads and neurons": {"parameters": 0.60, "time": 0.75}},
        ),
    ]


def measure(subject: Subject, *, rounds: int) -> Iterator[tuple[Stage, nn.Module]]:
    """The dense network and every compressed one, each with its stage."""
    torch.manual_seed(0)
    dense = subject.build().eval()
    options = {"scores": {}, "write": write, "read": reader(subject.build), "rounds": rounds}
    calibration = [torch.randn_like(subject.inputs) for _ in range(4)] if subject.int8 == "static" else None
    options["batch_sizes"] = subject.batch_sizes
    yield (
        measure_stage("dense", dense, dense, subject.inputs, kind="dense", onnx="float", **options),
        dense,
    )
    for name, way in subject.ways.items():
        network = copy.deepcopy(dense)
        way(network, subject.inputs)
        onnx = subject.int8 if name == "int8" else "none"
        stage = measure_stage(
            name, network, dense, subject.inputs, kind="after", onnx=onnx, calibration=calibration,
            weight_bits=4 if name in ("4 bits", "16 shared values") else None, **options,
        )  # fmt: skip
        yield stage, network


def ratio_of(what: str, stage: Stage, dense: Stage) -> float:
    """A limited quantity of a stage as a part of dense's; a time at the batch size where it is worst."""
    runtime = {"time": "torch", "time in ONNX Runtime": "onnxruntime int8"}.get(what)
    if runtime is not None:
        return max(row.ratio for row in stage.latency if row.is_alike and row.runtime == runtime)
    return {
        "parameters": lambda: stage.parameters / dense.parameters,
        "MACs": lambda: stage.macs / dense.macs,
        "bytes": lambda: stage.nbytes["artefact"] / dense.nbytes["artefact"],
        "int8 ONNX bytes": lambda: stage.nbytes["onnx_int8"] / dense.nbytes["onnx"],
    }[what]()


def profile(subject: Subject, what: str, dense: nn.Module, network: nn.Module) -> dict[str, dict[str, float]]:
    """Where the time of both networks goes: milliseconds a forward, by operation, the ten longest."""
    inputs = at_batch(subject.inputs, subject.batch_sizes[-1])
    if what == "time in ONNX Runtime":
        with tempfile.TemporaryDirectory() as folder:
            exact, int8 = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
            export_onnx(dense, exact, inputs)
            quantize_onnx(exact, int8, mode=subject.int8, batches=[inputs] if subject.int8 == "static" else None)
            return {"dense": _onnx_profile(exact, inputs), "compressed": _onnx_profile(int8, inputs)}
    return {"dense": _torch_profile(dense, inputs), "compressed": _torch_profile(network, inputs)}


def _torch_profile(network: nn.Module, inputs: Tensor, *, forwards: int = 20) -> dict[str, float]:
    network.eval()
    with torch.inference_mode():
        network(inputs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(forwards):
                network(inputs)
    times = {event.key: event.self_cpu_time_total / 1000 / forwards for event in profiler.key_averages()}
    return _longest(times)


def _onnx_profile(path: Path, inputs: Tensor, *, forwards: int = 20) -> dict[str, float]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(forwards):
        session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    times: Counter[str] = Counter()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node":
            times[event["args"]["op_name"]] += event["dur"] / 1000 / forwards
    return _longest(times)


def _longest(times: Mapping[str, float]) -> dict[str, float]:
    ordered = sorted(times.items(), key=lambda entry: -entry[1])
    return {name: round(value, 4) for name, value in ordered[:10]}


def table_rows(stages: Sequence[Stage]) -> list[list[str]]:
    """A header and a row for each compressed network."""
    dense, *others = stages
    rows = [["", "parameters", "MACs", "artefact", "int8 ONNX", "what is saved"]]
    for stage in others:
        int8 = stage.nbytes.get("onnx_int8")
        rows.append(
            [
                stage.name, f"{stage.parameters / dense.parameters:.3f}", f"{stage.macs / dense.macs:.3f}",
                f"{stage.nbytes['artefact'] / dense.nbytes['artefact']:.3f}",
                f"{int8 / dense.nbytes['onnx']:.3f}" if int8 else "", claim_of(dense, stage),
            ]
        )  # fmt: skip
    return rows


def gate_rows(gates: Sequence[Gate]) -> list[list[str]]:
    """A header and a row for each limit."""
    rows = [
        [gate.network, gate.what, f"{gate.ratio:.3f}", f"{gate.limit:.2f}", "yes" if gate.holds else "NO"]
        for gate in gates
    ]
    return [["network", "ratio to dense of", "measured", "at most", "holds"], *rows]


def markdown(content: Mapping[str, Any], tables: Mapping[str, list[list[str]]]) -> str:
    """The page of the results."""
    parts = ["# What compression saves", "\n".join(f"- {key}: {value}" for key, value in content["about"].items())]
    parts += [f"## {title}\n\n{_as_markdown(rows)}" for title, rows in tables.items()]
    if content["profiles"]:
        parts.append("## Where the time goes, of what does not hold, ms a forward")
        parts += [f"- {name}: {found}" for name, found in content["profiles"].items()]
    return "\n\n".join([*parts, f"Ratios to dense. {LEGEND}"]) + "\n"


def _as_markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *body])


def _print(console: Console, title: str, rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write.

    Args:
        arguments: of the command line; ``None``: the process's.

    Returns:
        What is written as JSON.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of kernels.json and kernels.md")
    parser.add_argument("--rounds", type=int, default=100, help="turns of each pair")
    parser.add_argument("--only", action="append", default=[], help="name of a network; several are possible")
    parser.add_argument("--small", action="store_true", help="tiny networks, to see that everything runs")
    given = parser.parse_args(arguments)
    # The dense networks' own kernels are asked for nothing else meanwhile.
    torch.set_num_threads(1)
    console = Console(width=140)
    before = os.getloadavg()[0]
    told = sys.argv[1:] if arguments is None else arguments
    about = {
        "command": f"python -m benchmarks.compression_kernels {shlex.join(told)}".strip(),
        "date": time.strftime("%Y-%m-%d"),
        **circumstances(),
    }
    content: dict[str, Any] = {"about": about, "gates": [], "profiles": {}, "stages": {}}
    gates: list[Gate] = []
    tables: dict[str, list[list[str]]] = {}
    for subject in subjects(small=given.small):
        if given.only and subject.name not in given.only:
            continue
        measured = {stage.name: (stage, network) for stage, network in measure(subject, rounds=given.rounds)}
        stages = [stage for stage, _ in measured.values()]
        content["stages"][subject.name] = [stage.as_plain() for stage in stages]
        for way, limits in subject.limits.items():
            stage, network = measured[way]
            for what, limit in limits.items():
                gate = Gate(subject.name, f"{way}: {what}", ratio_of(what, stage, stages[0]), limit)
                gates.append(gate)
                if not gate.holds and what.startswith("time"):
                    found = profile(subject, what, measured["dense"][1], network)
                    content["profiles"][f"{gate.network}, {gate.what}"] = found
        tables[subject.name] = table_rows(stages)
        _print(console, subject.name, tables[subject.name])
    after = os.getloadavg()[0]
    about["load before and after"] = f"{before:.2f}, {after:.2f}"
    content["gates"] = [{**asdict(gate), "holds": gate.holds} for gate in gates]
    tables = {"Limits": gate_rows(gates), **tables}
    _print(console, "Limits", tables["Limits"])
    for name, found in content["profiles"].items():
        console.print(f"{name}, ms a forward: {found}")
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "kernels.json").write_text(json.dumps(content, indent=1) + "\n")
    (given.output / "kernels.md").write_text(markdown(content, tables))
    # One of the load is this process.
    if before > BUSY * (os.cpu_count() or 1):
        console.print(f"The machine was busy before (load {before:.2f}): these times are not to be kept.")
    console.print(f"Written: {given.output}")
    return content


if __name__ == "__main__":
    main()
