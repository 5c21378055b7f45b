"""Choices: from object to plain values and back, and what is never made."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_lightning import (
    Conv1x1Translator,
    Conv3Translator,
    FactorDistance,
    FixedDiscriminator,
    FunctionTranslator,
    HintDistance,
    InputError,
    LogitTerm,
    OwnDiscriminator,
    PooledSize,
    SupervisedModule,
    TeacherSize,
)
from distill_lightning.choices import Choice, from_plain, is_plain, plain

DISTANCES = "distill_lightning.modules.parts.distances"


@dataclass(frozen=True)
class Foreign(Choice):
    """A choice of a user's own."""

    number: int = 1


@pytest.mark.parametrize(
    "choice",
    [
        HintDistance(),
        FactorDistance(p=2, normalize="channel", translator=Conv1x1Translator(shared=True)),
        LogitTerm(weight=0.5, temperature=2.0),
        PooledSize(2),
        TeacherSize(),
        FixedDiscriminator(shown="probabilities", lr=0.1),
    ],
    ids=lambda choice: type(choice).__name__,
)
def test_a_choice_comes_back_from_its_plain_values(choice, tmp_path):
    torch.save(plain(choice), tmp_path / "choice.pt")
    assert from_plain(torch.load(tmp_path / "choice.pt", weights_only=True)) == choice


def test_plain_values_stand_as_in_yaml():
    assert plain(HintDistance(reduction="sum", translator=Conv3Translator(batch_norm=True))) == {
        "class_path": f"{DISTANCES}.HintDistance",
        "init_args": {
            "reduction": "sum",
            "translator": {
                "class_path": f"{DISTANCES}.Conv3Translator",
                "init_args": {"batch_norm": True, "shared": False},
            },
        },
    }


def test_choices_in_lists_and_dicts_come_back():
    value = {"several": [HintDistance(), PooledSize(3)], "one": LogitTerm(), "none": None, "number": 2.5}
    assert from_plain(plain(value)) == value


def test_numbers_paths_and_tuples_are_made_plain():
    found = plain({"numpy": np.float64(0.5), "path": Path("a") / "b", "tuple": (1, True, "c")})
    assert found == {"numpy": 0.5, "path": "a/b", "tuple": [1, True, "c"]}
    assert type(found["numpy"]) is float


@pytest.mark.parametrize(
    "value",
    [
        Foreign(),
        torch.nn.Linear(1, 1),
        torch.zeros(1),
        torch.relu,
        HintDistance,
        [HintDistance(), Foreign()],
        HintDistance(translator=FunctionTranslator(torch.nn.Linear)),
        OwnDiscriminator(torch.nn.Linear(3, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_of_another_package_or_no_value_is_an_object(value):
    assert not is_plain(value)
    with pytest.raises(TypeError, match="is not a plain value"):
        plain(value)


@pytest.mark.parametrize(
    "path",
    [
        "subprocess.Popen",
        "os.system",
        f"{Foreign.__module__}.Foreign",
        f"{DISTANCES}.SoftDistance",
        f"{DISTANCES}.functional",
        "distill_lightning.modules.nowhere.HintDistance",
        "distill_lightning_of_another.HintDistance",
        f"{SupervisedModule.__module__}.SupervisedModule",
        "HintDistance",
    ],
)
def test_only_choices_of_this_package_are_ever_made(path):
    with pytest.raises(InputError, match="which is not an option of this version: give it anew") as caught:
        from_plain({"class_path": path, "init_args": {}})
    assert repr(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_choice_inside_of_another_is_checked_alike():
    value = plain(HintDistance())
    value["init_args"]["translator"]["class_path"] = "subprocess.Popen"
    with pytest.raises(InputError, match=r"'subprocess.Popen', which is not an option"):
        from_plain(value)


def test_a_dict_with_other_keys_is_a_dict():
    assert from_plain({"class_path": "os.system"}) == {"class_path": "os.system"}
    assert from_plain({"class_path": 1, "init_args": {}, "more": 2}) == {"class_path": 1, "init_args": {}, "more": 2}


@pytest.mark.parametrize("choice", [HintDistance(), PooledSize(2), LogitTerm(), FixedDiscriminator()])
def test_a_choice_is_immutable(choice):
    name = next(iter(vars(choice)))
    with pytest.raises(AttributeError):
        setattr(choice, name, None)
    assert hash(choice) == hash(type(choice)(**vars(choice)))
