"""A network in a file of each format, which is run and held against the network."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill_lightning.compression.access.calibration import inputs_of
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.outputs import largest_difference, outputs_of, scale_of
from distill_lightning.compression.costs.latency import compare_latency
from distill_lightning.compression.onnx.export import TOLERANCE, export_onnx
from distill_lightning.compression.onnx.session import OnnxNetwork
from distill_lightning.errors import InputError, in_a_line
from distill_lightning.layers import InputShape, by_position, eval_mode, same_bits
from distill_lightning.networks.weights import load_strictly, read_weights, write_weights
from distill_lightning.storage import write_whole
from distill_lightning.studies.export.config import Format
from distill_lightning.studies.export.student import WEIGHTS, load_exported

_CHECKED = (1, 3)
# Formats of weights alone, by which the same code computes.
_WEIGHTS = ("safetensors", "hub")
_NAMES: Mapping[Format, str] = {
    "safetensors": WEIGHTS,
    "hub": WEIGHTS,
    "torch_export": "model.pt2",
    "onnx": "model.onnx",
}

Run = Callable[..., Any]


class Exported(NamedTuple):
    """A file that was written and, unless its network reads sentences, run.

    Attributes:
        format: of the file.
        path: of the file.
        nbytes: its bytes.
        difference: the largest absolute difference of its outputs from the network's, at batches of 1 and 3; of one
            that was not run, of its weights.
        milliseconds: its time for a batch of one, on one thread of the CPU: the median of 50; ``None``: it was not run.
        of_network: the same of the network in PyTorch, in turns with it.
    """

    format: Format
    path: Path
    nbytes: int
    difference: float
    milliseconds: float | None
    of_network: float | None


def reads_sentences(network: nn.Module) -> bool:
    """Whether it is an encoder and a decoder of the transformers library, which read a tensor each."""
    return bool(getattr(getattr(network, "config", None), "is_encoder_decoder", False))


def refuse_sentences(network: nn.Module, to: Sequence[Format]) -> None:
    """Refuse formats of more than weights for a network that reads sentences.

    Raises:
        InputError: there is one among them.
    """
    others = [kind for kind in to if kind not in _WEIGHTS]
    if others:
        raise InputError(
            f"export: {type(network).__name__} translates step by step, and a file of {' or '.join(others)} holds one "
            "step on one tensor: give --to safetensors"
        )


def example_batch(network: nn.Module, input_shape: InputShape, size: int) -> Tensor | tuple[Tensor, ...]:
    """A batch of random inputs: images and the like in [0, 1), tokens for a network that reads them.

    Args:
        network: that reads them.
        input_shape: of one input; with several by name, the batch is a tuple in the order of the network's arguments.
        size: of the batch.
    """
    generator = torch.Generator().manual_seed(0)
    tables = [module.num_embeddings for module in network.modules() if isinstance(module, nn.Embedding)]
    kind = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)

    def random(shape: Sequence[int]) -> Tensor:
        if len(shape) == 1 and tables:
            return torch.randint(max(tables), (size, *shape), generator=generator)
        return torch.rand((size, *shape), generator=generator).to(kind)

    if not isinstance(input_shape, Mapping):
        return random(input_shape)
    batch: tuple[Tensor, ...] = by_position(network, {name: random(shape) for name, shape in input_shape.items()})
    return batch


def write_format(
    network: nn.Module, kind: Format, folder: Path, description: Mapping[str, Any], input_shape: InputShape | None
) -> Exported:
    """Write a network in one format, read the file, and hold its outputs against the network's.

    Args:
        network: plain, in eval mode, on the CPU.
        kind: the format.
        folder: of the file, with the description.
        description: how the network is built, for the formats that hold only weights.
        input_shape: of one input; ``None``: it is of several, and weights are compared in the place of outputs.

    Raises:
        InputError: a package is missing, the network cannot be exported, the file gives other outputs, or the disk is
            full or refuses.
    """
    path = folder / _NAMES[kind]
    if input_shape is None:
        found = _WRITERS[kind](network, path, description, torch.empty(0))
        _check_weights(network, found, path)
        return Exported(kind, path, path.stat().st_size, 0.0, None, None)
    run = _WRITERS[kind](network, path, description, example_batch(network, input_shape, 2))
    gaps = [_gap(network, run, path, example_batch(network, input_shape, size), kind) for size in _CHECKED]
    one = example_batch(network, input_shape, 1)
    with eval_mode(network):
        latency = compare_latency(lambda: network(*inputs_of(one)), lambda: run(*inputs_of(one)))
    ours, theirs = (1e3 * statistics.median(times) for times in (latency.compressed_wall, latency.dense_wall))
    return Exported(kind, path, path.stat().st_size, max(gaps), ours, theirs)


def _check_weights(network: nn.Module, found: Any, path: Path) -> None:
    read = found.state_dict()
    for name, tensor in network.state_dict().items():
        if not same_bits(tensor, read[name]):
            raise InputError(f"{path} does not hold what {type(network).__name__} does: {name} differs")


def _gap(network: nn.Module, run: Run, path: Path, example: Any, kind: Format) -> float:
    inputs = inputs_of(example)
    with torch.inference_mode():
        wanted, found = outputs_of(network(*inputs)), outputs_of(run(*inputs))
    if [output.shape for output in wanted] != [output.shape for output in found]:
        raise InputError(f"{path} gives outputs of other shapes than {type(network).__name__}")
    gap = max((largest_difference(ours, theirs) for ours, theirs in zip(wanted, found, strict=True)), default=0.0)
    if gap > (0.0 if kind in _WEIGHTS else TOLERANCE * scale_of(wanted)):
        raise InputError(
            f"{path} does not compute what {type(network).__name__} does: with a batch of {len(inputs[0])} outputs "
            f"differ by {gap:.3g}; does its forward draw at random, or depend on values of its input?"
        )
    return gap


def _write_safetensors(network: nn.Module, path: Path, description: Mapping[str, Any], _: Any) -> Run:
    write_weights(network, path)
    if description["recipe"] is not None:
        return load_exported(path.parent)
    like = copy_network(network)
    with torch.no_grad():
        # Values that the file lacks must not come from the copy.
        for tensor in like.state_dict().values():
            tensor.zero_()
    load_strictly(like, read_weights(path), source=str(path))
    return like.eval()


def _write_hub(network: nn.Module, path: Path, description: Mapping[str, Any], inputs: Any) -> Run:
    try:
        import huggingface_hub  # noqa: PLC0415  (an extra)
    except ModuleNotFoundError as error:
        raise InputError("huggingface_hub is not installed: pip install 'distill-lightning[hub]'") from error
    like = copy_network(network)
    _write_safetensors(network, path, description, inputs)
    with torch.no_grad():
        for tensor in like.state_dict().values():
            tensor.zero_()
    huggingface_hub.load_torch_model(like, path.parent, strict=True, safe=True)
    return like.eval()


def _write_torch_export(network: nn.Module, path: Path, _: Mapping[str, Any], inputs: Any) -> Run:
    arguments, batch = inputs_of(inputs), torch.export.Dim("batch")
    try:
        with torch.no_grad():
            program = torch.export.export(network, arguments, dynamic_shapes=tuple({0: batch} for _ in arguments))
    except Exception as error:  # whatever a forward may do that cannot be traced
        reason = in_a_line(error, at_most=300)
        raise InputError(f"{type(network).__name__} cannot be exported by torch.export: {reason}") from error
    content = io.BytesIO()
    torch.export.save(program, content)
    write_whole(path, [content.getbuffer()])
    module: Run = torch.export.load(path).module()
    return module


def _write_onnx(network: nn.Module, path: Path, _: Mapping[str, Any], inputs: Any) -> Run:
    return OnnxNetwork(export_onnx(network, path, inputs))


_WRITERS: Mapping[Format, Callable[[nn.Module, Path, Mapping[str, Any], Any], Run]] = {
    "safetensors": _write_safetensors,
    "hub": _write_hub,
    "torch_export": _write_torch_export,
    "onnx": _write_onnx,
}
