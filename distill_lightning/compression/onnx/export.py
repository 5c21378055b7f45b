"""Writing a network as an ONNX file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distill_lightning.compression.access.batch_sizes import at_batch, check_batch
from distill_lightning.compression.access.calibration import calibrating, inputs_of, tensors_in
from distill_lightning.compression.access.computed import is_computed
from distill_lightning.compression.access.outputs import largest_difference, outputs_of, scale_of
from distill_lightning.compression.onnx.files import stripped
from distill_lightning.compression.onnx.session import OnnxNetwork
from distill_lightning.compression.structure.changes import plain_copy
from distill_lightning.errors import InputError, in_a_line
from distill_lightning.libraries import package
from distill_lightning.storage.files import whole_file, write_parts

TOLERANCE = 1e-5
"""The largest difference of an output, relative to the largest output or to 1, that a float32 export may have."""

# The oldest that is tried; with today's onnxscript the exporter of 2.6 cannot translate BatchNorm.
_FIRST_TORCH = (2, 13)
_BATCHES = (1, 3)


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
    for library in ("onnx", "onnxscript", "onnxruntime"):
        package(library, extra="onnx")
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
            raise InputError(
                f"{type(network).__name__} cannot be exported to ONNX: {in_a_line(error, at_most=300)}"
            ) from error
    with whole_file(path) as partial:
        # The exporter's own way to a file would tell of a full disk in words of its own.
        write_parts(partial, [stripped(cast("Any", program).model_proto).SerializeToString()])
        session = OnnxNetwork(partial)
        session.path = path
        for given in checked:
            _check_equal(network, session, inputs_of(given))
    return path


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
    found = outputs_of(session(*tensors_in(arguments)))
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
