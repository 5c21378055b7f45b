"""What the command line prints of an error: one line, or where a user's own code has failed."""

from __future__ import annotations

import difflib
import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import distill_lightning
from distill_lightning.errors import InputError, in_a_line


def one_line(error: Exception) -> str:
    """An error in one line: where it is, and what is wrong there.

    jsonargparse nests one message in another. The innermost of the chain is the reason; the outermost names the keys
    and classes on the way to it.

    Args:
        error: an `InputError`, or what jsonargparse raised.
    """
    refused = refusal(error)
    if refused is not None:
        # A loader's worker process puts its whole traceback before the message.
        message = re.split(r"^distill_lightning[.\w]*Error: ", refused, flags=re.MULTILINE)[-1]
        return _with_metrics_near(in_a_line(message))
    last = list(_chain(error))[-1]
    # A KeyError shows its message in quotes.
    reason = in_a_line(last.args[0] if isinstance(last, KeyError) and last.args else last)
    keys = dict.fromkeys(re.findall(r'Parser key "([^"]+)"', str(error)))
    classes = re.findall(r"class_path '([^']+)'", str(error))
    known = _none_of_union(error, reason) or _unknown_class(reason, next(reversed(keys), ""))
    reason = known or _unknown_option(reason, classes[-1] if classes else "") or reason
    inside = f" of {classes[-1].rpartition('.')[2]}" if classes else ""
    where = ".".join(keys) + inside
    return f"{where}: {reason}" if where else reason


def _with_metrics_near(message: str) -> str:
    """A message of Lightning's about a metric that nothing logs, with the names near it in place of its hint."""
    wanted = re.search(r"(?:monitor='|conditioned on metric `?)([^'` ]+)", message)
    if wanted is None:
        return message
    said = re.sub(r" HINT: Did you call .*", "", message)
    near = difflib.get_close_matches(wanted[1], sorted(set(re.findall(r"[\w-]+/[\w-]+", said)) - {wanted[1]}))
    return f"{said.rstrip('.')}; set monitor to one of these, such as {near[0]}" if near else said


def _none_of_union(error: Exception, reason: str) -> str | None:
    """All that a union would have accepted, of which the innermost reason names one kind; ``None``: it is no union."""
    got = re.fullmatch(r"Expected a (?:<class '\w+'>|typing\.Literal\[.*\])\. Got value: (.*)", reason)
    union = next((text for text in map(str, [*_chain(error)][-2:-1]) if text.startswith("Does not validate")), "")
    kinds = re.findall(r"- Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*)\])", union)
    names = [name or literal for name, literal in kinds if name != "NoneType"]
    return f"Expected {', '.join(names)}. Got value: {got[1]}" if got and names else None


def _unknown_class(reason: str, key: str) -> str | None:
    """The known names near that of a class that was not found; ``None``: the reason is another one."""
    prefix = "Expected a dot import path string: "
    if not reason.startswith(prefix):
        return None
    # What looked for the class has imported them; no other message needs to wait for them.
    from distill_lightning import callbacks, compression  # noqa: PLC0415
    from distill_lightning.compression import Step, steps  # noqa: PLC0415
    from distill_lightning.data import datamodules  # noqa: PLC0415

    name = reason.removeprefix(prefix)
    if key == "steps":
        known = (one for one in map(vars(steps).get, steps.__all__) if isinstance(one, type) and issubclass(one, Step))
        ready = (one.__name__ for one in known if one.does_something())
        return f"there is no step {name}: known ones are {', '.join(ready)}"
    if name in distill_lightning.__all__:
        return f"{name} is a function, which has no short name: give distill_lightning.{name}"
    modules = (distill_lightning, callbacks, datamodules, compression)
    near = difflib.get_close_matches(name, sorted({one for module in modules for one in module.__all__}), cutoff=0.5)
    way_out = f"similar names: {', '.join(near)}" if near else "give package.module.Class for one of another package"
    return f"there is no class {name}; {way_out}"


def _unknown_option(reason: str, class_path: str) -> str | None:
    """The reason, and the names near that of an option that a class does not have; ``None``: it is another one."""
    option = re.fullmatch(r"Option '(\w+)' is not accepted", reason)
    # What was refused has been imported.
    from distill_lightning.arguments import arguments_of  # noqa: PLC0415
    from distill_lightning.callables import named  # noqa: PLC0415

    kind = named(class_path) if option else None
    near = difflib.get_close_matches(option[1], arguments_of(kind)) if option and kind is not None else []
    return f"{reason}; similar names: {', '.join(near)}" if near else None


def own_lines(error: BaseException) -> str | None:
    """Where a user's own code has failed: that line first, and how it came to it from there on.

    Args:
        error: what was raised, by that code or because of it.

    Returns:
        ``None``: no code but that of Python, of installed packages and of this one took part.
    """
    for link in _chain(error):
        frames = traceback.extract_tb(link.__traceback__)
        own = [number for number, frame in enumerate(frames) if _is_own(frame.filename)]
        if own:
            last = frames[own[-1]]
            where = f"{last.filename}, line {last.lineno}, in {last.name}"
            return "\n".join([f"{where}: {type(link).__name__}: {link}", *traceback.format_list(frames[own[0] :])])
    return None


def _is_own(path: str) -> bool:
    places = [*sysconfig.get_paths().values(), str(Path(distill_lightning.__file__).parent), "<"]
    return not path.startswith(tuple(places))


def refusal(error: Exception) -> str | None:
    """The message of the refusal behind an error, which may have come through jsonargparse.

    Args:
        error: what was raised.

    Returns:
        The message of an `InputError`, or of what Lightning raises where a callback or logger cannot be used; ``None``
        if none of these is behind it.
    """
    for link in _chain(error):
        if isinstance(link, InputError) or _is_lightnings(link):
            return str(link)
    return InputError.latest if InputError.latest and InputError.latest in str(error) else None


def _is_lightnings(error: BaseException) -> bool:
    """Whether Lightning has found that it was given what it cannot use."""
    if type(error).__name__ == "MisconfigurationException":
        return True
    if isinstance(error, RuntimeError):
        return str(error).startswith("Early stopping conditioned on metric")
    # Python itself names the module that is missing; whoever has looked for a package first does not.
    return isinstance(error, ModuleNotFoundError) and error.name is None


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
