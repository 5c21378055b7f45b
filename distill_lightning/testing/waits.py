"""Operations that wait for the device, found where there is no device to wait for."""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from distill_lightning.data.batch import tensors_of

_HERE = Path(__file__).parent
_OPTIMIZERS = Path(torch.__file__).parent / "optim"
_OTHERS = {"torch", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics"}
"""Packages whose lines are not the user's."""

_LINES = 4
"""Lines of a stack that are shown, the innermost ones of the user's."""

aten: Any = torch.ops.aten

# A value on the host, or a shape that depends on values.
_WAITING = {
    aten._local_scalar_dense: ".item(), or bool(), int() or float() of a tensor",  # noqa: SLF001
    aten.nonzero: "nonzero, whose shape depends on the values",
    aten.masked_select: "masked_select, whose shape depends on the values",
    aten._unique: "unique, whose shape depends on the values",  # noqa: SLF001
    aten._unique2: "unique, whose shape depends on the values",  # noqa: SLF001
    aten.unique_dim: "unique, whose shape depends on the values",
    aten.unique_consecutive: "unique_consecutive, whose shape depends on the values",
    aten.bincount: "bincount, whose shape depends on the values",
    aten.equal: "torch.equal, whose answer is on the host",
    aten.allclose: "torch.allclose, whose answer is on the host",
}
_MASKED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}

# What needs no operation on the CPU, and copies from any other device.
_TO_HOST = {
    Tensor.tolist: ".tolist()",
    Tensor.numpy: ".numpy()",
    Tensor.cpu: ".cpu()",
    Tensor.__array__: "np.asarray()",
}


class Wait(NamedTuple):
    """An operation that would wait, and where it stands.

    Attributes:
        what: it is.
        stack: the user's lines that lead to it, the innermost last.
    """

    what: str
    stack: str


class Waits:
    """Within it, notes what would wait for a device if the tensors were on one.

    These are ``.item()``, ``bool()`` and the like, ``.cpu()``, ``.tolist()`` and ``.numpy()``, indexing with a boolean
    mask, and operations the shape of whose result depends on values. Of tensors that are on the host whatever the
    device, they are left out: those in ``on_host``, those that are made within without a ``device``, and what is
    computed from such alone; and what PyTorch's own optimisers read.

    Attributes:
        found: what was noted, in its order, and how often.

    Example:
        >>> import torch
        >>> from distill_lightning.testing.waits import Waits
        >>> losses = torch.rand(4)
        >>> with Waits() as waits:
        ...     masked = losses[losses > 0.5].mean()
        ...     filled = losses.masked_fill(losses > 0.5, 0).mean()
        >>> [wait.what for wait in waits.found]
        ['indexing with a boolean mask, whose shape depends on the values']
    """

    def __init__(self) -> None:
        self.found: Counter[Wait] = Counter()
        self.on_host = WeakTensorKeyDictionary()
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        self._modes.enter_context(_Operations(self))
        self._modes.enter_context(_Functions(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._modes.close()

    def keep_on_host(self, value: Any) -> None:
        """The tensors in a value are on the host whatever the device, as the key of a batch is."""
        for tensor in tensors_of(value):
            self.on_host[tensor] = True

    def note(self, what: str, args: Any) -> None:
        """An operation that waits is about to run."""
        tensors = [one for one in args if isinstance(one, Tensor)]
        if tensors and all(tensor in self.on_host for tensor in tensors):
            return
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        places = [Path(frame.filename) for frame in reversed(frames)]
        caller = next((one for one in places if _OPTIMIZERS in one.parents or "torch" not in one.parts), None)
        if caller is not None and _OPTIMIZERS in caller.parents:
            return
        # What the contract was called by is of no interest.
        last = max((n for n, frame in enumerate(frames) if Path(frame.filename).parent == _HERE), default=-1)
        own = [frame for frame in frames[last + 1 :] if not _OTHERS & set(Path(frame.filename).parts)]
        shown = (own or frames)[-_LINES:]
        self.found[Wait(what, "".join(traceback.format_list(shown)).rstrip())] += 1


class _Operations(TorchDispatchMode):
    """Sees every operation, in backward, too."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, named = func.overloadpacket, kwargs or {}
        if packet in _WAITING:
            self.waits.note(_WAITING[packet], args)
        elif packet in _MASKED and _reads_mask(packet, args):
            self.waits.note("indexing with a boolean mask, whose shape depends on the values", args[:1])
        elif packet is aten.repeat_interleave and named.get("output_size") is None:
            self.waits.note("repeat_interleave without output_size, whose shape depends on the values", args)
        return func(*args, **named)


def _reads_mask(packet: Any, args: Any) -> bool:
    masks = [one for one in args[1] if isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8)]
    # One number wherever a mask says so only fills, for which nothing is counted.
    fills = packet is not aten.index and len(masks) == len(args[1]) == 1 and args[2].numel() == 1
    return bool(masks) and not fills


class _Functions(TorchFunctionMode):
    """Sees what is called on a tensor, also where the CPU has nothing to do, and where tensors are made."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in _TO_HOST:
            self.waits.note(_TO_HOST[func], args[:1])
        elif func is Tensor.to and "cpu" in (*(one for one in args[1:2] if isinstance(one, str)), named.get("device")):
            # By its name; the device of something else is the host only here.
            self.waits.note(".to('cpu')", args[:1])
        result = func(*args, **named)
        if named.get("device") is None and isinstance(result, Tensor):
            given = list(tensors_of([*args, named]))
            if all(tensor in self.waits.on_host for tensor in given):
                self.waits.keep_on_host(result)
        return result
