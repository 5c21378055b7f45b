"""Whether a network has stayed the same: its values, and what it computes with them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distill_lightning.errors import InputError
from distill_lightning.layers.modes import eval_mode
from distill_lightning.layers.wrappers import named_parts, plain_name, unwrapped

if TYPE_CHECKING:
    from hashlib import _Hash


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """SHA-256 of what a module computes with: parameters, buffers, persistent or not, and any other state.

    Names, types, shapes and every byte count. Wrappers do not, `torch.compile`'s for example, nor does how a value is
    kept: a parametrized weight counts as the weight that it gives in eval mode. State that is no tensor, that of
    quantized layers for example, counts like the rest.

    Raises:
        InputError: the module holds something that has no value yet, or that cannot be pickled.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.layers import fingerprint
        >>> network = nn.Linear(2, 2)
        >>> before = fingerprint(network)
        >>> fingerprint(nn.DataParallel(network)) == before
        True
        >>> with torch.no_grad():
        ...     weight = network.weight.add_(1)
        >>> fingerprint(network) == before
        False
    """
    digest = hashlib.sha256()
    with eval_mode(module):
        for name, value in sorted(_values(unwrapped(module)).items()):
            digest.update(f"{name} ".encode())
            _add(digest, name, value)
    return digest.hexdigest()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits: NaN equals itself then, and 0 differs from -0.

    Example:
        >>> import torch
        >>> from distill_lightning.layers import same_bits
        >>> nan = torch.tensor([1.0, float("nan")])
        >>> same_bits(nan, nan.clone()), torch.equal(nan, nan.clone())
        (True, False)
    """
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))


def structure(network: nn.Module) -> str:
    """What a network does with its values: the layers and their options, a line each, by name.

    Wrappers do not stand in it. A parametrized layer stands as it would without, and so does every BatchNorm, which
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` replaces. Of a traced or exported network it tells the code.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import structure
        >>> print(structure(nn.Sequential(nn.DataParallel(nn.Linear(2, 1)), nn.ReLU())))
        : Sequential()
        0: Linear(in_features=2, out_features=1, bias=True)
        1: ReLU()
    """
    parts = named_parts(network)
    hidden = tuple(f"{name}.parametrizations".lstrip(".") for name in _parametrized(parts))
    return "\n".join(f"{name}: {_told(part)}" for name, part in parts.items() if not _stands_in(name, hidden))


def _told(part: nn.Module) -> str:
    kind = parametrize.type_before_parametrizations(part)
    if kind.__repr__.__module__.partition(".")[0] != "torch":
        # Who prints himself may have no other way to tell his options.
        return repr(part)
    name = "BatchNorm" if isinstance(part, _BatchNorm) else kind.__name__
    code = f"\n{part.code}" if isinstance(part, (torch.fx.GraphModule, torch.jit.ScriptModule)) else ""
    return f"{name}({part.extra_repr()}){code}"


def _values(network: nn.Module) -> dict[str, Any]:
    """All state by name; of a parametrized layer, what its parametrizations give."""
    parametrized = _parametrized(dict(network.named_modules()))
    hidden = tuple(f"{name}.parametrizations".lstrip(".") for name in parametrized)
    state = {**network.state_dict(), **dict(network.named_buffers())}
    found = {plain_name(network, name): value for name, value in state.items() if not _stands_in(name, hidden)}
    for name, layer in parametrized.items():
        prefix = f"{plain_name(network, name)}." if name else ""
        # A ModuleDict of a ParametrizationList for each parametrized tensor.
        found |= {f"{prefix}{tensor}": getattr(layer, tensor) for tensor in layer.parametrizations}  # type: ignore[union-attr]
    return found


def _parametrized(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: part for name, part in parts.items() if parametrize.is_parametrized(part)}


def _stands_in(name: str, hidden: tuple[str, ...]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in hidden)


def _add(digest: _Hash, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        for number, part in enumerate(_plain_tensors(name, value)):
            digest.update(f"{number} {part.dtype} {tuple(part.shape)} ".encode())
            digest.update(_bytes(part).numpy().tobytes())
        digest.update(str(value.dtype).encode())
    elif isinstance(value, torch.ScriptObject):
        _add(digest, name, value.__getstate__())
    elif isinstance(value, (Mapping, list, tuple)):
        digest.update(f"{type(value).__name__} {len(value)} ".encode())
        for inner in value.items() if isinstance(value, Mapping) else value:
            _add(digest, name, inner)
    elif isinstance(value, (set, frozenset)):
        # Their order is another one in every process.
        _add(digest, name, sorted(map(repr, value)))
    else:
        digest.update(_pickled(name, value))


def _bytes(tensor: Tensor) -> Tensor:
    """The entries as bytes, which covers types that numpy lacks (bfloat16)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[Tensor]:
    """What a tensor of any kind consists of, as dense tensors of numbers."""
    if is_lazy(tensor) or tensor.is_meta:
        raise InputError(f"{name!r} has no value yet: run the network once, or load its weights")
    tensor = tensor.detach()
    subclass: Any = tensor
    if is_traceable_wrapper_subclass(subclass):
        inner, context = subclass.__tensor_flatten__()
        yield torch.frombuffer(bytearray(repr(context).encode()), dtype=torch.uint8)
        for part in inner:
            yield from _plain_tensors(name, getattr(subclass, part))
    elif tensor.is_quantized:
        yield tensor.int_repr()
        yield tensor.dequantize()
    else:
        yield tensor if tensor.layout is torch.strided else tensor.to_dense()


def _pickled(name: str, value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{name!r} holds a {type(value).__name__}, which cannot be pickled, so nobody can tell whether it stays "
            "the same: let get_extra_state return plain values"
        ) from error
