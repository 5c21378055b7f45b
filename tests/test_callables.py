"""Classes and functions in the place of what makes an object."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.optim import SGD, Optimizer

from distill_lightning import InputError, KDModule, SupervisedModule
from distill_lightning.arguments import arguments_of
from distill_lightning.callables import check_callables, is_of_files, named, types_in

OPTIMIZER, SCHEDULER = (arguments_of(KDModule)[name].annotation for name in ("optimizer", "lr_scheduler"))
MODULE = Callable[[torch.nn.Module], SupervisedModule]


def make_optimizer(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1)


def make_anything(parameters):
    return SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (OPTIMIZER, {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}),
        (OPTIMIZER, f"{__name__}.make_optimizer"),
        (OPTIMIZER, make_optimizer),
        (SCHEDULER, {"class_path": "distill_lightning.OneCycle"}),
        (SCHEDULER, {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau"}),
        (SCHEDULER, None),
        (MODULE, {"class_path": "distill_lightning.SupervisedModule",
                  "init_args": {"optimizer": {"class_path": "torch.optim.SGD"}}}),
        (Callable[[float], float], "math.sqrt"),
        (Literal["dense"] | Callable[[], Optimizer], "dense"),
        (Sequence[Callable[[], Optimizer]], [{"class_path": "torch.optim.SGD"}]),
        (dict[str, float], {"a": 1.0}),
        (Any, {"class_path": "os.system"}),
    ],
)  # fmt: skip
def test_what_makes_the_right_kind_is_taken(annotation, value):
    check_callables("key", annotation, value)


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (OPTIMIZER, {"class_path": "os.system", "init_args": {"command": "id"}}, "key: os.system makes no Opt"),
        (OPTIMIZER, "os.system", "key: os.system makes no"),
        (OPTIMIZER, f"{__name__}.make_anything", "make_anything makes no Optimizer: .* annotated to return one"),
        (OPTIMIZER, make_anything, "make_anything makes no"),
        (OPTIMIZER, {"class_path": "subprocess.Popen"}, "subprocess.Popen makes no"),
        (OPTIMIZER, {"class_path": "nowhere.At.All"}, "nowhere.At.All makes no"),
        (SCHEDULER, {"class_path": "torch.optim.SGD"}, "makes no LRScheduler or ReduceLROnPlateau"),
        (MODULE, {"class_path": "distill_lightning.SupervisedModule",
                  "init_args": {"optimizer": {"class_path": "os.system"}}}, "key.optimizer: os.system"),
        (Sequence[Callable[[], Optimizer]], [{"class_path": "os.system"}], "key.0: os.system"),
    ],
)  # fmt: skip
def test_what_makes_something_else_is_refused_by_its_key(annotation, value, message):
    with pytest.raises(InputError, match=message) as caught:
        check_callables("key", annotation, value)
    assert "\n" not in str(caught.value)


def test_the_types_in_an_annotation():
    assert list(types_in(list[int | Literal["a"]] | None)) == [int, Literal["a"], type(None)]
    assert list(types_in(Callable[[int], str] | dict[str, Any])) == [Callable[[int], str], str, Any]


def test_a_path_names_a_class_or_nothing():
    assert named("KDModule") is KDModule
    assert named("torch.optim.SGD") is SGD
    assert [named(path) for path in ("nowhere.A", "torch.optim.Nothing", ".a", 3, None)] == [None] * 5


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (Path, True),
        (str | Path | None, True),
        (list[os.PathLike], True),
        (str | None, False),
        (Any, False),
        ("?", False),
    ],
)
def test_what_is_annotated_as_a_path_names_a_file_or_folder(annotation, expected):
    assert is_of_files(annotation) is expected
