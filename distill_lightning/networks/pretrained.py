"""Networks with weights from a file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from distill_lightning.layers import uncompiled
from distill_lightning.networks.provenance import factory_with_recipe, note_weights
from distill_lightning.networks.weights import load_strictly, read_weights, without_prefixes


@factory_with_recipe
def Pretrained(network: nn.Module, checkpoint: str | Path, part: str | None = None) -> nn.Module:  # noqa: N802  (reads as a class in YAML)
    """Load a network's weights from a file; the same network is returned, so its dotted layer paths stay as they are.

    The file is ``.safetensors``, or a PyTorch file that is a plain state dict, has one under ``"state_dict"``,
    ``"model"`` or the like, or is a checkpoint of this package (whose student's weights are then loaded). What data
    parallelism, `torch.compile` or another module have put before the names (``module.``, ``_orig_mod.``, ``model.``)
    is left out where the names then are the network's, and a warning says so. Only tensors are read: a file that would
    run code when unpickled is refused.

    Args:
        network: built with the same arguments as the saved one.
        checkpoint: path of the file.
        part: the saved submodule whose weights are loaded, instead of the student: ``"generator"`` of a
            `GeneratorModule`'s checkpoint, ``"paraphrasers.0"`` of a `ParaphraserModule`'s.

    Raises:
        InputError: the file is missing, damaged, unsafe, has no such part, or holds another architecture's weights.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from distill_lightning.networks import Pretrained, SmallCNN
        >>> teacher = SmallCNN(num_classes=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(teacher.state_dict(), Path(folder, "teacher.pt"))
        ...     network = Pretrained(SmallCNN(num_classes=10), Path(folder, "teacher.pt"))
        >>> torch.equal(network.head.weight, teacher.head.weight)
        True
    """
    source, plain = str(checkpoint), uncompiled(network)
    load_strictly(
        plain, without_prefixes(plain, read_weights(Path(checkpoint), part=part), source=source), source=source
    )
    note_weights(network, source)
    return network
