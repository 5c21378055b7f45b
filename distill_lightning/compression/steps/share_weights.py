"""Steps that let weights share values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from torch import nn
from torch.nn.utils import parametrize

from distill_lightning.compression.access.parameters import join_path, names_of_parameters
from distill_lightning.compression.access.targets import Targets, match_layers
from distill_lightning.compression.access.weights import histogram_of, weight_names
from distill_lightning.compression.steps.base import Order, Step, TargetedStep, Work
from distill_lightning.compression.steps.coverage import check_coverage
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.compression.values.codebook import Init, share_weights
from distill_lightning.compression.values.hashed import hash_weights
from distill_lightning.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ShareWeights(TargetedStep):
    """Makes every weight of a layer one of ``k`` values, found by k-means, see `share_weights`.

    A file then holds the values and a few bits for each weight; time and multiply-accumulates do not change. A
    recurrent layer has ``k`` values for each of its weights; biases are left alone. Weights that are zero, because they
    are pruned or belong to a padding row, stay zero: zero is then one of the ``k`` values. This replaces their masks.

    The gradient of a value is the sum of the gradients of its weights, often hundreds: SGD needs a smaller learning
    rate than before, or it diverges; Adam does not.

    ::

        {class_path: ShareWeights, init_args: {k: {"Conv2d": 256, "Linear": 32}, finetune_epochs: 3}}

    Args:
        k: number of values, from 1 to 256; or numbers by pattern, see `Targets`, where the first pattern that matches a
            layer counts. Without ``targets``, these patterns are the targets.
        init: the first values, see `kmeans`: ``"linear"``, ``"density"``, ``"random"`` or ``"kmeans++"``.
        finetune: whether the values continue to train; the assignment of weights to values never changes.

    Raises:
        InputError: ``k`` or ``init`` is invalid.

    Han, Mao, Dally: *Deep Compression*, https://arxiv.org/abs/1510.00149
    """

    order = Order.VALUES

    k: int | dict[str, int] = 16
    init: Init = "linear"
    finetune: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = list(self.k.values()) if isinstance(self.k, dict) else [self.k]
        wrong = [number for number in numbers if isinstance(number, bool) or number not in range(1, 257)]
        self.check_known(init=get_args(Init))
        self.refuse(
            (bool(wrong), f"k must be 1 to 256 values, got {wrong[:1]}"),
            (self.k == {}, "k is empty: give a number, or one for each pattern"),
        )

    def start(self) -> Work:
        """The work of this step in one run."""
        return _Sharing(self)

    def find(self, piece: Workpiece) -> list[str]:
        """The paths of the layers whose weights are shared.

        Raises:
            InputError: there are none, or most of the network's weights are something else.
        """
        by_pattern = isinstance(self.k, dict) and self.targets is None
        targets = list(self.k) if isinstance(self.k, dict) and by_pattern else self.targets
        return _free_layers(piece, self, targets, argument="k" if by_pattern else "targets")

    def act(self, piece: Workpiece) -> None:
        """Cluster the weights."""
        paths = self.find(piece)
        values = self._values_of(piece, paths)
        kept_zero = []
        for path in paths:
            layer = piece.network.get_submodule(path)
            for name in weight_names(layer):
                where = join_path(path, name)
                weight = getattr(layer, name)
                masked = piece.masks.kept.pop(where, None) is not None
                piece.record("codebook", where, histogram_of(weight))
                # A layer of zeros has yet to learn.
                keep_zero = bool((weight == 0).any()) and (masked or bool(weight.any()))
                try:
                    share_weights(
                        layer,
                        k=values[path],
                        init=self.init,
                        keep_zero=keep_zero,
                        frozen=not self.finetune and weight.requires_grad,
                        names=[name],
                        seed=piece.seed,
                    )
                except InputError as error:
                    raise InputError(f"{where}: {error}") from error
                kept_zero += [where] if masked else []
        if kept_zero:
            piece.note(
                f"{self.title} keeps the zeros of {len(kept_zero)} pruned weights as shared values, without masks"
            )
        piece.changed = True

    def _values_of(self, piece: Workpiece, paths: list[str]) -> dict[str, int]:
        """The number of values of each layer."""
        if isinstance(self.k, int):
            return dict.fromkeys(paths, self.k)
        found: dict[str, int] = {}
        for pattern, number in self.k.items():
            matched = match_layers(piece.network, pattern, fits=_has_weights, what=_WHAT, argument="k")
            for path in matched:
                found.setdefault(path, number)
        for path in paths:
            if path not in found:
                raise InputError(f"ShareWeights: no pattern of k matches {path!r}: add one, or exclude the layer")
        return found


@dataclass(frozen=True, kw_only=True)
class HashShare(TargetedStep):
    """Makes every weight of a layer one of few values, or its negative, by a hash of its place, see `hash_weights`.

    A file then holds only the values; time, multiply-accumulates and memory do not change. The values start as close to
    the weights as they can, which is not close, so much training is needed afterwards. Embeddings with a padding row
    are left out, because the row would not stay zero.

    Args:
        ratio: weights per value, at least 1.

    Raises:
        InputError: the ratio is below 1.

    Chen, Wilson, Tyree, Weinberger, Chen: *Compressing Neural Networks with the Hashing Trick*,
    https://arxiv.org/abs/1504.04788
    """

    order = Order.VALUES

    ratio: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = not 1 <= self.ratio < math.inf
        self.refuse((wrong, f"ratio is the number of weights per value, at least 1, got {self.ratio}"))

    def start(self) -> Work:
        """The work of this step in one run."""
        return _Sharing(self)

    def find(self, piece: Workpiece) -> list[str]:
        """The paths of the layers whose weights are hashed.

        Raises:
            InputError: there are none, or most of the network's weights are something else.
        """
        return _free_layers(piece, self, self.targets, reason_of=_no_hash)

    def act(self, piece: Workpiece) -> None:
        """Replace the weights by values."""
        paths = self.find(piece)
        for path in paths:
            for name in weight_names(piece.network.get_submodule(path)):
                where = join_path(path, name)
                if where in piece.masks.kept and not bool(piece.masks.kept[where].all()):
                    raise InputError(f"HashShare: {where!r} is pruned, and hashed weights have no zeros: exclude it")
        for number, path in enumerate(paths):
            layer = piece.network.get_submodule(path)
            for name in hash_weights(layer, ratio=1 / self.ratio, seed=piece.seed * 1_000_003 + number):
                piece.masks.kept.pop(join_path(path, name), None)
        piece.changed = True


class _Sharing(Work):
    step: ShareWeights | HashShare

    def rehearse(self, piece: Workpiece) -> bool:
        """Find the layers."""
        self.step.find(piece)
        return False


_WHAT = "layers with weights"


def _has_weights(layer: nn.Module) -> bool:
    return bool(weight_names(layer))


def _no_hash(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
        return "it is an embedding with a padding row, which would not stay zero"
    return None


def _no_reason(_: nn.Module) -> str | None:
    return None


def _free_layers(
    piece: Workpiece,
    step: Step,
    targets: Targets | None,
    *,
    reason_of: Callable[[nn.Module], str | None] = _no_reason,
    argument: str = "targets",
) -> list[str]:
    """The layers whose weights can be replaced by values.

    Raises:
        InputError: a named layer shares a weight with another one, or its weights are already computed.
    """
    network = piece.network
    paths = match_layers(network, targets, step.exclude, fits=_has_weights, what=_WHAT, argument=argument)
    known = names_of_parameters(network)
    free: list[str] = []
    for path in paths:
        layer = network.get_submodule(path)
        names = weight_names(layer)
        reason = reason_of(layer)
        if reason is None and any(parametrize.is_parametrized(layer, name) for name in names):
            reason = "its weights are computed already (quantized or shared)"
        if reason is None:
            others = [known[getattr(layer, name)] for name in names if len(known[getattr(layer, name)]) > 1]
            if others:
                reason = f"it shares a weight with another layer ({' and '.join(others[0])}), which would be untied"
        if reason is None:
            free.append(path)
        elif targets is not None:
            raise InputError(f"{step.title}: {path!r}: {reason}: exclude it")
        else:
            piece.leave(path, reason)
    weights = [join_path(path, name) for path in free for name in weight_names(network.get_submodule(path))]
    check_coverage(piece, step, weights, targets=targets)
    if not free:
        raise InputError(f"{step.title}: no layer of {type(network).__name__} is left whose weights are its own")
    return free
