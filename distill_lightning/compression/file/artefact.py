"""One small file with a whole compressed network, which is rebuilt from it without any further argument."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from distill_lightning.compression.access.computed import bake as bake_weights
from distill_lightning.compression.access.computed import computed, original_of
from distill_lightning.compression.access.parameters import join_path, names_of_parameters
from distill_lightning.compression.file.format import read_packed, write_packed
from distill_lightning.compression.file.packed import (
    Coding,
    Packed,
    encode,
    pack_bitmask,
    pack_csr,
    pack_dense,
    pack_shared,
    pack_stored,
    unpack,
)
from distill_lightning.compression.structure.changes import plain_copy, plain_structure, rebuild_structure, structure_of
from distill_lightning.errors import InputError, check_one_of, refusing
from distill_lightning.networks import Recipe, build_from, recipe_of
from distill_lightning.networks.budget import Budget, bytes_of_tensors
from distill_lightning.networks.provenance import without_weights
from distill_lightning.networks.weights import load_strictly, read_checkpoint

_KIND = "network"
_MAGIC = b"DLPK"
# What a network may take before it is shrunk, at any rate and for each byte of what is left of it.
_SMALL = 2**28
_RATIO = 1000
# A file's content may be wrong in any of these ways although its checksum fits, if something else wrote it.
_DAMAGES = (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError)


@torch.no_grad()
def write_artefact(network: nn.Module, path: Path | str, *, coding: Coding = "plain") -> int:
    """Write a network to one packed file, from which `load_compressed` rebuilds it.

    The weights are stored with the values that the network computes with in eval mode, each tensor in the smallest of
    the forms that give these back: quantization codes (those of zeros left out), indices into a codebook, hashed
    values, a bitmask or compressed rows and what is not zero, or plain. (A negative zero may come back as zero, which
    equals it.) Equal tensors, and so tied ones, are stored once. How the network was built and how its structure was
    changed is in the file, too.

    Args:
        network: compressed or not; it is left as it is.
        path: path of the file; an existing one is replaced.
        coding: coding of the bytes: ``"plain"``, ``"deflate"`` or ``"huffman"``, used for each part only if it makes
            the part smaller.

    Returns:
        The file's bytes.

    Raises:
        InputError: the coding is unknown, the network holds numbers of a type that is not stored, a weight is computed
            from one that another layer uses as it is, or the file cannot be written.
    """
    check_one_of("coding", coding, get_args(Coding))
    network = getattr(network, "_orig_mod", network)
    _check_ties(network)
    stored = _stored(network)
    names: dict[bytes, list[str]] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in plain_copy(network).state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name!r} of {type(network).__name__} is a {type(value).__name__}: only tensors are kept")
        tensors[name] = value
        names.setdefault(_digest(value), []).append(name)
    packed = {}
    for same in names.values():
        value = tensors[same[0]]
        known = [form for name in same for form in stored.get(name, ())]
        packed[same[0]] = _smallest(value, known, coding)
    header = {
        "kind": _KIND,
        "class": type(network).__name__,
        "recipe": _plain(without_weights(recipe_of(network))),
        "structure": _plain(plain_structure(structure_of(network))),
        "same": {name: same[0] for same in names.values() for name in same[1:]},
    }
    return write_packed(path, packed, header)


def load_compressed(
    path: Path | str, network: nn.Module | None = None, *, bake: bool = True, limit: int | None = None
) -> nn.Module:
    """Load the network of a packed file (`write_artefact`), or of a checkpoint of a training that compressed it.

    Only tensors and plain values are read, never pickled code.

    Args:
        path: path of the file.
        network: built like the compressed one before its compression, and changed in place; only needed if no factory
            of this package built that one.
        bake: for a checkpoint, whether computed weights (of quantizers and the like) become parameters; with ``False``
            they stay computed from the trained weights. A packed file only has the computed ones.
        limit: largest number of bytes of the network's tensors, each of which counts at least 64 KiB, before and after
            the changes of its structure together; ``None``: 1,000 for each byte of the tensors in the file, at least
            256 MiB, and of these tensors as many as `read_packed` reads.

    Returns:
        A plain network on the CPU (a given one stays where it is), in eval mode: its weights have the compressed values
        and are parameters; inputs that were quantized still are. Its outputs in eval mode are bit for bit those of the
        network that was written.

    Raises:
        InputError: the file does not exist, is damaged or is of another kind, ``network`` is needed or has another
            structure, the sizes that the file gives are above the limit, or a packed file is to be read without baking.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}: give the path of a packed network or of a checkpoint")
    with path.open("rb") as file:
        is_packed = file.read(len(_MAGIC)) == _MAGIC
    if is_packed and not bake:
        raise InputError(f"{path} is a packed network, whose weights are baked: give a checkpoint with bake=False")
    loaded = _from_packed(path, network, limit) if is_packed else _from_checkpoint(path, network, limit, bake=bake)
    return loaded.eval()


def _from_packed(path: Path, network: nn.Module | None, limit: int | None) -> nn.Module:
    header, tensors = read_packed(path, limit=limit)
    if header.get("kind") != _KIND:
        raise InputError(f"{path} holds packed tensors but no network: give a file that write_artefact wrote")
    with refusing(f"{path} is damaged", *_DAMAGES):
        tensors |= {name: tensors[first] for name, first in header["same"].items()}
        # What wrote the file may have left in a recipe what reads other files.
        recipe = without_weights(header["recipe"])
        with _budget(path, tensors, limit):
            network = _built(path, network, recipe, header["class"])
            rebuild_structure(network, header["structure"], limit=limit)
        _load(network, tensors, path)
    return network


def _from_checkpoint(path: Path, network: nn.Module | None, limit: int | None, *, bake: bool) -> nn.Module:
    checkpoint = read_checkpoint(path)
    told = checkpoint.get("compression")
    if not told:
        raise InputError(
            f"{path} is the checkpoint of a training that compressed nothing: load it with its module's "
            "load_from_checkpoint"
        )
    with refusing(f"{path} is damaged", *_DAMAGES):
        attribute = told["attribute"]
        prefix = f"{attribute}."
        tensors = {
            name.removeprefix(prefix): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        }
        # A module's constructor may use another name for its network, under which "recipes" holds it.
        known = told.get("recipe") or checkpoint.get("recipes", {}).get(attribute)
        with _budget(path, tensors, limit):
            network = _built(path, network, without_weights(known), f"{attribute!r}")
            rebuild_structure(network, told.get("structure", {}), limit=limit)
        _load(network, tensors, path)
        # Some quantizers draw in train mode.
        network.eval()
        return bake_weights(network) if bake else network


def _budget(path: Path, tensors: Mapping[str, Tensor], limit: int | None) -> Budget:
    largest = max(_SMALL, _RATIO * bytes_of_tensors(tensors)) if limit is None else limit
    return Budget(largest, source=str(path), way_out="if it is to be trusted, give load_compressed a larger limit")


def _built(path: Path, network: nn.Module | None, known: Recipe | None, what: str) -> nn.Module:
    if network is not None:
        return network
    if known is None:
        raise InputError(
            f"{path} does not say how its network {what} was built, because no factory of this package built it: "
            "give load_compressed(path, network) one that is built as it was before its compression"
        )
    return build_from(known)


def _load(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load strictly, in the types that the tensors have."""
    first: dict[int, str] = {}
    for name, own in network.state_dict(keep_vars=True).items():
        stored = tensors.get(name)
        if stored is None:
            continue
        if stored.dtype != own.dtype:
            own.data = own.data.to(stored.dtype)
        other = first.setdefault(id(own), name)
        if not _are_same(stored, tensors[other]):
            raise InputError(
                f"{path} has different values for {other!r} and {name!r}, which are one tied weight in the network as "
                "it was built: compress both or neither"
            )
    load_strictly(network, tensors, source=str(path))


def _plain(value: Any) -> Any:
    """The value with lists in place of tuples, as JSON would return it."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def _check_ties(network: nn.Module) -> None:
    """Refuse ties that a plain network cannot have."""
    for names in names_of_parameters(network).values():
        computed_names = [name for name in names if "parametrizations" in name.split(".")]
        plain = [name for name in names if name not in computed_names]
        if plain and computed_names:
            other = computed_names[0].replace("parametrizations.", "").removesuffix(".original")
            raise InputError(
                f"{plain[0]!r} is tied to {other!r}, and only that one is quantized or shared: compress both or neither"
            )


def _stored(network: nn.Module) -> dict[str, list[Packed]]:
    """The packed forms of the weights that are computed from others, by the name of the baked weight."""
    found: dict[str, list[Packed]] = {}
    for path, layer in network.named_modules(remove_duplicate=False):
        for name, entry in computed(layer).items():
            stored = entry.stored(original_of(layer, name))
            if stored is not None:
                found[join_path(path, name)] = pack_stored(stored)
    return found


def _smallest(tensor: Tensor, computed: list[Packed], coding: Coding) -> Packed:
    """The form of a tensor that takes the fewest bytes."""
    forms = [pack_dense(tensor), *computed]
    if tensor.is_floating_point() and tensor.numel() > 1:
        forms += _found(tensor)
    # Coding does not make a form that is far larger than another one the smallest.
    least = min(form.nbytes for form in forms)
    forms = [form for form in forms if form.nbytes <= 4 * least]
    if coding != "plain":
        forms = [encode(form, coding) for form in forms]
    for form in sorted(forms, key=lambda form: form.nbytes):
        if form.codec == "dense" or _are_same(unpack(form), tensor.cpu()):
            return form
    return pack_dense(tensor)


def _found(tensor: Tensor) -> Iterator[Packed]:
    """Forms that follow from the values: few different ones, or many zeros."""
    if _few(tensor):
        yield pack_shared(tensor)
    present = tensor[tensor != 0]
    if len(present) < tensor.numel():
        values = pack_shared(present) if len(present) > 1 and _few(present) else None
        yield pack_bitmask(tensor, values)
        yield pack_csr(tensor, values)


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have equal entries, of which NaN equals itself."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _few(tensor: Tensor) -> bool:
    """Whether there are few enough values for a codebook; most tensors show quickly that there are more."""
    flat = tensor.flatten()
    return len(torch.unique(flat[:4096])) <= 256 and len(torch.unique(flat)) <= 256


def _digest(tensor: Tensor) -> bytes:
    """A digest that is the same for equal tensors only."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy() if len(flat) else b""
    told = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(told + bytes(content)).digest()
