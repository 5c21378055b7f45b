"""A trial of what changes a network's structure, beside a network of which it is known what it returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from distill_lightning.compression.access.calibration import inputs_of, without_fast_path
from distill_lightning.compression.access.copies import copy_network
from distill_lightning.compression.access.parameters import cuda_devices
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.errors import InputError, in_a_line

Act = Callable[[nn.Module, Sequence[str]], object]
"""Changes the named parts of a network, in place."""
Cut = Callable[[Tensor], Tensor]
"""What is left of a tensor that the caller passes in or receives."""
TOLERANCE = 1e-5
"""The largest difference that is rounding, as a share of the largest output."""


def try_change(
    piece: Workpiece, title: str, parts: Sequence[str], *, change: Act, expect: Act | None, cut: Cut | None = None
) -> None:
    """Refuse a change of a network's structure after which it does not return what it must; it is not changed here.

    A changed copy runs on the example inputs, in eval mode and, without dropout, in train mode. Beside it runs another
    copy, which has the old structure and returns what is right. They may differ by `TOLERANCE`; where they do not, the
    same networks in float64 decide, so that no rounding is taken for a fault.

    Args:
        piece: the workpiece.
        title: the step, for the message.
        parts: paths of the layers that change, of which the message names the first that cannot.
        change: makes the change.
        expect: makes a network of the old structure return what the changed one must, by masks for example; ``None``
            if only the shapes of its outputs are known.
        cut: for a change that the caller sees: what is left of the inputs after the first one, and of the outputs.

    Raises:
        InputError: the changed network does not run, or returns tensors of other shapes or other numbers.
    """
    fault = _fault_of(piece, parts, change, expect, cut)
    if fault is None:
        return
    for part in parts if len(parts) > 1 else ():
        own = _fault_of(piece, [part], change, expect, cut)
        if own is not None:
            parts, fault = [part], own
            break
    named = ", ".join(map(repr, parts[:3])) + (" ..." if len(parts) > 3 else "")
    raise InputError(f"{title}: {named} cannot be changed so: {fault}: exclude it")


def check_runs(piece: Workpiece, title: str, before: nn.Module) -> None:
    """Refuse that the network no longer runs, or returns tensors of other shapes, after a step has changed it.

    Args:
        piece: the workpiece.
        title: the step, for the message.
        before: a copy of the network before the change.

    Raises:
        InputError: it does not run as before.
    """
    fault = _compare(_Pair(before, copy_network(piece.network)), piece, values=False)
    if fault is not None:
        raise InputError(f"{title}: the network cannot be changed so: {fault.reason}")


class _Fault(NamedTuple):
    """What is wrong, in words; if it is the numbers, by which share of the largest output they are off in a mode."""

    reason: str
    mode: str = ""
    share: float = 0.0


class _Pair(NamedTuple):
    """A network that returns what is right, and one that may not."""

    right: nn.Module
    changed: nn.Module


def _fault_of(piece: Workpiece, parts: Sequence[str], change: Act, expect: Act | None, cut: Cut | None) -> str | None:
    """What is wrong with the changed network, in words."""

    def pair(*, exact: bool) -> _Pair:
        right, changed = copy_network(piece.network), copy_network(piece.network)
        if exact:
            right, changed = right.double(), changed.double()
        if expect is not None:
            expect(right, parts)
        change(changed, parts)
        return _Pair(right, changed.double() if exact else changed)

    values = expect is not None
    fault = _compare(pair(exact=False), piece, values=values, cut=cut)
    if fault is not None and fault.share:
        doubled, inputs = pair(exact=True), _exact(inputs_of(piece.example_inputs))
        # A copy, because train mode changes BatchNorm's statistics.
        if not isinstance(_run_right(copy_network(doubled.right), inputs, fault.mode)[1], Exception):
            fault = _compare(doubled, piece, values=values, cut=cut, exact=True)
        elif fault.share < _rounding(piece.network):
            return None
    return None if fault is None else fault.reason


def _compare(
    pair: _Pair, piece: Workpiece, *, values: bool, cut: Cut | None = None, exact: bool = False
) -> _Fault | None:
    inputs = inputs_of(piece.example_inputs)
    inputs = _exact(inputs) if exact else inputs
    for mode in ("eval", "train"):
        fault = _in_mode(pair, piece, inputs, mode, values=values, cut=cut)
        if fault is not None and fault.share and mode == "eval":
            with without_fast_path():
                by_path = _in_mode(pair, piece, inputs, mode, values=values, cut=cut) is None
            if by_path and not any(_is_stale(module) for module in pair.right.modules()):
                piece.note(
                    "PyTorch's fast path of Transformer layers no longer applies, whose numbers in eval mode were "
                    "others, zeros at padded positions: they are now as in train mode"
                )
                fault = None
        if fault is not None:
            return fault
    return None


def _in_mode(
    pair: _Pair, piece: Workpiece, inputs: tuple[Any, ...], mode: str, *, values: bool, cut: Cut | None
) -> _Fault | None:
    inputs, before = _run_right(pair.right, inputs, mode)
    if isinstance(before, Exception):
        # It never ran in this mode on such inputs.
        if mode == "eval":
            piece.note(f"the network does not run on the example inputs, so no change was tried ({_told(before)})")
        return None
    got = _run(pair.changed, inputs if cut is None else (*inputs[:1], *_mapped(inputs[1:], cut)), mode)
    if isinstance(got, Exception):
        return _Fault(f"in {mode} mode the network no longer runs ({_told(got)})")
    if len(before) != len(got):
        return _Fault(f"in {mode} mode the network returned {len(before)} tensors, and now {len(got)}")
    wanted = [one if cut is None or one.shape == new.shape else cut(one) for one, new in zip(before, got, strict=True)]
    for one, new in zip(wanted, got, strict=True):
        if one.shape != new.shape:
            return _Fault(f"in {mode} mode an output had the shape {tuple(one.shape)}, and has {tuple(new.shape)}")
    share = _distance(wanted, got) if values else 0.0
    # In float64 also with inputs that differ by rounding, which may be all that equal samples in a batch differ by.
    again = before if share <= TOLERANCE else _run(pair.right, _mapped(inputs, _nudged), mode, seed=1)
    if isinstance(again, Exception) or _distance(before, again) > TOLERANCE:
        piece.note(
            f"in {mode} mode the network returns other numbers at every run, or for every rounding of its inputs: only "
            "their shapes were compared"
        )
    elif share > TOLERANCE:
        return _Fault(f"in {mode} mode its outputs are off by {share:.2g} of the largest one", mode, share)
    return None


def _run_right(
    network: nn.Module, inputs: tuple[Any, ...], mode: str
) -> tuple[tuple[Any, ...], list[Tensor] | Exception]:
    """What a network as it was returns in a mode, and for which inputs: BatchNorm needs more than one sample.

    The further samples are others: of equal ones it would return the rounding, divided by almost nothing.
    """
    before = _run(network, inputs, mode)
    if isinstance(before, Exception) and mode == "train":
        inputs = _mapped(inputs, _with_others)
        before = _run(network, inputs, mode)
    return inputs, before


@torch.no_grad()
def _run(network: nn.Module, inputs: tuple[Any, ...], mode: str, *, seed: int = 0) -> list[Tensor] | Exception:
    """The tensors that a network returns in a mode, without dropout, or why it does not run."""
    network.train(mode == "train")
    for module in network.modules():
        if isinstance(module, (_DropoutNd, nn.RReLU)):
            module.eval()
        elif isinstance(module, nn.RNNBase):
            module.dropout = 0.0
    without_dropout = _WithoutDropout() if mode == "train" else nullcontext()
    with torch.random.fork_rng(devices=cuda_devices(network)), without_dropout:
        torch.manual_seed(seed)
        try:
            # A copy, because the first operation of a network may be in place.
            return list(_tensors(network(*copy.deepcopy(inputs))))
        except Exception as error:  # a network may raise anything, and that is what is looked for
            return error


class _WithoutDropout(TorchFunctionMode):
    """Inside this context functions drop nothing."""

    _FUNCTIONS = (
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    )  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FUNCTIONS:
            return args[0] if args else kwargs["input"]
        if func is F.multi_head_attention_forward:
            kwargs["training"] = False
        elif func is F.scaled_dot_product_attention:
            # After query, key, value and mask.
            args = (*args[:4], 0.0, *args[5:])
            kwargs.pop("dropout_p", None)
        return func(*args, **kwargs)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {in_a_line(error, at_most=200)}"


def _is_stale(module: nn.Module) -> bool:
    """Whether a Transformer layer was given another activation after it had chosen that of its fast path."""
    if not isinstance(module, nn.TransformerEncoderLayer) or not module.activation_relu_or_gelu:
        return False
    points = torch.linspace(-3, 3, 16, dtype=torch.float64)
    chosen = F.relu if module.activation_relu_or_gelu == 1 else F.gelu
    return not torch.allclose(module.activation(points), chosen(points))


def _distance(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest difference, as a share of the largest entry; numbers that are not finite equal themselves."""
    largest, furthest = 0.0, 0.0
    for one, new in zip(wanted, got, strict=True):
        first, second = _numbers(one), _numbers(new)
        finite = first[first.isfinite()].abs()
        largest = max(largest, float(finite.max())) if len(finite) else largest
        other = ~((first == second) | (first.isnan() & second.isnan()))
        if bool(other.any()):
            furthest = max(furthest, float((first - second)[other].abs().nan_to_num(nan=torch.inf).max()))
    return furthest / max(largest, torch.finfo(torch.float64).tiny)


def _numbers(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().cpu().double().flatten()


def _rounding(network: nn.Module) -> float:
    """What the outputs of a network that cannot run in float64 may be off by."""
    kinds = [tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()]
    return max((torch.finfo(kind).eps ** 0.5 for kind in kinds), default=TOLERANCE)


def _exact(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return _mapped(inputs, lambda part: part.double() if part.is_floating_point() else part)  # type: ignore[no-any-return]


def _with_others(part: Tensor) -> Tensor:
    """The samples of an input, and after them the same ones turned round, or moved if they are symmetrical."""
    if not part.dim():
        return part
    others = part if part.dtype == torch.bool else part.flip(list(range(1, part.dim())))
    if part.is_floating_point() and torch.equal(others, part):
        others = others + _noise(part)
    return torch.cat([part, others])


def _nudged(part: Tensor) -> Tensor:
    return part + 1e-15 * _noise(part) if part.dtype == torch.float64 else part


def _noise(part: Tensor) -> Tensor:
    """Random numbers of a tensor's shape, the same ones each time."""
    return torch.randn(part.shape, generator=torch.Generator().manual_seed(0)).to(part)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(part, change) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(part, change) for part in value) if type(value) in (tuple, list) else value
    return value


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from _tensors(part)
