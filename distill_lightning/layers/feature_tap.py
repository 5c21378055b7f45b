"""Reading a network's inner features without editing the network."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill_lightning.errors import InputError
from distill_lightning.layers.call import only_output
from distill_lightning.layers.modes import eval_mode, uncompiled


class FeatureTap:
    """Runs a network and returns its output together with the outputs of some inner modules.

    The hooks are registered once, by the constructor, on the network itself. They therefore also fire under DDP (which
    wraps it later) and after a later in-place ``network.compile()``; they keep nothing during any other forward pass.

    Args:
        network: any module.
        layers: dotted module paths as in ``network.named_modules()``; each may be a glob (``"layer*.1.conv?"``).

    Raises:
        InputError: no path, or one that matches no module (similar names are listed); on a call: a tapped module that
            did not run, ran twice, or did not return a tensor.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from distill_lightning.layers import FeatureTap
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> tap = FeatureTap(network, "1")
        >>> output, features = tap(torch.zeros(5, 4))
        >>> output.shape, features["1"].shape
        (torch.Size([5, 2]), torch.Size([5, 3]))
    """

    def __init__(self, network: nn.Module, layers: str | Sequence[str]) -> None:
        self.network = network
        self.layers = resolve_layers(network, layers)
        self._recording = False
        self._features: dict[str, list[Any]] = {}
        self._handles = [
            uncompiled(network).get_submodule(name).register_forward_hook(partial(self._keep, name))
            for name in self.layers
        ]

    def __repr__(self) -> str:
        return f"FeatureTap({type(self.network).__name__}, {self.layers})"

    def __call__(self, *inputs: Tensor, **named: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the network once, and return its output and the tapped features by path."""
        if (
            self.network is not uncompiled(self.network)
            or getattr(self.network, "_compiled_call_impl", None) is not None
        ):
            _guard_hooks()
        self._features = {name: [] for name in self.layers}
        self._recording = True
        try:
            output = self.network(*inputs, **named)
            return only_output(self.network, output), {name: self._only(name) for name in self.layers}
        finally:
            self._recording = False
            self._features = {}

    @torch.no_grad()
    def shapes(self, input_shape: Sequence[int]) -> tuple[torch.Size, dict[str, torch.Size]]:
        """Shapes of the output and of the features for one all-zero input of ``input_shape`` (without the batch).

        The network is run once, in eval mode, and left as it was.

        Raises:
            InputError: a later in-place operation (such as ``ReLU(inplace=True)``) overwrites a tapped feature.
        """
        versions: dict[str, int] = {}
        watches = [
            uncompiled(self.network)
            .get_submodule(name)
            .register_forward_hook(
                lambda _module, _inputs, output, name=name: versions.update({name: _version(output)})
            )
            for name in self.layers
        ]
        try:
            output, features = dry_forward(self.network, input_shape, run=self)
        finally:
            for watch in watches:
                watch.remove()
        for name, feature in features.items():
            if _version(feature) != versions[name]:
                raise InputError(
                    f"{type(self.network).__name__}: the output of {name!r} is overwritten in place by a later module; "
                    "tap that later module instead"
                )
        return output.shape, {name: feature.shape for name, feature in features.items()}

    def remove(self) -> None:
        """Remove the hooks from the network."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._recording:
            self._features[name].append(output)

    def _only(self, name: str) -> Tensor:
        outputs = self._features[name]
        if len(outputs) != 1:
            times = "did not run" if not outputs else f"ran {len(outputs)} times"
            raise InputError(
                f"{type(self.network).__name__}: the tapped layer {name!r} {times} in a forward; "
                "tap a layer that runs exactly once"
            )
        if not isinstance(outputs[0], Tensor):
            raise InputError(
                f"{type(self.network).__name__}: the tapped layer {name!r} returns {type(outputs[0]).__name__}, "
                "not a tensor; tap a layer that returns one tensor"
            )
        return outputs[0]


def _guard_hooks() -> None:
    """Make compiled code notice hooks; otherwise it is reused for every module of the same shape, hooks or not."""
    config = torch._dynamo.config  # noqa: SLF001
    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        # Code that has been compiled so far has no such guards.
        torch._dynamo.reset()  # noqa: SLF001


def _version(output: Any) -> int:
    """How often a tensor has been modified in place."""
    version: int = getattr(output, "_version", 0)
    return version


@torch.no_grad()
def dry_forward(network: nn.Module, input_shape: Sequence[int], *, run: Callable[[Tensor], Any] | None = None) -> Any:
    """Run ``network`` once on a single all-zero input of ``input_shape`` (without the batch), and leave it as it was.

    Args:
        network: it runs in eval mode; the modes and buffers of its modules do not change.
        input_shape: for example ``(C, H, W)``. For a network with an embedding, ``(T,)`` is an input of tokens, int64.
        run: a function to call instead of the network itself.

    Raises:
        InputError: the network does not accept such an input.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import dry_forward
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> dry_forward(network, (3, 32, 32)).shape
        torch.Size([1, 8, 30, 30])
        >>> network.training
        True
    """
    example = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(1))
    # Not for images, which have more dimensions: their networks may have an embedding, too, of positions for example.
    reads_tokens = len(input_shape) == 1 and any(isinstance(module, nn.Embedding) for module in network.modules())
    dtype = torch.int64 if reads_tokens else example.dtype
    inputs = torch.zeros((1, *input_shape), dtype=dtype, device=example.device)
    try:
        with eval_mode(network):
            return only_output(network, network(inputs)) if run is None else run(inputs)
    except InputError:
        raise
    except Exception as error:  # networks may raise anything: assertions, index errors
        reason = (str(error) or type(error).__name__).splitlines()[0]
        way_out = "(C, H, W) of your images, or a network with matching in_channels"
        raise InputError(
            f"{type(network).__name__} does not take an input of shape {tuple(input_shape)} ({reason}); "
            f"give input_shape={'(T,) of your tokens, or another network' if reads_tokens else way_out}"
        ) from error


def resolve_layers(network: nn.Module, layers: str | Sequence[str]) -> tuple[str, ...]:
    """The dotted paths in ``network`` that ``layers`` names; globs are expanded in the network's order.

    Raises:
        InputError: a path or glob that matches nothing; the message lists similar names.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import resolve_layers
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> resolve_layers(network, "[02]")
        ('0', '2')
    """
    names = [name for name, _ in uncompiled(network).named_modules() if name]
    if not isinstance(layers, str) and not layers:
        raise InputError(f"no layer of {type(network).__name__} to tap: name at least one")
    found: dict[str, None] = {}
    for layer in [layers] if isinstance(layers, str) else layers:
        matches = [layer] if layer in names else [name for name in names if fnmatchcase(name, layer)]
        if not matches:
            near = difflib.get_close_matches(layer, names, n=5, cutoff=0.4) or names[:5]
            raise InputError(f"{type(network).__name__} has no layer {layer!r}; similar names: {', '.join(near)}")
        found.update(dict.fromkeys(matches))
    return tuple(found)


def resolve_layer(network: nn.Module, layer: str) -> str:
    """The dotted path in ``network`` that ``layer``, a path or a glob, names.

    Raises:
        InputError: it matches no layer, or more than one.

    Example:
        >>> from torch import nn
        >>> from distill_lightning.layers import resolve_layer
        >>> network = nn.ModuleDict({"body": nn.Linear(4, 3), "head": nn.Linear(3, 2)})
        >>> resolve_layer(network, "h*")
        'head'
    """
    matches = resolve_layers(network, layer)
    if len(matches) > 1:
        raise InputError(
            f"{type(network).__name__}: {layer!r} names {len(matches)} layers ({', '.join(matches[:5])}); name one"
        )
    return matches[0]
