"""The step that codes the bytes of a packed file without loss."""

from __future__ import annotations

from typing import Literal

from distill_lightning.compression.steps.base import At, Order, Step
from distill_lightning.compression.workpiece import Workpiece
from distill_lightning.errors import InputError


class Encode(Step):
    """Codes the bytes of the network's packed files wherever that makes them smaller. No weight changes.

    Args:
        method: ``"deflate"`` (zlib) or ``"huffman"``.
        at: see `Step`.

    Raises:
        InputError: the method is unknown.
    """

    order = Order.STORAGE

    def __init__(self, method: Literal["deflate", "huffman"] = "deflate", *, at: At | None = None) -> None:
        super().__init__(at=at)
        if method not in ("deflate", "huffman"):
            raise InputError(f"Encode: method must be 'deflate' or 'huffman', got {method!r}")
        self.method = method

    def __repr__(self) -> str:
        return f"Encode {self.method}"

    def begin(self, piece: Workpiece) -> None:
        """Code files from now on."""
        piece.coding = self.method
