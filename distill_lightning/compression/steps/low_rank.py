"""The step that replaces weights by factors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from distill_lightning.compression.access.calibration import calibrating, inputs_of, watching
from distill_lightning.compression.access.hooks import check_hooks, has_state_hooks
from distill_lightning.compression.access.moments import input_moments
from distill_lightning.compression.access.parameters import join_path, shared_outside
from distill_lightning.compression.access.readings import read_from_outside
from distill_lightning.compression.access.targets import match_layers
from distill_lightning.compression.factor.convolutions import ConvChain
from distill_lightning.compression.factor.decompositions import exact
from distill_lightning.compression.factor.factoring import (
    METHODS,
    Factored,
    Method,
    check_replaceable,
    factorize,
    replace_layer,
)
from distill_lightning.compression.factor.layers import LowRankEmbedding, LowRankLinear, TrainEmbedding, TrainLinear
from distill_lightning.compression.factor.products import write_product
from distill_lightning.compression.factor.ranks import UnfactorableError, rank_rule
from distill_lightning.compression.shrink.attention import check_attention
from distill_lightning.compression.steps.base import Order, TargetedStep, Work
from distill_lightning.compression.steps.coverage import check_coverage
from distill_lightning.compression.steps.trial import try_change
from distill_lightning.compression.steps.unit_trials import convert
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.compression.structure.changes import note_change
from distill_lightning.errors import InputError, check_one_of

_METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: get_args(Method),
    nn.Linear: ("svd", "tt"),
    nn.Embedding: ("svd", "tt"),
    nn.LSTM: ("svd",),
    nn.GRU: ("svd",),
    nn.RNN: ("svd",),
}
_NAMES = {kind.__name__: kind for kind in _METHODS}
_FACTORS = (
    ConvChain, LowRankLinear, LowRankEmbedding, TrainLinear, TrainEmbedding
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LowRank(TargetedStep):
    """Replaces weights of `Linear`, `Conv2d`, `Embedding`, `LSTM`, `GRU` and `RNN` by factors, see `factorize`.

    With ``targets``, a layer that cannot be factored is an error; without, it is left out, and the report says why:
    grouped convolutions, layers that share a weight with another one, and budgets that even rank 1 exceeds. A layer at
    several places is factored once. Factors of recurrent layers save bytes, but neither time nor multiply-accumulates.
    Convolutions over one or three dimensions and transposed convolutions are left alone.

    ::

        {class_path: LowRank, init_args: {method: {Conv2d: tucker2, Linear: svd}, rank: "params:0.5"}}

    Args:
        rank: number of components to keep: a number, a fraction of full rank, ``"energy:0.9"``, ``"params:0.5"``,
            ``"macs:0.5"`` or ``"evbmf"``; see `rank_rule`. Budgets apply to each layer.
        method: ``"svd"`` (of a convolution by channel), ``"svd_spatial"``, ``"tucker2"``, ``"cp"`` or ``"tt"``, for the
            layers that have it; or one for each class of layers by name; other classes are then left alone.
        data_aware: linear layers and convolutions with ``"svd"`` approximate their outputs on the calibration data
            instead of their weights; other layers their weights.
        damping: damping of the inputs' second moment for ``data_aware``, not negative, see `whitened_svd`; ``None`` for
            0.01.
        only_if_smaller: whether to leave a layer as it is if the factors would not have fewer weights.
        parts: number of cores in the tensor train of a linear layer or an embedding; ``None`` for 3.
        convert_attention: whether to replace every `nn.MultiheadAttention` first by an `Attention`, whose linear layers
            can be factored.

    Raises:
        InputError: the method, class or rank is invalid, ``data_aware`` does not fit the method, or ``damping`` or
            ``parts`` would have no effect.
    """

    order = Order.STRUCTURE
    tries_itself = True

    rank: int | float | str
    method: Method | dict[str, Method] = "svd"
    data_aware: bool = False
    damping: float | None = None
    only_if_smaller: bool = True
    parts: int | None = None
    convert_attention: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        rank_rule(self.rank)
        method, methods = self.method, self._methods
        trains = any(name == "tt" and kind is not nn.Conv2d for kind, name in methods.items())
        aware = any(_is_data_aware(kind, name) for kind, name in methods.items())
        self.refuse(
            (self.parts is not None and self.parts < 2, f"parts must be at least 2, got {self.parts}"),
            (
                self.parts is not None and not trains,
                f"parts is for method 'tt' of Linear and Embedding, not {method!r}",
            ),
            (
                self.damping is not None and self.damping < 0,
                f"damping must not be negative, got {self.damping}",
            ),
            (
                self.damping is not None and not self.data_aware,
                "damping is for data_aware=True: set it, or leave damping out",
            ),
            (
                self.data_aware and not aware,
                f"data_aware=True is for method 'svd' of Linear and Conv2d, not for {method!r}",
            ),
        )

    @property
    def _methods(self) -> dict[type[nn.Module], str]:
        """The classes that are factored, and their methods."""
        return _methods_of(self.method)

    def check_layers(self, network: nn.Module) -> None:
        """Refuse hooks that would not fit what replaces a layer."""
        if self.convert_attention:
            check_attention(network)
        elif self.targets is not None:
            for path in match_layers(
                network, self.targets, self.exclude, fits=lambda module: type(module) in self._methods, what="layers"
            ):
                check_hooks(path, network.get_submodule(path))

    def start(self) -> Work:
        """The work of this step in one run."""
        return _Factoring(self)

    def find(self, piece: Workpiece) -> list[str]:
        """The paths of the layers to factor, after attention is converted.

        Raises:
            InputError: there are none, most of the network's weights are something else, or a named one cannot be
                factored.
        """
        if self.convert_attention:
            if isinstance(piece.network, nn.MultiheadAttention):
                raise InputError("LowRank: the network itself is a MultiheadAttention: put it into another module")
            convert(piece, self.title)
        return self._paths(piece)

    def act(self, piece: Workpiece) -> None:
        """Factor the layers, all of them from the current network."""
        network = piece.network
        paths = self.find(piece)
        sizes, moments = self._input_sizes(piece, paths), self._moments(piece, paths)
        factored = {}
        for path in paths:
            found = self._factored(piece, path, sizes.get(path), moments.get(path))
            if found is not None:
                factored[path] = found
        made = {path: one.layer for path, one in factored.items() if one.description is not None}
        for path, one in factored.items():
            piece.note(f"{path}: {one.note}")
        if not made:
            piece.note(f"{self.title} has factored no layer: no factors were smaller or within the budget")
            return
        try_change(
            piece,
            self.title,
            list(made),
            change=lambda changed, paths: [replace_layer(changed, path, copy.deepcopy(made[path])) for path in paths],
            expect=lambda right, paths: [write_product(right.get_submodule(path), made[path]) for path in paths],
        )
        for path, layer in made.items():
            replace_layer(network, path, layer)
        note_change(network, "low_rank", {path: layer.description for path, layer in made.items()})
        piece.changed = True

    def _paths(self, piece: Workpiece) -> list[str]:
        network = piece.network
        if type(network) in self._methods:
            raise InputError(f"LowRank: the network itself is a {type(network).__name__}: put it into another module")
        inside = {part for module in network.modules() if isinstance(module, _FACTORS) for part in module.modules()}
        paths = match_layers(
            network,
            self.targets,
            self.exclude,
            fits=lambda module: type(module) in self._methods and module not in inside,
            what=f"layers of a class with method {self.method!r} ({', '.join(k.__name__ for k in self._methods)})",
        )
        read = read_from_outside(network, paths, piece.example_inputs)
        if self.targets is not None:
            for path in paths:
                check_replaceable(network, path)
                if path in read:
                    raise InputError(f"LowRank: the network reads {read[path]!r} of {path!r} itself: exclude it")
            return paths
        free = []
        for path in paths:
            shared = shared_outside(network, network.get_submodule(path))
            if shared:
                piece.leave(path, f"shares a weight with {shared}")
            elif has_state_hooks(network.get_submodule(path)):
                piece.leave(path, "it has hooks of its state dict, which fit only its own tensors")
            elif path in read:
                piece.leave(path, f"the network reads its {read[path]!r} itself")
            else:
                free.append(path)
        weights = [join_path(path, name) for path in free for name, _ in network.get_submodule(path).named_parameters()]
        rule = f"only {', '.join(kind.__name__ for kind in self._methods)} are factored"
        check_coverage(piece, self, weights, targets=None, rule=rule)
        return free

    def _moments(self, piece: Workpiece, paths: Sequence[str]) -> dict[str, Tensor]:
        """The second moments of the inputs of the layers whose outputs are approximated."""
        layers = {path: piece.network.get_submodule(path) for path in paths}
        chosen = {
            path: layer
            for path, layer in layers.items()
            if _is_data_aware(type(layer), self._methods[type(layer)]) and getattr(layer, "groups", 1) == 1
        }
        if not self.data_aware or not chosen:
            return {}
        batches = piece.batches("LowRank(data_aware=True)")
        return {path: moment[0] for path, moment in input_moments(piece.network, chosen, batches, exact=True).items()}

    def _factored(
        self, piece: Workpiece, path: str, input_size: Sequence[int] | None, moment: Tensor | None
    ) -> Factored | None:
        """The factors of a layer, or ``None`` if it has none."""
        layer = piece.network.get_submodule(path)
        method = self._methods[type(layer)]
        try:
            found = factorize(
                layer,
                rank=self.rank,
                method=cast("Method", method),
                only_if_smaller=self.only_if_smaller,
                moment=moment,
                damping=0.01 if self.damping is None else self.damping,
                input_size=input_size,
                parts=3 if self.parts is None else self.parts,
            )
        except InputError as error:
            if self.targets is None and isinstance(error, UnfactorableError):
                piece.leave(path, str(error))
                return None
            raise type(error)(f"{path}: {error}") from error
        if found.description is not None and method in ("svd", "svd_channel") and not isinstance(layer, nn.RNNBase):
            values = torch.linalg.svdvals(exact(cast("Tensor", layer.weight)).flatten(1))
            ranks = found.description.get("ranks") or [found.description["rank"]]
            piece.record("spectra", path, {"values": values.tolist(), "rank": ranks[0]})
        return found

    def _input_sizes(self, piece: Workpiece, paths: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Height and width of each convolution's input; the largest if it runs several times."""
        if rank_rule(self.rank).kind != "macs":
            return {}
        sizes: dict[str, tuple[int, int]] = {}

        def look(path: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
            high, wide = inputs[0].shape[-2:]
            sizes[path] = max(sizes.get(path, (0, 0)), (int(high), int(wide)), key=lambda size: size[0] * size[1])

        layers = {path: piece.network.get_submodule(path) for path in paths}
        convolutions = {path: layer for path, layer in layers.items() if isinstance(layer, nn.Conv2d)}
        with watching(convolutions, look), calibrating(piece.network), torch.no_grad():
            piece.network(*inputs_of(piece.example_inputs))
        return sizes


class _Factoring(Work):
    step: LowRank

    def rehearse(self, piece: Workpiece) -> bool:
        """Find the layers."""
        self.step.find(piece)
        return False


def _methods_of(method: Method | Mapping[str, Method]) -> dict[type[nn.Module], str]:
    """The classes that are factored, and their methods."""
    if isinstance(method, str):
        check_one_of("LowRank: method", method, METHODS)
        return {kind: method for kind, known in _METHODS.items() if method in known}
    if not method:
        raise InputError("LowRank: method is empty: give one method, or one for each class of layers")
    for name, own in method.items():
        check_one_of("LowRank: class in method", name, list(_NAMES))
        check_one_of(f"LowRank: method of {name}", own, _METHODS[_NAMES[name]])
    return {_NAMES[name]: own for name, own in method.items()}


def _is_data_aware(kind: type[nn.Module], method: str) -> bool:
    return kind in (nn.Linear, nn.Conv2d) and method in ("svd", "svd_channel")
