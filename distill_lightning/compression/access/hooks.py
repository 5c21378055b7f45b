"""Hooks of a module that another one replaces."""

from __future__ import annotations

from torch import nn

from distill_lightning.errors import InputError

_OF_CALLS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
)  # fmt: skip
_OF_STATES = (
    "_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"
)  # fmt: skip

HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", *_OF_STATES
)  # fmt: skip
"""The attributes of a module that hold its hooks."""


def carry_hooks(module: nn.Module, replacement: nn.Module) -> None:
    """Give a module, which has no hooks yet, those of the one that it replaces.

    They are called in the same order as before, with the new module. What registering them has returned still removes
    them.
    """
    for name in _OF_CALLS:
        # The same objects, to which the handles refer.
        replacement.__dict__[name] = module.__dict__[name]


def has_state_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its state dict, which fit only its own tensors, not those of a replacement."""
    return any(module.__dict__[name] for name in _OF_STATES)


def check_hooks(path: str, module: nn.Module) -> None:
    """Refuse hooks that fit only this module itself.

    Raises:
        InputError: it has hooks of its state dict.
    """
    if has_state_hooks(module):
        raise InputError(
            f"{path!r} has hooks of its state dict, which fit only its own tensors: remove them, or exclude the layer"
        )
