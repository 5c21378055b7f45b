"""Network weights in files: only tensors are read, and a network is not changed unless all of them fit."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_lightning.errors import InputError
from distill_lightning.layers import uncompiled


def read_weights(path: Path, *, part: str | None = None) -> dict[str, Tensor]:
    """Read a network's state dict from a file, without running any code that the file may contain.

    Args:
        path: path of the file.
        part: the submodule whose weights are read; ``None``: the student of a checkpoint, and otherwise everything.

    Raises:
        InputError: the file is missing, damaged or unsafe, or holds no state dict, or nothing of that part.

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


def write_weights(network: nn.Module, path: Path) -> Path:
    """Write a network's state dict.

    Args:
        network: the plain network, or what `torch.compile` returned for it.
        path: ``.safetensors``, or ``.pt`` / ``.pth`` for `torch.save`.

    Returns:
        The path.

    Raises:
        InputError: the suffix is another one.

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
    plain = uncompiled(network)
    # Clones, because safetensors refuses tied weights, and torch.save would write a view's whole storage.
    state = {name: value.detach().cpu().clone().contiguous() for name, value in plain.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
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
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} cannot be read as weights ({type(error).__name__}: {reason}): is it complete?"
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise InputError(f"{path} holds no state dict: save network.state_dict(), or use export_student(path)")
    return content, weights


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
