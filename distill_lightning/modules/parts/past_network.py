"""The past of a network as a second network, outside of the module tree.

There it is neither trained nor counted, neither in the optimiser nor in the module's state dict, and no mode of the
module reaches it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from distill_lightning.functional.common import wide
from distill_lightning.layers import freeze, uncompiled
from distill_lightning.layers.call import call
from distill_lightning.processes import broadcast, is_alone


class PastNetwork:
    """A frozen copy of the student, made at the end of an epoch.

    Args:
        every: number of epochs from one copy to the next.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.modules.parts.past_network import PastNetwork
        >>> student = nn.Linear(4, 3)
        >>> past = PastNetwork(every=1)
        >>> past.ready
        False
        >>> past.after_epochs(before=0, finished=1, student=student)
        >>> past.ready, past.predict(torch.zeros(2, 4)).shape
        (True, torch.Size([2, 3]))
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.model: nn.Module | None = None
        self.ready = False

    @torch.no_grad()
    def predict(self, inputs: Any, *, laid_out: Callable[[Tensor], Tensor] = lambda logits: logits) -> Tensor:
        """Probabilities ``(N, K)`` or ``(N, T, K)``, from the network in eval mode.

        Args:
            inputs: what the network reads.
            laid_out: puts the classes of its logits last.
        """
        if self.model is None:
            raise RuntimeError("there is no past network before the end of the first epoch")
        return wide(laid_out(call(self.model, inputs))).softmax(dim=-1)

    def after_step(self, student: nn.Module) -> None:
        """Called after every optimiser step."""

    def after_epochs(self, before: int, finished: int, student: nn.Module) -> None:
        """Called when ``finished`` epochs are done, of which ``before`` were at the last call."""
        if finished // self.every > before // self.every:
            self.model = self.copy_of(student)
            self.share_buffers()
            self.ready = True

    def copy_of(self, student: nn.Module) -> nn.Module:
        """A copy of all parameters and buffers."""
        return freeze(copy.deepcopy(uncompiled(student)))

    def share_buffers(self) -> None:
        """Take rank 0's buffers: those of BatchNorm differ between processes until DDP's next forward."""
        if not is_alone():
            for buffer in self.buffers():
                broadcast(buffer)

    def buffers(self) -> Iterator[Tensor]:
        """What the processes' copies may differ in."""
        return iter(()) if self.model is None else self.model.buffers()

    def to(self, device: torch.device | str) -> None:
        """Move the copy; its module does not know it, and does not take it along."""
        if self.model is not None:
            self.model.to(device)

    def forget(self) -> None:
        """Drop the copy, as before the first epoch."""
        self.model, self.ready = None, False

    def state_dict(self) -> dict[str, Any]:
        """Tensors, and whether it predicts yet."""
        return {"ready": self.ready, "network": {} if self.model is None else self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], student: nn.Module) -> None:
        """Take the weights of a copy of such a student."""
        self.ready = state["ready"]
        if state["network"]:
            self.model = self.copy_of(student)
            self.model.load_state_dict(state["network"])


class AveragedNetwork(PastNetwork):
    """The exponential moving average of the student's parameters and buffers, taken after every optimiser step.

    Args:
        decay: what remains of the average in every step.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.modules.parts.past_network import AveragedNetwork
        >>> student = nn.Linear(1, 1)
        >>> average = AveragedNetwork(decay=0.75)
        >>> for weight in (0.0, 1.0):
        ...     _ = nn.init.constant_(student.weight, weight)
        ...     average.after_step(student)
        >>> average.model.weight.item()
        0.25
    """

    def __init__(self, decay: float) -> None:
        super().__init__(every=1)
        self.decay = decay
        # Of what the network has in half precision, in which a slow average would stand still, by its names.
        self._exact: dict[str, Tensor] = {}

    def after_step(self, student: nn.Module) -> None:
        """Average; the weights after the first step are the first average."""
        if self.model is None:
            self.model = self.copy_of(student)
            self._exact = _halves(self.model)
            return
        kept, now = _tensors(self.model), _tensors(uncompiled(student))
        moving = [name for name, tensor in kept.items() if tensor.is_floating_point()]
        # Not torch's AveragedModel, which copies its counter to the device and back in every step.
        average = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
        average([self._exact.get(name, kept[name]) for name in moving], [wide(now[name]) for name in moving], None)
        for name, tensor in kept.items():
            if name in self._exact or not tensor.is_floating_point():
                tensor.copy_(self._exact.get(name, now[name]))

    def after_epochs(self, before: int, finished: int, student: nn.Module) -> None:
        """The average predicts from the end of the first epoch on."""
        self.share_buffers()
        self.ready = self.model is not None

    def buffers(self) -> Iterator[Tensor]:
        """What the processes' averages may differ in."""
        yield from super().buffers()
        if self.model is not None:
            yield from (self._exact[name] for name, _ in self.model.named_buffers() if name in self._exact)

    def to(self, device: torch.device | str) -> None:
        """Move the average."""
        super().to(device)
        self._exact = {name: tensor.to(device) for name, tensor in self._exact.items()}

    def forget(self) -> None:
        """Drop the average."""
        super().forget()
        self._exact = {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors, and whether it predicts yet."""
        return {**super().state_dict(), "exact": dict(self._exact)}

    def load_state_dict(self, state: Mapping[str, Any], student: nn.Module) -> None:
        """Take the average of such a student."""
        super().load_state_dict(state, student)
        self._exact = {} if self.model is None else _halves(self.model)
        for name, tensor in self._exact.items():
            tensor.copy_(state.get("exact", {}).get(name, tensor))


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by their names, without a graph."""
    return {name: tensor.detach() for name, tensor in (*network.named_parameters(), *network.named_buffers())}


def _halves(network: nn.Module) -> dict[str, Tensor]:
    """Copies in float32 of what a network has in fewer bits, by its names."""
    found = {name: tensor for name, tensor in _tensors(network).items() if tensor.is_floating_point()}
    return {name: tensor.float() for name, tensor in found.items() if tensor.itemsize < 4}
