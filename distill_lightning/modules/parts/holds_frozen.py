"""Modules with frozen networks beside them, and metrics inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor

from distill_lightning.lightning_internals import PortableModule, summarise_without_metrics
from distill_lightning.outputs.metrics.exact import exact_metrics
from distill_lightning.teachers import Frozen


class HoldsFrozen(PortableModule):
    """A module whose `Frozen` attributes, which stand outside of its registry, move with it and are printed with it.

    Its metrics move with it, too, but no conversion to half precision reaches their sums.
    """

    @property
    def frozen(self) -> dict[str, Frozen]:
        """The attributes that hold frozen networks, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Frozen) and len(value)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002  (nn.Module's signature)
        with exact_metrics(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for frozen in self.frozen.values():
            frozen.apply(fn)
        return self

    def setup(self, stage: str) -> None:
        """Keep the metrics out of the model summary that comes next."""
        summarise_without_metrics(self)

    def extra_repr(self) -> str:
        """The frozen networks, which the printed module would not show."""
        return "\n".join(f"({name}, frozen): {frozen!r}" for name, frozen in self.frozen.items())
