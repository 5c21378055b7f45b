"""The backbone of a classifier that was trained, for networks of other tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill_lightning.errors import InputError
from distill_lightning.networks.backbones import write_backbone
from distill_lightning.networks.provenance import plain_network
from distill_lightning.outputs import Categorical


class ExportsBackbone:
    """A module whose student may be a classifier."""

    student: Any
    output: Any

    def export_backbone(self, path: str | Path) -> Path:
        """Write the weights of a classifier without its last layer, which `faster_rcnn` loads as ``backbone_weights``.

        Args:
            path: ``.safetensors``; its folder is made. The header tells whose weights these are.

        Returns:
            The path.

        Raises:
            InputError: the student is no classifier, or has no last layer of ``num_classes`` outputs; another suffix;
                or the disk is full or refuses, and then what was there before is kept.
        """
        if not isinstance(self.output, Categorical):
            raise InputError(f"{type(self).__name__} trains no classifier, whose backbone could be exported")
        return write_backbone(plain_network(self.student), Path(path), num_classes=self.output.num_classes)
