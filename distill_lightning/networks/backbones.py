"""Classifiers without their heads: in files, and as what finds the features of other networks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill_lightning.errors import InputError
from distill_lightning.layers import FeatureTap, dry_forward, eval_mode, unwrapped
from distill_lightning.networks.adapted import likely_input_shape
from distill_lightning.networks.provenance import note_weights
from distill_lightning.networks.weights import check_architecture, read_weights
from distill_lightning.storage import write_tensors

# Under these, the header of a file tells whose backbone it holds, and which tensors it lacks.
_NETWORK, _HEAD = "backbone_of", "without"


def write_backbone(network: nn.Module, path: Path, *, num_classes: int) -> Path:
    """Write a classifier's weights without those of its last layer.

    Args:
        network: the plain classifier.
        path: ``.safetensors``; its folder is made.
        num_classes: ``K``, by which the last layer is known: nothing with weights runs behind it.

    Returns:
        The path.

    Raises:
        InputError: another suffix; the network has no such layer, or several, and cannot be run to see which of them is
            the last; or the disk is full or refuses.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from distill_lightning.networks import SmallCNN
        >>> from distill_lightning.networks.backbones import load_backbone, write_backbone
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_backbone(SmallCNN(num_classes=10), Path(folder, "cnn.safetensors"), num_classes=10)
        ...     load_backbone(SmallCNN(num_classes=20), path)
    """
    if path.suffix != ".safetensors":
        raise InputError(f"a backbone is written as .safetensors, whose header tells of it, got {path.name!r}")
    plain = unwrapped(network)
    head = _head_of(plain, num_classes)
    state = {name: value.detach().cpu().clone() for name, value in plain.state_dict().items()}
    without = [name for name in state if name.startswith(f"{head}.")]
    kept = {name: value for name, value in state.items() if name not in without}
    write_tensors(path, kept, {"format": "pt", _NETWORK: type(plain).__name__, _HEAD: json.dumps(without)})
    return path


def load_backbone(network: nn.Module, path: Path) -> None:
    """Load a classifier's weights from a file of `write_backbone`, all but those of its last layer.

    Raises:
        InputError: the file is missing, damaged, no such file, or of another network; then nothing is changed.
    """
    weights, plain = read_weights(path), unwrapped(network)
    header: dict[str, str] = {}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    if _HEAD not in header:
        raise InputError(f"{path} is no file of a backbone: write it by module.export_backbone(path)")
    own = plain.state_dict()
    head = {name: own[name] for name in json.loads(header[_HEAD]) if name in own}
    check_architecture(plain, {**weights, **head}, source=f"{path} (of a {header[_NETWORK]})")
    plain.load_state_dict({**weights, **head})
    note_weights(network, str(path))


class Features(nn.Module):
    """The layers of a network up to some of them, and what these return.

    Args:
        network: that runs its layers, down to those that are named, one after the other.
        layers: dotted paths of layers as in ``network.named_modules()``, in the order in which they run.

    Attributes:
        channels: of each of these layers.
        in_channels: of the images.

    Raises:
        InputError: there is no such layer, one is named twice, out of order or returns no ``(N, C, H, W)``, or the
            network runs its layers in another way.

    Example:
        >>> import torch
        >>> from distill_lightning.networks import SmallCNN
        >>> from distill_lightning.networks.backbones import Features
        >>> features = Features(SmallCNN(num_classes=10), ["features.2", "features.6"])
        >>> [tuple(feature.shape) for feature in features(torch.zeros(1, 1, 8, 8)).values()]
        [(1, 24, 8, 8), (1, 48, 4, 4)]
        >>> features.channels
        [24, 48]
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        who = type(network).__name__
        if len(set(layers)) < len(layers):
            raise InputError(f"{who}: layers={list(layers)} have one twice: name each once")
        tap = FeatureTap(network, layers)
        tap.remove()
        self.layers = tap.layers
        steps = list(_steps(network, self.layers))
        last = max((steps.index(layer) for layer in self.layers if layer in steps), default=-1)
        self.steps = steps[: last + 1]
        self.body = nn.Module()
        for path in self.steps:
            _add(self.body, path, network.get_submodule(path))
        images = torch.rand(2, *likely_input_shape(network), generator=torch.Generator().manual_seed(0))
        expected = _tapped(network, self.layers, images)
        for layer, feature in zip(self.layers, expected, strict=True):
            if feature.ndim != 4:
                raise InputError(
                    f"{who}: {layer!r} returns a tensor of {feature.ndim} dimensions, and a detector reads "
                    "feature maps (N, C, H, W): name a layer before it"
                )
        numbered: dict[str, Tensor] = {}
        # What does not follow from the layer before may well have another shape.
        with torch.no_grad(), eval_mode(self), suppress(RuntimeError, TypeError, ValueError):
            numbered = self(images)
        found = [numbered[str(number)] for number in range(len(numbered))]
        if len(found) != len(expected) or not all(map(torch.equal, found, expected)):
            raise InputError(
                f"{who} does not run its layers one after the other down to {', '.join(self.layers)}: name layers that "
                "it does so, stages for example"
            )
        in_order = [self.layers[int(number)] for number in numbered]
        if in_order != list(self.layers):
            raise InputError(f"{who} runs these layers in the order {', '.join(in_order)}: name them so")
        self.channels = [feature.shape[1] for feature in found]
        self.in_channels = images.shape[1]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """What the layers return for images ``(N, C, H, W)``, by their numbers as torchvision's detectors have them."""
        found: dict[str, Tensor] = {}
        for step in self.steps:
            images = self.body.get_submodule(step)(images)
            if step in self.layers:
                found[str(self.layers.index(step))] = images
        return found


def _head_of(network: nn.Module, num_classes: int) -> str:
    """The layer of ``num_classes`` outputs behind which nothing with weights runs."""
    who, way_out = type(network).__name__, "use export_student"
    heads = [
        name
        for name, layer in network.named_modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == num_classes)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == num_classes)
    ]
    last = _last_to_run(network) if heads else None
    if not heads or (last is not None and last not in heads):
        found = f": {last!r} is its last" if last is not None else ""
        raise InputError(
            f"{who} has no last layer of {num_classes} outputs that a backbone could do without{found}: {way_out}"
        )
    if last is None and len(heads) > 1:
        raise InputError(
            f"{who} has several layers of {num_classes} outputs ({', '.join(heads)}), and does not run on an image or "
            f"a row of numbers, which would show which of them is the last: {way_out}"
        )
    return heads[0] if last is None else last


def _last_to_run(network: nn.Module) -> str | None:
    """The layer with weights of its own that runs last; ``None``: no input is known that the network takes."""
    ran: list[str] = []
    watches = [
        layer.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, layer in network.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) or [*layer.parameters(recurse=False)]
    ]
    try:
        for shape in _likely_shapes(network):
            ran.clear()
            with suppress(InputError):
                dry_forward(network, shape)
                return ran[-1] if ran else None
    finally:
        for watch in watches:
            watch.remove()
    return None


def _likely_shapes(network: nn.Module) -> Sequence[tuple[int, ...]]:
    """Of inputs that the network may take: images, some networks need large ones, or rows of numbers."""
    layers = list(network.modules())
    # Of all layers, the first has the fewest channels.
    channels = min((layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)), default=None)
    if channels is not None:
        return [(channels, side, side) for side in (32, 224)]
    return [(layer.in_features,) for layer in layers if isinstance(layer, nn.Linear)][:1]


def _steps(module: nn.Module, layers: Sequence[str], before: str = "") -> Iterator[str]:
    """The paths of all children, in their order, and of their children where one of them is asked for."""
    for name, child in module.named_children():
        path = f"{before}{name}"
        if any(layer.startswith(f"{path}.") for layer in layers):
            yield from _steps(child, layers, f"{path}.")
        else:
            yield path


def _add(body: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in body._modules:  # noqa: SLF001
            body.add_module(parent, nn.Module())
        body = body.get_submodule(parent)
    body.add_module(name, module)


def _tapped(network: nn.Module, layers: Sequence[str], images: Tensor) -> list[Tensor]:
    """What the layers return when the network runs as it is."""
    tap = FeatureTap(network, layers)
    try:
        with torch.no_grad(), eval_mode(network):
            _, features = tap(images)
    finally:
        tap.remove()
    return [features[layer] for layer in layers]
