"""The costs and savings of one stage of a compression run, measured."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.utils import parametrize

from distill_lightning.compression.access.batch_sizes import at_batch, check_batch
from distill_lightning.compression.access.calibration import calibrating, inputs_of, tensors_in
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.outputs import outputs_of, scale_of
from distill_lightning.compression.costs.latency import compare_latency
from distill_lightning.compression.costs.macs import Macs, count_macs
from distill_lightning.compression.costs.parameters import count_parameters
from distill_lightning.compression.onnx.export import TOLERANCE, export_onnx
from distill_lightning.compression.onnx.int8 import quantize_onnx
from distill_lightning.compression.onnx.latency import onnx_latency
from distill_lightning.compression.onnx.session import OnnxNetwork
from distill_lightning.compression.report.measure import measure_file
from distill_lightning.compression.report.stage import INT8, INT8_RUNTIME, LatencyRow, Runtime, Stage, StageKind
from distill_lightning.errors import InputError, check_one_of
from distill_lightning.layers import eval_mode
from distill_lightning.networks.weights import load_strictly, read_weights, write_weights

Onnx = Literal["none", "float", "static", "dynamic"]
Write = Callable[[nn.Module, Path], object]
"""A function that writes a network's artefact to a path."""

Read = Callable[[Path], nn.Module]
"""A function that loads an artefact as a plain network, which shares nothing with the one that was written."""

INT8_FILE = "int8.onnx"
"""Its name in the folder of `measure_stage`."""

_ONNX_FILES: dict[str, tuple[str, Runtime]] = {
    "onnx": ("float.onnx", "onnxruntime"),
    INT8: (INT8_FILE, INT8_RUNTIME),
}


def measure_stage(
    name: str,
    network: nn.Module,
    dense: nn.Module,
    example_inputs: Any,
    *,
    kind: StageKind,
    scores: Mapping[str, float],
    write: Write | None = None,
    read: Read | None = None,
    tolerance: float = 0.0,
    batch_sizes: Sequence[int] = (1, 32),
    rounds: int = 50,
    onnx: Onnx = "none",
    calibration: Iterable[Any] | None = None,
    weight_bits: int | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
    folder: Path | None = None,
) -> Stage:
    """Measure one stage: parameters, multiply-accumulates, files (which are read again) and time.

    Everything is measured on the network that ``read`` returns, which is what a user would run: it has no quantizers
    for training. Both networks are left as they were. What cannot be measured is in the stage's ``missing``, with the
    reason; this stops nothing else.

    Args:
        name: name of the row.
        network: the network at this stage, on the CPU.
        dense: the network before compression, on the CPU.
        example_inputs: a tensor, or a tuple of arguments, each with the batch as its first dimension; the samples are
            repeated to reach the batch sizes.
        kind: kind of the row.
        scores: scores of this network on the test data, by metric.
        write: writes the network's artefact to a path; ``None`` for no artefact.
        read: loads the artefact as a plain network, which shares nothing with the one that was written.
        tolerance: the largest difference of an output after reading the artefact; 0: bit-equal.
        batch_sizes: batch sizes at which time is measured; none for a stage with the structure of another one.
        rounds: number of turns, at least 50.
        onnx: ``"float"``: an ONNX file, too; ``"static"`` or ``"dynamic"``: also its int8 version, by that mode of
            `distill_lightning.compression.report.onnx.quantize_onnx`, and the time of both in ONNX Runtime, each
            against the dense network in float32.
        calibration: inputs from the training set for ``onnx="static"``.
        weight_bits: bits of the smallest weights in the artefact; ``None`` if all are floats.
        notes: notes on the row.
        seed: seed of the bootstrap.
        folder: an empty folder in which the files are left; ``None``: they are not kept.

    Raises:
        InputError: a network is not on the CPU, or an argument is invalid for every stage.
    """
    for given in (network, dense):
        if any(parameter.device.type != "cpu" for parameter in given.parameters()):
            raise InputError(f"stage {name!r}: time and files are measured on the CPU: move the networks with .cpu()")
    if (write is None) != (read is None):
        raise InputError(f"stage {name!r}: give write and read, or neither")
    check_one_of(f"stage {name!r}: onnx", onnx, get_args(Onnx))
    measuring = _Measuring(network, dense, example_inputs, rounds=rounds, seed=seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if folder is None else folder
        measuring.files(folder, write, read, tolerance)
        with measuring.reporting("macs"):
            measuring.macs = count_macs(measuring.plain, measuring.at_batch(1))
        if onnx != "none":
            with measuring.reporting("onnx"):
                measuring.onnx(folder, onnx, calibration)
        if kind != "dense":
            if not batch_sizes:
                measuring.missing["latency"] = "not asked for"
            for size in batch_sizes:
                with measuring.reporting("latency"):
                    measuring.torch_latency(size)
                for what in [what for what in _ONNX_FILES if what in measuring.nbytes]:
                    with measuring.reporting(f"{what} latency"):
                        measuring.onnx_latency(folder, size, what)
    parameters, macs = count_parameters(measuring.plain), measuring.macs
    return Stage(
        name=name,
        kind=kind,
        scores=dict(scores),
        parameters=parameters.stored,
        nonzero=parameters.nonzero,
        macs=macs.dense if macs else 0,
        effective_macs=macs.effective if macs else 0,
        uncounted=list(macs.uncounted) if macs else [],
        nbytes=measuring.nbytes,
        differences=measuring.differences,
        latency=measuring.latency,
        notes=list(notes),
        missing=measuring.missing,
        weight_bits=weight_bits,
    )


class _Measuring:
    """The measurements of a stage so far."""

    def __init__(self, network: nn.Module, dense: nn.Module, example_inputs: Any, *, rounds: int, seed: int) -> None:
        self.network, self.dense, self.example_inputs = network, dense, example_inputs
        self.rounds, self.seed = rounds, seed
        # The network in the artefact, or the network itself if there is none.
        self.plain = network
        self.macs: Macs | None = None
        self.nbytes: dict[str, int] = {}
        self.differences: dict[str, float] = {}
        self.latency: list[LatencyRow] = []
        self.missing: dict[str, str] = {}

    @contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """If something cannot be measured, keep the reason in place of the measurement."""
        try:
            yield
        except InputError as error:
            self.missing[what] = str(error)

    def at_batch(self, size: int) -> Any:
        """The example inputs at a batch size, with which both networks have to run."""
        inputs = at_batch(self.example_inputs, size)
        for network in (self.dense, self.plain):
            check_batch(network, self.example_inputs, inputs, "so nothing is measured at that size")
        return inputs

    def _measure(self, what: str, path: Path, **options: Any) -> None:
        size = measure_file(path, **options)
        self.nbytes[what], self.differences[what] = size.size, size.difference
        if what == "artefact":
            self.nbytes["artefact_deflated"] = size.deflated

    def _expected(self, network: nn.Module) -> Any:
        with torch.inference_mode():
            return network(*inputs_of(self.example_inputs))

    def files(self, folder: Path, write: Write | None, read: Read | None, tolerance: float) -> None:
        """Measure the artefact and the state dict."""
        # Both sides compute in the same way: without the Transformer's fast path, which rounds differently.
        with calibrating(self.network):
            if write is None or read is None:
                self.missing["artefact"] = "not asked for"
            else:
                with self.reporting("artefact"):
                    self.plain = self._artefact(folder / "artefact", write, read, tolerance)
            if any(parametrize.is_parametrized(module) for module in self.plain.modules()):
                self.missing["state_dict"] = "the network is parametrized, and there is no artefact with a plain one"
                return
            with self.reporting("state_dict"):
                self._measure(
                    "state_dict",
                    folder / "state_dict.pt",
                    write=lambda path: write_weights(self.plain, path),
                    read=lambda path: _loaded(self.plain, path),
                    expected=self._expected(self.plain),
                    example_inputs=self.example_inputs,
                )

    def _artefact(self, path: Path, write: Write, read: Read, tolerance: float) -> nn.Module:
        kept: list[nn.Module] = []

        def reading(path: Path) -> nn.Module:
            # The network is needed afterwards, outside inference mode.
            with torch.inference_mode(mode=False):
                kept.append(read(path).eval())
            return kept[-1]

        self._measure(
            "artefact",
            path,
            write=lambda path: write(self.network, path),
            read=reading,
            expected=self._expected(self.network),
            example_inputs=self.example_inputs,
            tolerance=tolerance,
        )
        return kept[-1]

    def onnx(self, folder: Path, onnx: Onnx, calibration: Iterable[Any] | None) -> None:
        """Measure the ONNX file in float32 and, if asked for, in int8."""
        with calibrating(self.plain):
            outputs = outputs_of(self._expected(self.plain))
        # Flat, as ONNX Runtime returns them.
        expected = outputs[0] if len(outputs) == 1 else outputs
        options = {"expected": expected, "example_inputs": tensors_in(self.example_inputs), "read": OnnxNetwork}
        exact = folder / _ONNX_FILES["onnx"][0]
        self._measure(
            "onnx",
            exact,
            write=lambda path: export_onnx(self.plain, path, self.example_inputs),
            tolerance=TOLERANCE * scale_of(outputs),
            **options,
        )
        if onnx == "float":
            return
        mode: Literal["static", "dynamic"] = "static" if onnx == "static" else "dynamic"
        with self.reporting(INT8):
            self._measure(
                INT8,
                folder / INT8_FILE,
                write=lambda path: quantize_onnx(
                    exact, path, mode=mode, batches=calibration if mode == "static" else None
                ),
                # int8 rounds on purpose; the difference shows how much.
                tolerance=math.inf,
                **options,
            )

    def torch_latency(self, size: int) -> None:
        """Measure both networks in PyTorch, with the fast paths that a user would get."""
        arguments = inputs_of(self.at_batch(size))
        with eval_mode(self.dense, self.plain):
            latency = compare_latency(
                lambda: self.dense(*arguments), lambda: self.plain(*arguments), rounds=self.rounds, seed=self.seed
            )
        self.latency.append(LatencyRow.of(latency, batch=size, runtime="torch", baseline="torch"))

    def onnx_latency(self, folder: Path, size: int, what: str) -> None:
        """Measure an ONNX file against the dense network in float32, in ONNX Runtime and in PyTorch."""
        file, runtime = _ONNX_FILES[what]
        baseline = folder / "dense.onnx"
        if not baseline.exists():
            export_onnx(self.dense, baseline, self.example_inputs)
        inputs = self.at_batch(size)
        found = onnx_latency(folder / file, baseline, self.dense, inputs, rounds=self.rounds, seed=self.seed)
        for other, latency in found.items():
            self.latency.append(LatencyRow.of(latency, batch=size, runtime=runtime, baseline=other))


def _loaded(like: nn.Module, path: Path) -> nn.Module:
    # Attention with inference tensors is computed and rounded differently than with parameters.
    with torch.inference_mode(mode=False):
        network = copy_network(like)
    with torch.no_grad():
        # Values that the file lacks must not come from the copy.
        for tensor in network.state_dict().values():
            tensor.zero_()
    load_strictly(network, read_weights(path), source=str(path))
    return network.eval()
