"""By which of its arguments a module's class takes the networks of its row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from pytorch_lightning import LightningModule
from torch import nn

from distill_lightning.arguments import arguments_of
from distill_lightning.callables import types_in
from distill_lightning.errors import InputError
from distill_lightning.modules import DistillationModule

# What the network that learns is called in the constructors of others, and what the ones that it learns from.
_STUDENT = ("student", "network", "model", "net")
_TEACHERS = ("teachers", "teacher")


@dataclass(frozen=True)
class Constructor:
    """How a class, or a function, is given its networks, in whatever order.

    Attributes:
        student: the argument for the network that learns; ``None``: it builds one of its own.
        teachers: the argument for those that it learns from; ``None``: it takes none.
    """

    student: str | None = "student"
    teachers: str | None = None

    @property
    def kind(self) -> Any:
        """The type of what stands in the YAML file, for a parser."""
        student: list[Any] = [] if self.student is None else [nn.Module]
        teachers: list[Any] = [] if self.teachers is None else [Sequence[nn.Module]]
        # A parser asks for no value of as many leading arguments.
        return Callable[[*student, *teachers], LightningModule] if student or teachers else LightningModule

    def build(
        self, key: str, made: Any, student: nn.Module, teachers: Sequence[nn.Module], **options: Any
    ) -> LightningModule:
        """The module.

        Args:
            key: where the class stands in the YAML file.
            made: what a parser made of it.
            student: the network that learns.
            teachers: the networks that it learns from.
            options: further arguments.

        Raises:
            InputError: it takes one teacher, and there are several.
        """
        networks: dict[str, Any] = {}
        if self.student is not None:
            networks[self.student] = student
        if self.teachers == "teacher" and len(teachers) != 1:
            raise InputError(f"{key} takes one teacher, and the row has {len(teachers)}: let it say teachers: 1")
        if self.teachers is not None:
            networks[self.teachers] = teachers[0] if self.teachers == "teacher" else list(teachers)
        module: LightningModule = made(**networks, **options) if networks else made
        return module


def constructor_of(key: str, target: Any) -> Constructor:
    """How a class, or a function, is given its networks.

    They are its first arguments: ``student`` (or ``network``, ``model``, ``net``, or any name with the annotation
    ``nn.Module``), and ``teachers``, or ``teacher`` for one. One without the former builds the network that learns.

    Args:
        key: where it stands in the YAML file.
        target: the class or function; ``None``: there is none, as the parser will say.

    Raises:
        InputError: another argument stands before a network.
    """
    if target is None:
        return Constructor("student", "teachers")
    arguments = arguments_of(target)
    teachers = next((name for name in _TEACHERS if name in arguments), None)
    student = next((name for name in _STUDENT if name in arguments and _may_be_network(arguments[name])), None)
    others = [name for name in arguments if name != teachers]
    if student is None and others and (not _builds_its_own(target) or _is_network(arguments[others[0]])):
        student = others[0]
    networks = [name for name in (student, teachers) if name is not None]
    if set(list(arguments)[: len(networks)]) != set(networks):
        raise InputError(
            f"{key}: {getattr(target, '__name__', target)} takes {' and '.join(networks)} behind other arguments: let "
            "the networks be its first"
        )
    return Constructor(student, teachers)


def _builds_its_own(target: Any) -> bool:
    """Whether a class may: those of this package do not, and what is no module's class is refused by its kind."""
    is_module = isinstance(target, type) and issubclass(target, LightningModule)
    return is_module and not issubclass(target, DistillationModule)


def _is_network(argument: Parameter) -> bool:
    return any(isinstance(part, type) and issubclass(part, nn.Module) for part in types_in(argument.annotation))


def _may_be_network(argument: Parameter) -> bool:
    # An annotation that Python could not resolve is a string.
    return argument.annotation is Parameter.empty or isinstance(argument.annotation, str) or _is_network(argument)
