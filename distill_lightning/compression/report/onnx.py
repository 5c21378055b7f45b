"""ONNX files, their int8 versions, and ONNX Runtime, which has the int8 kernels that PyTorch lacks on the CPU.

Needs the extra ``onnx``: ``pip install 'distill-lightning[onnx]'``.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill_lightning.compression.access.calibration import calibrating, each_tensor, inputs_of, tensors_in
from distill_lightning.compression.access.computed import is_computed
from distill_lightning.compression.costs.latency import Latency, compare_latency
from distill_lightning.compression.report.measure import largest_difference, scale_of
from distill_lightning.compression.structure.changes import plain_copy
from distill_lightning.errors import InputError, check_one_of
from distill_lightning.layers import eval_mode
from distill_lightning.storage.files import whole_file, write_parts

TOLERANCE = 1e-5
"""The largest difference of an output, relative to the largest output or to 1, that a float32 export may have."""

Array = NDArray[Any]

# The oldest that is tried; with today's onnxscript the exporter of 2.6 cannot translate BatchNorm.
_FIRST_TORCH = (2, 13)

_BATCHES = (1, 3)
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_INT8_COVERAGE = 0.5


class OnnxNetwork:
    """A network in ONNX Runtime, on the CPU.

    Args:
        path: path of the ONNX file.
        threads: number of threads that one operation may use; with 1 everything is computed in the calling thread,
            whose processor time is then the whole cost.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        runtime = _package("onnxruntime")
        if not path.is_file():
            raise InputError(f"there is no file {path}: give the path of an ONNX file")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Errors only: its warnings bypass Python on their way to stderr, and are about its own optimiser.
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has its own exception for each kind of damage
            raise InputError(f"{path} cannot be read by ONNX Runtime: {_in_a_line(error)}") from error
        self.path = path
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    def __call__(self, *inputs: Tensor | Array) -> Any:
        """The outputs: one tensor, or a tuple of all tensors (`outputs_of`).

        Args:
            inputs: all inputs of the network, tensors or arrays.

        Raises:
            InputError: the number of inputs is wrong, or the file does not accept their shapes or types.
        """
        if len(inputs) != len(self.inputs):
            raise InputError(
                f"{self.path} takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), got {len(inputs)}"
            )
        arrays = [value.detach().cpu().numpy() if isinstance(value, Tensor) else value for value in inputs]
        try:
            outputs = self.session.run(None, dict(zip(self.inputs, arrays, strict=True)))
        except Exception as error:  # as above
            raise InputError(f"{self.path} does not take these inputs: {_in_a_line(error)}") from error
        tensors = tuple(torch.from_numpy(output) for output in outputs)
        return tensors[0] if len(tensors) == 1 else tensors


class NetworkInOnnx(nn.Module):
    """An ONNX file in the place of the network that it was made of, on the CPU: it takes and returns the same.

    Args:
        session: the file.
        network: the network, on the CPU; its outputs' structure is the file's.
        example_inputs: a tensor, or a tuple of arguments.
    """

    def __init__(self, session: OnnxNetwork, network: nn.Module, example_inputs: Any) -> None:
        super().__init__()
        self.session = session
        with eval_mode(network), torch.inference_mode():
            self.like = network(*inputs_of(example_inputs))

    def forward(self, *inputs: Any) -> Any:
        """Run the file; the outputs are on the device of the inputs."""
        tensors = tensors_of(inputs)
        found = iter(outputs_of(self.session(*tensors)))
        return _in_structure(self.like, (output.to(tensors[0].device) for output in found))


def _in_structure(like: Any, tensors: Iterator[Tensor]) -> Any:
    """Tensors in the structure in which `outputs_of` has found them."""
    if isinstance(like, Tensor):
        return next(tensors)
    if isinstance(like, Mapping):
        return {key: _in_structure(part, tensors) for key, part in like.items()}
    if isinstance(like, (tuple, list)):
        parts = [_in_structure(part, tensors) for part in like]
        return like._make(parts) if hasattr(like, "_make") else tuple(parts)
    return None


def export_onnx(network: nn.Module, path: Path | str, example_inputs: Any, *, dynamic_batch: bool = True) -> Path:
    """Write a network as an ONNX file in float32, and check that ONNX Runtime computes the same as PyTorch.

    The file holds the weights themselves; what the exporter adds for debugging (stack traces, shapes of all
    intermediate values), which can be larger than a small network's weights, is left out. Equal weights are stored
    once, so the file of a fresh `nn.TransformerEncoder`, whose layers begin as copies of one, is smaller than after
    training.

    Args:
        network: it may be compressed: of weights that are computed (quantized, shared, pruned by masks) the file holds
            the values. It runs in eval mode and is left as it was.
        path: path of the file; its folder is made.
        example_inputs: a tensor, or a tuple of arguments; the batch is the first dimension of each.
        dynamic_batch: whether the file accepts every batch size, or only that of ``example_inputs``.

    Returns:
        The path.

    Raises:
        InputError: PyTorch is older than 2.13, or the extra ``onnx`` is not installed; the network cannot be exported,
            or has a parametrization of another package; the outputs differ at batch sizes 1 and 3 (at that of
            ``example_inputs``) or are not tensors; the disk is full or refuses. No file is left then, but what was
            there before.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < _FIRST_TORCH:
        raise InputError(f"torch {torch.__version__} cannot write every network as an ONNX file: install torch>=2.13")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _package(package)
    path, network = Path(path), plain_copy(network) if is_computed(network) else network
    for name, module in network.named_modules():
        if parametrize.is_parametrized(module):
            raise InputError(
                f"{name or type(network).__name__} has a parametrization that is not this package's: fix its value "
                "with torch.nn.utils.parametrize.remove_parametrizations, or export a copy without it"
            )
    # The exporter would treat a size of 1 as a constant.
    inputs = at_batch(example_inputs, max(2, len(tensors_in(example_inputs)[0]))) if dynamic_batch else example_inputs
    arguments = inputs_of(inputs)
    checked = [at_batch(inputs, size) for size in _BATCHES] if dynamic_batch else [inputs]
    if dynamic_batch:
        _check_batches(network, example_inputs, checked)
    shapes = _shapes(arguments, torch.export.Dim("batch")) if dynamic_batch else None
    with calibrating(network), torch.no_grad(), _known_warnings():
        try:
            program = torch.onnx.export(network, arguments, dynamo=True, dynamic_shapes=shapes, verbose=False)
        except torch.onnx.errors.OnnxExporterError as error:
            raise InputError(f"{type(network).__name__} cannot be exported to ONNX: {_in_a_line(error)}") from error
    with whole_file(path) as partial:
        # The exporter's own way to a file would tell of a full disk in words of its own.
        write_parts(partial, [_stripped(cast("Any", program).model_proto).SerializeToString()])
        session = OnnxNetwork(partial)
        session.path = path
        for given in checked:
            _check_equal(network, session, inputs_of(given))
    return path


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
    onnx = _package("onnx")
    _package("onnxruntime")
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
    quantization = _package("onnxruntime.quantization")
    preprocess = _package("onnxruntime.quantization.shape_inference").quant_pre_process
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
        write_parts(partial, [_stripped(onnx.load(str(partial))).SerializeToString()])
        share = int8_share(partial)
        if share < _INT8_COVERAGE:
            raise InputError(
                f"{path}: only {share:.0%} of the weights would be int8 with mode={mode!r}: ONNX Runtime has no int8 "
                "kernel for the others; quantize with the package's own steps and keep the packed file"
            )
    return out


def int8_share(path: Path) -> float:
    """The share of an ONNX file's weights, by number of entries, that are 8-bit integers."""
    onnx = _package("onnx")
    tensors = onnx.load(str(path)).graph.initializer
    small = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    sizes = [(int(np.prod(tensor.dims)), tensor.data_type in small) for tensor in tensors]
    return sum(size for size, is_small in sizes if is_small) / max(1, sum(size for size, _ in sizes))


def onnx_latency(
    compressed: Path, dense: Path, network: nn.Module, example_inputs: Any, *, rounds: int = 50, seed: int = 0
) -> dict[Literal["onnxruntime", "torch"], Latency]:
    """The time of an ONNX file in ONNX Runtime against two baselines, because the runtime itself saves time, too.

    Args:
        compressed: the file, quantized for example.
        dense: the dense network's file in float32.
        network: the dense network.
        example_inputs: a tensor, or a tuple of arguments.
        rounds: number of turns, see `compare_latency`.
        seed: seed of the bootstrap.

    Returns:
        ``"onnxruntime"``: the comparison with the dense file; ``"torch"``: with the dense network in PyTorch.

    Raises:
        InputError: a file cannot be read, or the arguments do not suit `compare_latency`.
    """
    arguments = inputs_of(example_inputs)
    ours, theirs = OnnxNetwork(compressed), OnnxNetwork(dense)
    arrays = [_array(value) for value in tensors_of(arguments)]
    with eval_mode(network):
        return {
            "onnxruntime": compare_latency(lambda: theirs(*arrays), lambda: ours(*arrays), rounds=rounds, seed=seed),
            "torch": compare_latency(lambda: network(*arguments), lambda: ours(*arrays), rounds=rounds, seed=seed),
        }


def at_batch(example_inputs: Any, size: int) -> Any:
    """Example inputs at another batch size: their samples repeated, or only the first ones.

    Args:
        example_inputs: a tensor, or a tuple of arguments; the batch is the first dimension of each tensor in them.
        size: the new batch size.

    Raises:
        InputError: a tensor without samples.
    """

    def resized(value: Tensor) -> Tensor:
        if not value.ndim or not len(value):
            raise InputError(f"example inputs of shape {tuple(value.shape)} have no sample: give a batch (N, ...)")
        return value[torch.arange(size, device=value.device) % len(value)]

    return each_tensor(resized, example_inputs)


def check_batch(network: nn.Module, example_inputs: Any, other: Any, advice: str) -> None:
    """Refuse a network that runs with the batch of its example inputs and not with another one.

    Args:
        network: the network.
        example_inputs: a tensor, or a tuple of arguments, with which it runs.
        other: the same of another batch size.
        advice: what to do instead, for the message.

    Raises:
        InputError: it does not run with the other batch.
    """
    own, size = (len(tensors_in(given)[0]) for given in (example_inputs, other))
    with calibrating(network), torch.no_grad():
        try:
            network(*inputs_of(other))
        except Exception as error:  # a network may raise anything
            raise InputError(
                f"{type(network).__name__} runs with a batch of {own} and not with one of {size} "
                f"({_in_a_line(error)}): {advice}"
            ) from error


def tensors_of(example_inputs: Any) -> tuple[Tensor, ...]:
    """The arguments that are tensors; an ONNX file has the others built in.

    Args:
        example_inputs: a tensor, or a tuple of arguments.
    """
    return tuple(tensors_in(example_inputs))


def outputs_of(output: Any) -> tuple[Tensor, ...]:
    """The tensors of a network's output, in the order of an ONNX file; ``None`` is left out."""
    if isinstance(output, Tensor):
        return (output,)
    if output is None:
        return ()
    if isinstance(output, Mapping):
        output = list(output.values())
    if not isinstance(output, (tuple, list)):
        raise InputError(f"outputs must be tensors, or tuples, lists and dicts of tensors, got {type(output).__name__}")
    return tuple(tensor for part in output for tensor in outputs_of(part))


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


def _array(value: Tensor | Array) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".", maxsplit=1)[0]:
            raise
        raise InputError(f"{error.name} is not installed: pip install 'distill-lightning[onnx]'") from error


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Silence the exporter's warnings about PyTorch's own code, which its callers cannot change."""
    with warnings.catch_warnings():
        # torch.export of 2.14 calls what torch.fx has deprecated.
        warnings.filterwarnings("ignore", "_check_is_size will be removed", FutureWarning)
        # Recurrent layers keep a list of their weights beside the parameters; the export reads the parameters.
        warnings.filterwarnings("ignore", r"The tensor attributes? .*_flat_weights", UserWarning)
        # All inputs are meant to have the same batch size.
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used", UserWarning)
        yield


def _stripped(model: Any) -> Any:
    """A file's content without stack traces and types of intermediate values, which keep ONNX Runtime from quantizing.

    It is changed in place.
    """
    graph = model.graph
    del graph.value_info[:], model.metadata_props[:], graph.metadata_props[:]
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        del part.metadata_props[:]
    return model


def _check_batches(network: nn.Module, example_inputs: Any, others: Iterable[Any]) -> None:
    """Refuse a network that runs with the batch of its example inputs alone."""
    with calibrating(network), torch.no_grad():
        network(*inputs_of(example_inputs))
    for given in others:
        check_batch(network, example_inputs, given, "give dynamic_batch=False for a file of that batch alone")


def _shapes(value: Any, batch: Any) -> Any:
    """Which dimensions of inputs are dynamic, as `torch.onnx.export` asks for it: the first of every tensor."""
    if isinstance(value, Tensor):
        return {0: batch}
    if isinstance(value, Mapping):
        return {name: _shapes(part, batch) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_shapes(part, batch) for part in value)
    return None


def _check_equal(network: nn.Module, session: OnnxNetwork, arguments: tuple[Any, ...]) -> None:
    with calibrating(network), torch.inference_mode():
        wanted = outputs_of(network(*arguments))
    found = outputs_of(session(*tensors_of(arguments)))
    if len(found) != len(wanted):
        raise InputError(
            f"{session.path} has {len(found)} outputs, but {type(network).__name__} returns {len(wanted)}: return each "
            "tensor only once"
        )
    for ours, theirs in zip(wanted, found, strict=True):
        gap = largest_difference(ours, theirs) if ours.shape == theirs.shape else float("inf")
        if gap > TOLERANCE * scale_of([ours]):
            raise InputError(
                f"{session.path} does not compute what {type(network).__name__} does: with a batch of "
                f"{len(tensors_in(arguments)[0])} outputs differ by {gap:.3g}; does its forward depend "
                "on values of its input?"
            )


def _reader(quantization: ModuleType, path: Path, names: Sequence[str], batches: Iterable[Any]) -> Any:
    """Calibration batches in the way ONNX Runtime asks for them: one by one, then ``None``."""

    def feeds() -> Iterator[dict[str, Any]]:
        number = 0
        for batch in batches:
            arrays = [
                value.detach().cpu().numpy() if isinstance(value, Tensor) else value for value in inputs_of(batch)
            ]
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
