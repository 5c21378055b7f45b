"""The step that codes the bytes of a packed file without loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distill_lightning.compression.steps.base import At, Order, Step
from distill_lightning.compression.steps.workpiece import Workpiece


@dataclass(frozen=True)
class Encode(Step):
    """Codes the bytes of the network's packed files wherever that makes them smaller. No weight changes.

    Args:
        method: ``"deflate"`` (zlib) or ``"huffman"``.
        at: see `TrainedStep`.

    Raises:
        InputError: the method is unknown, or ``at`` is invalid.
    """

    order = Order.STORAGE

    method: Literal["deflate", "huffman"] = "deflate"
    at: At | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.check_numbers()
        self.check_at()
        self.check_known(method=("deflate", "huffman"))

    @property
    def title(self) -> str:
        """The class and the method."""
        return f"Encode {self.method}"

    def act(self, piece: Workpiece) -> None:
        """Code files from now on."""
        piece.coding = self.method
