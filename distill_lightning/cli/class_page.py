"""``--model.help NAME`` and ``--data.help NAME``: a class's own page, without every class that could be given to it."""

from __future__ import annotations

import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from distill_lightning.arguments import arguments_of
from distill_lightning.callables import named, types_in
from distill_lightning.choices import Choice

_WIDTH = 100
_SECTIONS = "Args|Attributes|Raises|Returns|Example|Examples"


def page_of(arguments: Sequence[str]) -> str | None:
    """The page that arguments of the command line ask for; ``None``: they ask for none, or for that of no known class.

    Args:
        arguments: what follows the program's name.
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    for flag, name in itertools.pairwise(words):
        kind = named(name) if flag in ("--model.help", "--data.help") else None
        if inspect.isclass(kind):
            return class_page(kind, f"{flag.split('.')[0].removeprefix('--')}.init_args")
    return None


def class_page(kind: type, where: str) -> str:
    """What a class is for, and its arguments with types, defaults and, where they are choices, the names of these.

    Args:
        kind: the class.
        where: the key that the arguments stand under.
    """
    text = inspect.cleandoc(kind.__doc__ or "")
    described = _described(kind)
    lines = [f"{kind.__name__}: {_before_sections(text)}", "", f"Arguments, under {where}:"]
    for name, parameter in arguments_of(kind).items():
        lines += [f"  {_headed(name, parameter)}", *_indented(described.get(name, "")), *_choices(parameter.annotation)]
    raises = re.search(r"^Raises:\n((?: +.*\n?|\n)*)", text, flags=re.MULTILINE)
    return "\n".join([*lines, *(["", "Raises:", raises[1].rstrip()] if raises else [])])


def _before_sections(text: str) -> str:
    return re.split(rf"^(?:{_SECTIONS}):$", text, flags=re.MULTILINE)[0].rstrip()


def _headed(name: str, parameter: inspect.Parameter) -> str:
    kind = _type_name(parameter.annotation)
    if parameter.default is inspect.Parameter.empty:
        return f"{name}: {kind}"
    default = parameter.default
    shown = getattr(default, "__name__", None) if callable(default) and not isinstance(default, Choice) else None
    return f"{name}: {kind} = {shown or repr(default)}"


def _type_name(annotation: Any) -> str:
    """A type as one writes it, without the packages it is from."""
    if annotation is inspect.Parameter.empty:
        return "any"
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    # What is empty has a default of its own, which only the class knows.
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text).replace("NoneType", "None")


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="      ", subsequent_indent="      ")


def _choices(annotation: Any) -> list[str]:
    """The names of what an argument chooses from: this package's classes, and a word for networks of any kind."""
    kinds = [kind for kind in types_in(annotation) if isinstance(kind, type)]
    names = [one.__name__ for kind in kinds if issubclass(kind, Choice) for one in _below(kind)]
    found = _indented(f"One of {', '.join(sorted(dict.fromkeys(names)))}.") if names else []
    if any(kind is nn.Module for kind in kinds):
        found += _indented("Any class of PyTorch modules, or a function that returns one, by its import path.")
    return found


def _below(kind: type) -> Iterator[type]:
    """The public classes of this package that can be given where ``kind`` is asked for."""
    ours = kind.__module__.startswith(f"{__name__.partition('.')[0]}.") and not kind.__name__.startswith("_")
    if ours and not inspect.isabstract(kind):
        yield kind
    subclasses: list[type] = kind.__subclasses__()
    for below in subclasses:
        yield from _below(below)


def _described(kind: type) -> dict[str, str]:
    """What docstrings say of each argument: the class's own, those of the options that it takes, those above it."""
    found: dict[str, str] = {}
    for owner in kind.__mro__:
        if owner is object:
            continue
        for source in (owner, *_shared(vars(owner).get("__init__"))):
            for name, text in _arguments_in(inspect.cleandoc(source.__doc__ or "")):
                found.setdefault(name, text)
    return {name: _looked_up(name, text) for name, text in found.items()}


def _looked_up(name: str, text: str) -> str:
    """What an argument's description is, where it says "see `Another`" what that says of it."""
    other = re.match(r"see `(\w+)`", text)
    places = ("distill_lightning", "distill_lightning.callbacks", "distill_lightning.modules.options")
    kinds = [named(f"{place}.{other[1]}") for place in places] if other else []
    return next((dict(_arguments_in(inspect.getdoc(kind) or "")).get(name, text) for kind in kinds if kind), text)


def _shared(maker: Callable[..., Any] | None) -> Iterator[type]:
    """The ``TypedDict`` of a constructor's ``**options``."""
    if maker is None:
        return
    try:
        hints = typing.get_type_hints(maker)
    except (NameError, TypeError):
        return
    for hint in hints.values():
        yield from (part for part in typing.get_args(hint) if typing.is_typeddict(part))


def _arguments_in(text: str) -> Iterator[tuple[str, str]]:
    section = re.search(r"^Args:\n((?: +.*\n?|\n)*)", text, flags=re.MULTILINE)
    if section is None:
        return
    for entry in re.split(r"\n(?=    \w)", f"\n{section[1].rstrip()}"):
        name, colon, said = entry.strip().partition(":")
        if colon:
            yield name, " ".join(said.split())
