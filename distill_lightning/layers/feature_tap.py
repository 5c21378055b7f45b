"""Reading a network's inner features without editing the network."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distill_lightning.errors import InputError, check_one_of
from distill_lightning.layers.call import InputShape, only_output, outputs_of, plain_shape
from distill_lightning.layers.channels import ChannelDims
from distill_lightning.layers.modes import eval_mode
from distill_lightning.layers.wrappers import is_compiled, named_parts, part_at, plain_name, unwrapped

Channels = Literal["first", "last"]
Modes = tuple[bool, ...]
_Kept = tuple[Any, Tensor | None, int | None]
"""What a layer returned, a copy of it, and how often it had been written into."""


class FeatureTap:
    """Runs a network and returns its output together with the outputs of some inner modules.

    A feature is what its layer returned, whatever a later operation writes into the same tensor
    (``ReLU(inplace=True)``, ``x += y``): it is copied where that happens. Whether it does is seen on the first call in
    each combination of the modules' modes.

    The hooks are registered by the constructor, on the network itself, and again on a layer that has been replaced
    since, by `torch.nn.SyncBatchNorm` for example. They therefore also fire under DDP (which wraps it later) and after
    a later in-place ``network.compile()``; they keep nothing during any other forward pass.

    With ``channels``, or as soon as `shapes` has seen where the network puts them, features come in one layout whatever
    the network's own: ``(N, C, H, W)``, or ``(N, L, C)`` with one dimension of places. Before that, and with fewer
    dimensions, they are what their layers return.

    Args:
        network: any module.
        layers: dotted module paths as in ``network.named_modules()``; each may be a glob (``"layer*.1.conv?"``). What
            wraps a module, ``torch.compile`` for example, has no place in them.
        channels: the dimension of the features' channels: ``"first"``, after the batch, or ``"last"``; ``None``: that
            of which the network's own operations tell, its convolutions, linear layers and permutations for example.

    Raises:
        InputError: no path, or one that matches no module (similar names are listed); on a call: a tapped module that
            did not run, ran twice, or did not return a tensor; with gradients: a feature that has no graph although
            parameters before it are trained, as inside of a reentrant activation checkpoint.

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

    def __init__(self, network: nn.Module, layers: str | Sequence[str], *, channels: Channels | None = None) -> None:
        if channels is not None:
            check_one_of("channels", channels, ("first", "last"))
        self.network, self.channels = network, channels
        self.layers = resolve_layers(network, layers)
        self._recording = False
        self._kept: dict[str, list[_Kept]] = {}
        self._hooks: dict[str, tuple[nn.Module, RemovableHandle]] = {}
        # The layers into whose output nothing writes, each with the modes of all modules in which that was seen.
        self._intact: set[tuple[str, Modes]] = set()
        self._copied: set[str] = set()
        # The modules that run before a layer returns, of layers that gave no graph.
        self._before: dict[str, list[nn.Module]] = {}
        # Where the network itself has the channels of each layer's feature.
        self._dims: dict[str, int] = {}
        self._hook()

    def __repr__(self) -> str:
        return f"FeatureTap({type(self.network).__name__}, {self.layers})"

    def __call__(self, *inputs: Any, **named: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the network once, and return its output and the tapped features by path."""
        self._hook()
        modules = list(self.network.modules())
        modes = tuple([module.training for module in modules])
        if any(is_compiled(module) for module in modules):
            _guard_hooks()
        self._kept = {name: [] for name in self.layers}
        self._copied = {name for name in self.layers if (name, modes) not in self._intact}
        self._recording = True
        try:
            output = self.network(*inputs, **named)
            features = {name: self._only(name, modes) for name in self.layers}
        finally:
            self._recording = False
            self._kept = {}
        if torch.is_grad_enabled():
            for name, feature in features.items():
                if feature.is_floating_point() and not feature.requires_grad:
                    self._refuse_no_graph(name, inputs, named)
        return only_output(self.network, output), {
            name: self._laid_out(name, feature) for name, feature in features.items()
        }

    @torch.no_grad()
    def shapes(self, input_shape: InputShape) -> tuple[torch.Size, dict[str, torch.Size]]:
        """Shapes of the output and of the features for one all-zero input of ``input_shape`` (without the batch).

        The network is run once, in eval mode, and left as it was. From then on features come in one layout.

        Raises:
            InputError: neither ``channels`` nor the network's operations tell where a feature has its channels.
        """
        seen: dict[str, Any] = {}
        watches = [
            module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
            for name, (module, _) in self._hooks.items()
        ]
        self._dims = {}
        try:
            with _eager(self.network), ChannelDims() as dims:
                output, features = dry_forward(self.network, input_shape, run=self)
        finally:
            for watch in watches:
                watch.remove()
        if self.channels is None:
            for name, feature in features.items():
                if feature.ndim > 2:
                    self._dims[name] = self._known_dim(name, dims.of(seen[name]), feature.shape)
            features = {name: self._laid_out(name, feature) for name, feature in features.items()}
        return output.shape, {name: feature.shape for name, feature in features.items()}

    def remove(self) -> None:
        """Remove the hooks from the network."""
        for _, handle in self._hooks.values():
            handle.remove()

    def _known_dim(self, name: str, dim: int | None, shape: Sequence[int]) -> int:
        if dim is None:
            raise InputError(
                f"{type(self.network).__name__}: nothing tells which dimension of {name!r} {tuple(shape)} holds its "
                "channels: say so with channels='first' or 'last'"
            )
        return dim

    def _laid_out(self, name: str, feature: Tensor) -> Tensor:
        given = {"first": 1, "last": -1, None: self._dims.get(name)}[self.channels]
        if given is None or feature.ndim < 3:
            return feature
        return feature.movedim(given, -1 if feature.ndim == 3 else 1)

    def _hook(self) -> None:
        for name in self.layers:
            hooked, handle = self._hooks.get(name, (None, None))
            module = part_at(self.network, name)
            if module is None:
                raise InputError(f"{type(self.network).__name__}: the tapped layer {name!r} is no longer there")
            if module is hooked:
                continue
            if handle is not None:
                handle.remove()
            self._hooks[name] = module, module.register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._recording:
            return
        if not isinstance(output, Tensor):
            self._kept[name].append((output, None, None))
        elif torch.compiler.is_compiling():
            # Compiled code writes nowhere in place that could be seen; it leaves out the copies that it does not need.
            self._kept[name].append((output, output.clone(), None))
        elif output.is_inference():
            # Such tensors do not tell who writes into them. The copy is an ordinary tensor, which losses can use.
            with torch.inference_mode(mode=False):
                self._kept[name].append((output, output.clone(), None))
        else:
            copy = output.clone() if name in self._copied else None
            self._kept[name].append((output, copy, _version(output)))

    def _only(self, name: str, modes: Modes) -> Tensor:
        who = f"{type(self.network).__name__}: the tapped layer {name!r}"
        if len(self._kept[name]) != 1:
            times = f"ran {len(self._kept[name])} times" if self._kept[name] else "did not run"
            raise InputError(f"{who} {times} in a forward; tap a layer that runs exactly once")
        output, copy, version = self._kept[name][0]
        if not isinstance(output, Tensor):
            raise InputError(
                f"{who} returns {type(output).__name__}, not a tensor; tap a layer that returns one tensor"
            )
        if version is None or _version(output) != version:
            if copy is None:
                raise InputError(
                    f"{who} was overwritten in place by a later operation in this forward, and not in an earlier one: "
                    "give that operation inplace=False, or tap a layer behind it"
                )
            return copy
        self._intact.add((name, modes))
        return output

    def _refuse_no_graph(self, name: str, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        if name not in self._before:
            self._before[name] = self._run_before(name, inputs, named)
        own = [parameter for module in self._before[name] for parameter in module.parameters(recurse=False)]
        if any(parameter.requires_grad for parameter in own):
            raise InputError(
                f"{type(self.network).__name__}: the feature of {name!r} has no graph, so a loss of it would train "
                "nothing before it: give torch.utils.checkpoint use_reentrant=False if the layer is inside of one, "
                "take it out of torch.no_grad(), or tap another layer"
            )

    def _run_before(self, name: str, inputs: Sequence[Any], named: Mapping[str, Any]) -> list[nn.Module]:
        """The modules that a forward enters before a layer returns."""
        network, parts = unwrapped(self.network), named_parts(self.network)
        entered, before = [network], list[nn.Module]()
        hooks = [part.register_forward_pre_hook(lambda part, _inputs: entered.append(part)) for part in parts.values()]
        hooks.append(parts[name].register_forward_hook(lambda *_: before.extend(entered)))
        try:
            with eval_mode(network):
                network.forward(*inputs, **named)
        finally:
            for hook in hooks:
                hook.remove()
        return before


@contextmanager
def _eager(network: nn.Module) -> Iterator[None]:
    """Compiled code shows nothing of what it does."""
    some_are = any(is_compiled(module) for module in network.modules())
    with torch.compiler.set_stance("force_eager") if some_are else nullcontext():
        yield


def _version(tensor: Tensor) -> int:
    """How often a tensor has been written into."""
    return tensor._version  # noqa: SLF001


def _guard_hooks() -> None:
    """Make compiled code notice hooks; otherwise it is reused for every module of the same shape, hooks or not."""
    config = torch._dynamo.config  # noqa: SLF001
    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        # Code that has been compiled so far has no such guards.
        torch._dynamo.reset()  # noqa: SLF001


@torch.no_grad()
def dry_forward(network: nn.Module, input_shape: InputShape, *, run: Callable[..., Any] | None = None) -> Any:
    """Run ``network`` once on a single all-zero input of ``input_shape`` (without the batch), and leave it as it was.

    Args:
        network: it runs in eval mode; the modes and buffers of its modules do not change.
        input_shape: for example ``(C, H, W)``. For a network with an embedding, ``(T,)`` is an input of tokens, int64.
            Shapes by name are of tensors that the network gets by keyword.
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
        >>> dry_forward(nn.Bilinear(2, 3, 5), {"input1": (2,), "input2": (3,)}).shape
        torch.Size([1, 5])
    """
    example = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(1))
    has_table = any(isinstance(module, nn.Embedding) for module in network.modules())

    def zeros(shape: Sequence[int]) -> Tensor:
        # Images, which have more dimensions, are no tokens: their networks may embed positions, for example.
        dtype = torch.int64 if has_table and len(shape) == 1 else example.dtype
        return torch.zeros((1, *shape), dtype=dtype, device=example.device)

    shapes = plain_shape(input_shape)
    inputs = {name: zeros(part) for name, part in shapes.items()} if isinstance(shapes, Mapping) else zeros(shapes)
    try:
        with eval_mode(network):
            return only_output(network, outputs_of(network, inputs)) if run is None else outputs_of(run, inputs)
    except InputError:
        raise
    except Exception as error:  # networks may raise anything: assertions, index errors
        reason = (str(error) or type(error).__name__).splitlines()[0]
        way_out = "(C, H, W) of your images, or a network with matching in_channels"
        if isinstance(shapes, Mapping):
            way_out = "that of each tensor by its name, or another network"
        elif has_table and len(shapes) == 1:
            way_out = "(T,) of your tokens, or another network"
        raise InputError(
            f"{type(network).__name__} does not take an input of shape {shapes} ({reason}); give input_shape={way_out}"
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
    names = [name for name in named_parts(network) if name]
    wrapped = {name for name, _ in network.named_modules()}
    if not isinstance(layers, str) and not layers:
        raise InputError(f"no layer of {type(network).__name__} to tap: name at least one")
    found: dict[str, None] = {}
    for given in [layers] if isinstance(layers, str) else layers:
        layer = plain_name(network, given) if given in wrapped else given
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
