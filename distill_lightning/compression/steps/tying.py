"""The step that ties layers."""

from __future__ import annotations

from distill_lightning.compression import recipe, tying
from distill_lightning.compression.measure import count_parameters
from distill_lightning.compression.steps.base import At, Order, Step
from distill_lightning.compression.workpiece import Workpiece
from distill_lightning.errors import InputError


class TieLayers(Step):
    """Replaces several layers by one, see `tie_layers`: fewer parameters and bytes, the same time.

    ::

        {class_path: TieLayers, init_args: {groups: [[encoder.layers.0, encoder.layers.1]], finetune_epochs: 5}}

    Args:
        groups: groups of two or more paths, of layers or of whole parts of the network with the same structure, which
            become one.
        init: the initial weights: ``"first"``: those of the first one; ``"mean"``: the mean of all.
        at: see `Step`.
        finetune_epochs: see `Step`.

    Raises:
        InputError: there is no group, or ``init`` is unknown.
    """

    order = Order.STRUCTURE

    def __init__(
        self,
        *,
        groups: list[list[str]],
        init: tying.Init = "first",
        at: At | None = None,
        finetune_epochs: int = 0,
    ) -> None:
        super().__init__(at=at, finetune_epochs=finetune_epochs)
        if not groups:
            raise InputError("TieLayers: groups is empty: give lists of two or more paths each")
        if init not in ("first", "mean"):
            raise InputError(f"TieLayers: init must be 'first' or 'mean', got {init!r}")
        self.groups, self.init = groups, init

    def begin(self, piece: Workpiece) -> None:
        """Tie them."""
        before = count_parameters(piece.network).stored
        tying.tie_layers(piece.network, self.groups, init=self.init)
        recipe.note_change(piece.network, "tied")
        after = count_parameters(piece.network).stored
        piece.note(
            f"{self!r} has left {after:,} parameters of {before:,}; time and multiply-accumulates stay, because a "
            "tied layer runs as often as before"
        )
        piece.changed = True
