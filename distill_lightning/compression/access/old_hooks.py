"""Hooks of `torch.nn.utils` that compute a weight before every forward pass, in place of a parameter."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from distill_lightning.errors import InputError

_REMOVALS: dict[type, tuple[str, str]] = {
    WeightNorm: ("weight_norm", "torch.nn.utils.remove_weight_norm"),
    SpectralNorm: ("spectral_norm", "torch.nn.utils.remove_spectral_norm"),
    prune.BasePruningMethod: ("nn.utils.prune", "torch.nn.utils.prune.remove"),
}


def refuse_old_hooks(network: nn.Module) -> None:
    """Refuse layers whose weights are computed by hooks: they are no parameters, and no copy of them can be made.

    `torch.nn.utils.parametrizations` has the same norms without hooks.

    Raises:
        InputError: a layer has such a hook; the message has the call that removes it.
    """
    for path, layer in network.named_modules():
        for hook in layer._forward_pre_hooks.values():  # noqa: SLF001
            for kind, (name, removal) in _REMOVALS.items():
                if isinstance(hook, kind):
                    weight = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight")
                    raise InputError(
                        f"{path or type(layer).__name__!r}: {name} computes {weight!r} anew by a hook, so it cannot be "
                        f"compressed: call {removal}(layer, {weight!r}) first"
                    )
