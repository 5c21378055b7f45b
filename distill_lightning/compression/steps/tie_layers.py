"""The step that ties layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import nn

from distill_lightning.compression.costs.parameters import count_parameters
from distill_lightning.compression.shrink import tying
from distill_lightning.compression.steps.base import Order, TrainedStep, Work
from distill_lightning.compression.steps.trial import try_change
from distill_lightning.compression.steps.workpiece import Workpiece
from distill_lightning.compression.structure.changes import note_change


@dataclass(frozen=True, kw_only=True)
class TieLayers(TrainedStep):
    """Replaces several layers by one, see `tie_layers`: fewer parameters and bytes, the same time.

    ::

        {class_path: TieLayers, init_args: {groups: [[encoder.layers.0, encoder.layers.1]], finetune_epochs: 5}}

    Args:
        groups: groups of two or more paths, of layers or of whole parts of the network with the same structure, which
            become one.
        init: the initial weights: ``"first"``: those of the first one; ``"mean"``: the mean of all.

    Raises:
        InputError: there is no group, or ``init`` is unknown; see also `TrainedStep`.
    """

    order = Order.STRUCTURE
    tries_itself = True

    groups: list[list[str]]
    init: tying.Init = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_known(init=get_args(tying.Init))
        self.refuse((not self.groups, "groups is empty: give lists of two or more paths each"))

    def check_layers(self, network: nn.Module) -> None:
        """Refuse layers that cannot be tied."""
        tying.check_groups(network, self.groups)

    def start(self) -> Work:
        """The work of this step in one run."""
        return _Tying(self)

    def act(self, piece: Workpiece) -> None:
        """Tie the layers, and say what that saves."""
        try_change(
            piece,
            self.title,
            [", ".join(path for group in self.groups for path in group)],
            change=lambda network, _: tying.tie_layers(network, self.groups, init=self.init),
            expect=None,
        )
        before = count_parameters(piece.network).stored
        tying.tie_layers(piece.network, self.groups, init=self.init)
        note_change(piece.network, "tied")
        after = count_parameters(piece.network).stored
        piece.note(
            f"{self.title} has left {after:,} parameters of {before:,}; time and multiply-accumulates stay, because a "
            "tied layer runs as often as before"
        )
        piece.changed = True


class _Tying(Work):
    def rehearse(self, piece: Workpiece) -> bool:
        """Tie the layers."""
        self.begin(piece)
        return True
