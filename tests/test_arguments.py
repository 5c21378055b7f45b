"""Arguments by name: shared options spelled out, options that are handed on, and the arguments of a call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NotRequired, TypedDict, Unpack

import pytest

from distill_lightning.arguments import arguments_of, bound_arguments, takes
from distill_lightning.errors import InputError

if TYPE_CHECKING:
    from nowhere import Unknown

EMPTY = inspect.Parameter.empty


class Shared(TypedDict, total=False):
    optimizer: str | None
    compile: bool


class More(Shared, total=False):
    rate: NotRequired[float]
    other: Unknown


class Base:
    def __init__(self, student: list[int], *, optimizer: str | None = "sgd", compile: bool = False) -> None: ...


class Method(Base):
    def __init__(self, student: list[int], teachers: Sequence[int], *, alpha: float = 0.5, **options: Unpack[Shared]):
        super().__init__(student, **options)


class OwnDefault(Base):
    def __init__(self, *, rate: float = 0.1, optimizer: str | None = "adam", **options: Unpack[Shared]) -> None:
        super().__init__([], optimizer=optimizer, **options)


class BelowOwnDefault(OwnDefault):
    def __init__(self, **options: Unpack[More]) -> None:
        super().__init__(**options)


class Plain(Method):
    def __init__(self, beta: float = 1.0, **options) -> None:
        super().__init__(**options)


class Silent(Plain):
    pass


class Mixin:
    pass


class Deep(Mixin, Silent):
    def __init__(self, *networks: int, gamma: float, **kwargs) -> None:
        super().__init__(**kwargs)


def names(target):
    return list(arguments_of(target))


def test_explicit_parameters_are_those_of_the_signature():
    found = arguments_of(Base)
    assert list(found) == ["student", "optimizer", "compile"]
    assert found["student"].annotation == list[int]
    assert found["student"].default is EMPTY
    assert found["student"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert found["optimizer"].default == "sgd"


def test_the_keys_of_shared_options_are_keyword_only_parameters():
    found = arguments_of(Method)
    assert list(found) == ["student", "teachers", "alpha", "optimizer", "compile"]
    assert found["optimizer"] == inspect.Parameter(
        "optimizer", inspect.Parameter.KEYWORD_ONLY, default="sgd", annotation=str | None
    )
    assert found["compile"].default is False
    assert found["compile"].annotation is bool


def test_an_extended_typed_dict_has_the_inherited_keys():
    found = arguments_of(BelowOwnDefault)
    assert sorted(found) == ["compile", "optimizer", "other", "rate"]
    assert found["rate"].annotation is float
    # The next class above that has a parameter of that name gives the default.
    assert {name: parameter.default for name, parameter in found.items()} == {
        "optimizer": "adam",
        "compile": False,
        "rate": 0.1,
        "other": EMPTY,
    }


def test_a_parameter_of_its_own_goes_before_the_shared_key():
    found = arguments_of(OwnDefault)
    assert list(found) == ["rate", "optimizer", "compile"]
    assert found["optimizer"].default == "adam"


def test_a_name_that_cannot_be_resolved_stays_a_string():
    def function(known: int, unknown: Unknown) -> None: ...

    found = arguments_of(function)
    assert (found["known"].annotation, found["unknown"].annotation) == (int, "Unknown")
    assert arguments_of(BelowOwnDefault)["other"].annotation == "Unknown"


def test_plain_options_are_those_of_the_next_constructor():
    expected = ["beta", "student", "teachers", "alpha", "optimizer", "compile"]
    assert names(Plain) == names(Silent) == expected
    assert names(Deep) == ["gamma", *expected]
    assert all(
        parameter.kind is inspect.Parameter.KEYWORD_ONLY
        for name, parameter in arguments_of(Plain).items()
        if name != "beta"
    )


def test_plain_options_of_the_last_constructor_and_of_functions_stand_for_nothing():
    class Last:
        def __init__(self, width: int, **options) -> None: ...

    assert names(Last) == ["width"]
    assert names(lambda width, *more, **options: None) == ["width"]


def test_functions_have_shared_options_too():
    def network(width: int, /, depth: int = 2, **options: Unpack[Shared]) -> None: ...

    found = arguments_of(network)
    assert list(found) == ["depth", "optimizer", "compile"]
    assert found["optimizer"].default is EMPTY


def test_a_wrapped_constructor_is_read_through():
    class Wrapped(Method):
        @functools.wraps(Method.__init__)
        def __init__(self, *args, **kwargs) -> None: ...

    assert names(Wrapped) == names(Method)


def test_a_metaclass_does_not_hide_the_constructor():
    class Meta(type):
        def __call__(cls, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    class Made(Method, metaclass=Meta):
        def __new__(cls, *args, **kwargs):
            return super().__new__(cls)

    assert names(Made) == names(Method)
    assert bound_arguments(Made, ([1],), {}) == {"student": [1]}


def test_dataclasses_and_classes_without_a_constructor():
    @dataclass
    class Data:
        width: int
        depth: list[int] = field(default_factory=list)

    assert names(Data) == ["width", "depth"]
    assert names(Mixin) == []
    assert names(dict) == []


def test_takes():
    assert takes(Deep, "compile")
    assert takes(Method, "student")
    assert not takes(Method, "options")
    assert not takes(Method, "beta")
    assert not takes(Deep, "networks")


def test_the_arguments_of_a_call_by_name():
    given = bound_arguments(Method, ([1], [2]), {"alpha": 0.1, "compile": True})
    assert given == {"student": [1], "teachers": [2], "alpha": 0.1, "compile": True}
    assert list(given) == ["student", "teachers", "alpha", "compile"]
    assert bound_arguments(Plain, (2.0,), {"student": [1]}) == {"beta": 2.0, "student": [1]}
    assert bound_arguments(Method, (), {}) == {}
    assert bound_arguments(Deep, (), {"gamma": 1.0}) == {"gamma": 1.0}


def test_positional_arguments_without_a_name_are_refused():
    with pytest.raises(InputError, match=r"Deep takes \*networks, which have no names: give arguments by name"):
        bound_arguments(Deep, (1,), {"gamma": 1.0})


@pytest.mark.parametrize(("args", "kwargs"), [(([], []), {}), (([],), {"student": []}), ((), {"rate": 1})])
def test_arguments_that_do_not_fit_are_refused(args, kwargs):
    with pytest.raises(TypeError):
        bound_arguments(Base, args, kwargs)
