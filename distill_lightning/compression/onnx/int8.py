"""ONNX files in int8, for which ONNX Runtime has the kernels that PyTorch lacks on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from distill_lightning.compression.access.calibration import inputs_of
from distill_lightning.compression.onnx.files import stripped
from distill_lightning.compression.onnx.session import as_array
from distill_lightning.errors import InputError, check_one_of
from distill_lightning.libraries import package
from distill_lightning.storage.files import whole_file, write_parts

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_INT8_COVERAGE = 0.5


def quantize_onnx(
    path: Path | str,
    out: Path | str,
    *,
    mode: Literal["static", "dynamic"] = "static",
    batches: Iterable[Any] | None = None,
) -> Path:
    """Write the int8 version of an ONNX file, with a scale for each output channel.

    Weights have 7 bits on processors without VNNI, where 8 overflow and errors are ten times as large.

    Args:
        path: path of a file that `export_onnx` wrote.
        out: path of the quantized file; its folder is made.
        mode: ``"static"`` for convolutional networks: activations have fixed ranges, found on ``batches``;
            ``"dynamic"`` for LSTMs and Transformers: ranges are found at every call.
        batches: inputs from the training set, each a tensor or a tuple of tensors; only for ``"static"``.

    Returns:
        The path of the quantized file.

    Raises:
        InputError: the extra ``onnx`` is not installed; a mode that does not suit the network: dynamic for convolutions
            is several times slower than float, static leaves recurrent layers in float; ``batches`` are missing,
            not needed or not finite; less than half of the weights could be quantized; or the disk is full or refuses.
            What was there before is kept then.
    """
    path, out = Path(path), Path(out)
    onnx = package("onnx", extra="onnx")
    package("onnxruntime", extra="onnx")
    check_one_of("quantize_onnx: mode", mode, ("static", "dynamic"))
    if (mode == "static") != (batches is not None):
        raise InputError(f"quantize_onnx: mode={mode!r} {'needs' if mode == 'static' else 'takes no'} batches")
    if not path.is_file():
        raise InputError(f"there is no file {path}: write it with export_onnx first")
    graph = onnx.load(str(path)).graph
    kinds = {node.op_type for node in graph.node}
    if mode == "dynamic" and kinds & _CONVOLUTIONS:
        raise InputError(
            f"{path} has convolutions, which dynamic quantization makes several times slower: use mode='static'"
        )
    if mode == "static" and kinds & _RECURRENT:
        raise InputError(f"{path} has recurrent layers, which static quantization leaves in float: use mode='dynamic'")
    quantization = package("onnxruntime.quantization", extra="onnx")
    preprocess = package("onnxruntime.quantization.shape_inference", extra="onnx").quant_pre_process
    options = {
        "per_channel": True,
        "reduce_range": not has_vnni(),
        "weight_type": quantization.QuantType.QInt8,
    }
    with tempfile.TemporaryDirectory() as folder, whole_file(out) as partial:
        prepared = Path(folder, "prepared.onnx")
        preprocess(str(path), str(prepared))
        if batches is None:
            quantization.quantize_dynamic(str(prepared), str(partial), **options)
        else:
            names = [entry.name for entry in graph.input]
            quantization.quantize_static(
                str(prepared),
                str(partial),
                _reader(quantization, path, names, batches),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                **options,
            )
        write_parts(partial, [stripped(onnx.load(str(partial))).SerializeToString()])
        share = int8_share(partial)
        if share < _INT8_COVERAGE:
            raise InputError(
                f"{path}: only {share:.0%} of the weights would be int8 with mode={mode!r}: ONNX Runtime has no int8 "
                "kernel for the others; quantize with the package's own steps and keep the packed file"
            )
    return out


def int8_share(path: Path) -> float:
    """The share of an ONNX file's weights, by number of entries, that are 8-bit integers."""
    onnx = package("onnx", extra="onnx")
    tensors = onnx.load(str(path)).graph.initializer
    small = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    sizes = [(int(np.prod(tensor.dims)), tensor.data_type in small) for tensor in tensors]
    return sum(size for size, is_small in sizes if is_small) / max(1, sum(size for size, _ in sizes))


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies 8-bit integers without overflow; false if the system does not say.

    Args:
        cpuinfo: the file in which Linux describes the processor.
    """
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    # ARM's instruction has another name.
    features = next((line for line in lines if line.startswith("Features")), "").split()
    return any("vnni" in flag for flag in flags) or "asimddp" in features


def _reader(quantization: ModuleType, path: Path, names: Sequence[str], batches: Iterable[Any]) -> Any:
    """Calibration batches in the way ONNX Runtime asks for them: one by one, then ``None``."""

    def feeds() -> Iterator[dict[str, Any]]:
        number = 0
        for batch in batches:
            arrays = [as_array(value) for value in inputs_of(batch)]
            if len(arrays) != len(names):
                raise InputError(f"{path} takes {len(names)} inputs, but a calibration batch has {len(arrays)}")
            for name, array in zip(names, arrays, strict=True):
                if not np.isfinite(array).all():
                    raise InputError(
                        f"quantize_onnx: input {name!r} of calibration batch {number} has values that are not finite, "
                        "of which no range can be found: leave the batch out"
                    )
            number += 1
            yield dict(zip(names, arrays, strict=True))
        if not number:
            raise InputError("quantize_onnx: there is no calibration batch: give at least one")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.feeds = feeds()

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    return Reader()
