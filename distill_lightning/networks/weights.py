"""Network weights in files: only tensors are read, and a network is not changed unless all of them fit."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill_lightning.errors import InputError, in_a_line
from distill_lightning.layers import unwrapped
from distill_lightning.storage import write_tensors, write_whole

# Under these, libraries and scripts keep a network's weights in a file; the first that is there counts.
_KEYS = ("state_dict", "model", "model_state_dict", "network", "net")
# What others put before the names: data parallelism, a module around the network, torch.compile (also in between).
_WRAPPERS = ("module.", "model.", "student.")
_COMPILED = "_orig_mod."


def read_weights(path: Path, *, part: str | None = None) -> dict[str, Tensor]:
    """Read a network's state dict from a file, without running any code that the file may contain.

    The file is a state dict, or holds one under ``"state_dict"``, ``"model"`` or another key.

    Args:
        path: path of the file.
        part: the submodule whose weights are read; ``None``: the student of a checkpoint, and otherwise everything.

    Raises:
        InputError: the file is missing, damaged or unsafe, holds no state dict or several under keys of their own, or
            nothing of that part.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from torch import nn
        >>> from distill_lightning.networks.weights import read_weights, write_weights
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_weights(nn.Linear(4, 3), Path(folder, "network.safetensors"))
        ...     weights = read_weights(path)
        >>> sorted(weights)
        ['bias', 'weight']
    """
    _, weights = _read(path)
    prefix = "student." if part is None else f"{part}."
    inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if part is not None and not inside:
        parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in weights))
        raise InputError(f"{path} holds nothing of {part!r}; its parts: {parts}")
    return inside or dict(weights)


def without_prefixes(network: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """A network's weights without what wrappers have put before their names, with a warning that says so.

    Known are ``module.`` (data parallelism), ``model.`` and ``student.`` (of another module) and ``_orig_mod.``
    (`torch.compile`), in any order.

    Args:
        network: that they are for.
        weights: by the names in the file.
        source: the file, for the warning.

    Returns:
        The weights by the network's own names; where there are no such, by those that are nearest to them.

    Example:
        >>> import warnings
        >>> from torch import nn
        >>> from distill_lightning.networks.weights import without_prefixes
        >>> network = nn.Linear(4, 3)
        >>> weights = {f"module.{name}": value for name, value in network.state_dict().items()}
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     sorted(without_prefixes(network, weights, source="network.pt"))
        ['bias', 'weight']
    """
    own = network.state_dict().keys()
    found = _by_wrappers(weights)
    fitting = [prefix for prefix, inside in found.items() if inside.keys() == own]
    prefix = fitting[0] if fitting else max(found, key=lambda prefix: len(found[prefix].keys() & own))
    inside = found[prefix]
    if fitting and prefix:
        left = len(weights) - len(inside)
        others = f", and {left} tensors of something else are left out" if left else ""
        warnings.warn(f"{source}: the names of its weights are read without {prefix!r}{others}", stacklevel=3)
    return inside


def _by_wrappers(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights as they are, and what is left of them without each sequence of wrappers that is there."""
    found, waiting = {"": dict(weights)}, [""]
    while waiting:
        prefix = waiting.pop(0)
        inside = found[prefix]
        below = {
            wrapper: {name.removeprefix(wrapper): value for name, value in inside.items() if name.startswith(wrapper)}
            for wrapper in _WRAPPERS
        }
        if any(_COMPILED in name for name in inside):
            below[_COMPILED] = {name.replace(_COMPILED, ""): value for name, value in inside.items()}
        for wrapper, one in below.items():
            if one:
                found[prefix + wrapper] = one
                waiting.append(prefix + wrapper)
    return found


def write_weights(network: nn.Module, path: Path) -> Path:
    """Write a network's state dict, whole or not at all.

    Args:
        network: the plain network, or what `torch.compile` returned for it.
        path: ``.safetensors``, or ``.pt`` / ``.pth`` for `torch.save`; its folder is made.

    Returns:
        The path.

    Raises:
        InputError: the suffix is another one; the disk is full or refuses, and then what was there before is kept.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from torch import nn
        >>> from distill_lightning.networks.weights import write_weights
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_weights(nn.Linear(4, 3), Path(folder, "network.safetensors")).name
        'network.safetensors'
    """
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise InputError(f"weights are written as .safetensors, .pt or .pth, got {path.name!r}")
    plain = unwrapped(network)
    # Clones, because safetensors refuses tied weights, and torch.save would write a view's whole storage.
    state = {name: value.detach().cpu().clone().contiguous() for name, value in plain.state_dict().items()}
    if path.suffix == ".safetensors":
        write_tensors(path, state, {"format": "pt"})
    else:
        # torch.save would tell of a full disk in words of its own.
        content = io.BytesIO()
        torch.save(state, content)
        write_whole(path, [content.getbuffer()])
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a whole checkpoint that a Trainer wrote, without running any code that the file may contain.

    ``hyper_parameters`` are empty if the module saved none; modules of this package always do.

    Raises:
        InputError: the file is missing, damaged or unsafe, or holds only weights.
    """
    content, _ = _read(path)
    missing = [key for key in ("state_dict", "pytorch-lightning_version") if key not in content]
    if missing:
        raise InputError(
            f"{path} is not a checkpoint of a training (it has no {missing[0]!r}): load the weights of an exported "
            "student with distill_lightning.Pretrained(network, checkpoint)"
        )
    return {"hyper_parameters": {}, **content}


def read_content(path: Path) -> dict[str, Any]:
    """All that a file of weights holds: the weights alone, or what a training has noted beside them.

    No code that the file may contain is run.

    Raises:
        InputError: the file is missing, damaged or unsafe, or holds no state dict.
    """
    return dict(_read(path)[0])


def load_strictly(network: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Load a complete set of weights, or change nothing.

    Raises:
        InputError: names or shapes differ; the message names the first of them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.networks.weights import load_strictly
        >>> network, other = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> load_strictly(network, other.state_dict(), source="other.pt")
        >>> torch.equal(network.weight, other.weight)
        True
    """
    check_architecture(network, weights, source=source)
    network.load_state_dict(dict(weights), strict=True)


def check_architecture(network: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Check that a state dict fits a network.

    Raises:
        InputError: names or shapes differ; the message names the first of them.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.networks.weights import check_architecture
        >>> check_architecture(nn.Linear(4, 3), nn.Linear(4, 3).state_dict(), source="network.pt")
    """
    own = network.state_dict()
    problems = [f"has no {name!r}" for name in own if name not in weights]
    problems += [f"has an unknown {name!r}" for name in weights if name not in own]
    problems += [
        f"has {name!r} of shape {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise InputError(
            f"{source} is a checkpoint of another architecture than {type(network).__name__}: it {problems[0]}{more}; "
            "build the network with the arguments it was trained with"
        )


def _read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """All that a file holds, and the state dict in it."""
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: give the path of a .safetensors, .pt or .ckpt file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_tensors(path)
    except InputError:
        raise
    except Exception as error:  # a damaged file may make the readers raise anything
        reason = in_a_line(error, at_most=200)
        raise InputError(
            f"{path} cannot be read as weights ({type(error).__name__}: {reason}): is it complete?"
        ) from error
    return content, _weights_in(content, path)


def _weights_in(content: Any, path: Path) -> Mapping[str, Tensor]:
    if _is_state_dict(content):
        return cast("Mapping[str, Tensor]", content)
    entries = content.items() if isinstance(content, Mapping) else []
    held = [key for key, value in entries if _is_state_dict(value) and (value or key == _KEYS[0])]
    if not held:
        raise InputError(f"{path} holds no state dict: save network.state_dict(), or use export_student(path)")
    known = [key for key in _KEYS if key in held]
    if not known and len(held) > 1:
        raise InputError(
            f"{path} holds several state dicts ({', '.join(map(str, held))}): save the one that is meant in a file of "
            "its own"
        )
    key = (known or held)[0]
    if key != _KEYS[0]:
        warnings.warn(f"{path}: what it holds under {key!r} is read", stacklevel=4)
    return cast("Mapping[str, Tensor]", content[key])


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _load_tensors(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # A pickle that PyTorch did not write; what follows refuses it.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is refused: it is not a plain weights file, and unpickling it could run code; "
            "save network.state_dict(), or convert it to .safetensors if you trust it"
        ) from error
