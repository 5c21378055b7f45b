"""What of a checkpoint's hyper-parameters reaches the command line's parser."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule

from distill_lightning import (
    Conv1x1Translator,
    FactorDistance,
    FEEDModule,
    FunctionTranslator,
    InputError,
    KDModule,
    MEALV2Module,
    OfficialDiscriminator,
    SelfKDModule,
    StoredPast,
)
from distill_lightning.choices import plain
from distill_lightning.cli.from_file import class_of, safe_options
from distill_lightning.compression import Cubic, PruneWeights
from distill_lightning.modules import CompressionBaseline

FILE = Path("x.ckpt")
EVIL = {"class_path": "os.system", "init_args": {"command": "id"}}
DISTANCES = "distill_lightning.modules.parts.distances"
FUNCTION = f"{FunctionTranslator.__module__}.FunctionTranslator"


class Foreign(torch.nn.Module):
    """A module of a user's own."""

    def __init__(
        self,
        net: torch.nn.Module,
        anything: Any = None,
        untyped=None,
        where: str | Path = ".",
        sizes: dict[str, int] | None = None,
    ):
        super().__init__()


class Open(LightningModule):
    """A module of a user's own, whose options nobody knows."""

    def __init__(self, rate: float = 1.0, **more):
        super().__init__()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (KDModule, {"temperature": 3.0, "num_classes": 10, "compile": True, "input_shape": [1, 8, 8]}),
        (FEEDModule, {"student_layer": "a.b", "teacher_layers": ["a.b", "c"], "teacher_reduction": "mean"}),
        (FEEDModule, {"distance": plain(FactorDistance(p=2, translator=Conv1x1Translator(shared=True)))}),
        (SelfKDModule, {"alpha_schedule": "constant", "past": plain(StoredPast(keep=3, device="cpu"))}),
        (MEALV2Module, {"discriminator": plain(OfficialDiscriminator(shown="logits"))}),
        (CompressionBaseline, {"teacher": "dense"}),
        (Foreign, {"sizes": {"body.0": 3}, "anything": "a.b", "untyped": [1, "two"]}),
        (Foreign, {"anything": torch.zeros(2), "untyped": None}),
        (Open, {"rate": 0.5, "more": 1}),
    ],
)
def test_plain_values_and_own_choices_are_taken(kind, options):
    assert safe_options(FILE, {"_class_path": "a.B", "_instantiator": "c.d", **options}, kind, {}) == options


def test_steps_of_a_compression_are_taken():
    steps = plain([PruneWeights(amount=0.5, scope="layer", targets="body.*", schedule=Cubic(start=0.1))])
    assert safe_options(FILE, {"steps": steps}, CompressionBaseline, {}) == {"steps": steps}


@pytest.mark.parametrize(
    ("kind", "options", "key"),
    [
        (KDModule, {"optimizer": EVIL}, "optimizer"),
        (KDModule, {"lr_scheduler": EVIL}, "lr_scheduler"),
        (KDModule, {"optimizer": "os.system"}, "optimizer"),
        (KDModule, {"optimizer": '{"class_path": "os.system"}'}, "optimizer"),
        (KDModule, {"student": EVIL}, "student"),
        (KDModule, {"student": "evilmod.Net"}, "student"),
        (KDModule, {"teachers": [EVIL]}, "teachers.0"),
        (KDModule, {"temperature": EVIL}, "temperature"),
        (KDModule, {"transforms": ["evilmod.Mixup"]}, "transforms.0"),
        (KDModule, {"metrics": {"class_path.x": "os.system"}}, "metrics"),
        (FEEDModule, {"distance": "evilmod.HintDistance"}, "distance"),
        (FEEDModule, {"distance": {"class_path": f"{DISTANCES}.FactorDistance", "init_args": {"translator": EVIL}}},
         "distance.translator"),
        (FEEDModule, {"distance": {"class_path": f"{DISTANCES}.FactorDistance", "init_args": {}, "dict_kwargs": {}}},
         "distance"),
        (FEEDModule, {"distance": {"class_path": FUNCTION, "init_args": {"function": "os.sys"}}},
         "distance.function"),
        (FEEDModule, {"distance": {"class_path": FUNCTION, "init_args": {"other": 1}}},
         "distance.other"),
        (SelfKDModule, {"alpha_schedule": "os.system"}, "alpha_schedule"),
        (Foreign, {"anything": EVIL}, "anything"),
        (Foreign, {"anything": {"deep": [EVIL]}}, "anything.deep.0"),
        (Foreign, {"untyped": "{class_path: os.system}"}, "untyped"),
        (Foreign, {"anything": __file__}, "anything"),
        (Open, {"more": EVIL}, "more"),
    ],
)  # fmt: skip
def test_what_would_be_imported_is_refused_by_its_key(kind, options, key):
    for found in ({"_class_path": "a.B", **options}, {"class_path": "a.B", "init_args": options}):
        with pytest.raises(InputError, match=r"x\.ckpt names .* only plain values") as caught:
            safe_options(FILE, found, kind, {})
        assert f" in {key}: of a checkpoint" in str(caught.value)
        assert str(caught.value).endswith(f"model.init_args.{key}")
        assert "\n" not in str(caught.value)


NO_NAMES = ["optimizer.class_path", "", "a b", 3, "init_args", "dict_kwargs", "class_path", "__path__", "__a\nb"]


@pytest.mark.parametrize("kind", [KDModule, Open], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_is_refused(kind, name):
    with pytest.raises(InputError, match="is no name of a hyper-parameter") as caught:
        safe_options(FILE, {"_class_path": "a.B", name: {}}, kind, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [KDModule, Foreign], ids=lambda kind: kind.__name__)
def test_what_the_class_does_not_take_is_refused_or_left_out_if_it_is_linked(kind):
    found = {"_class_path": "a.B", "ratee": 1.0}
    with pytest.raises(InputError, match=f"has a hyper-parameter 'ratee', which {kind.__name__} does not take: the"):
        safe_options(FILE, found, kind, {})
    assert safe_options(FILE, found, kind, {}, linked=["ratee"]) == {}


def test_what_the_configuration_names_in_the_same_place_is_the_users():
    linear = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
    wider = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 4, "out_features": 3}}
    assert safe_options(FILE, {"net": wider}, Foreign, {"net": linear}) == {"net": wider}
    assert safe_options(FILE, {"net": "torch.nn.ReLU"}, Foreign, {"net": "torch.nn.ReLU"}) == {"net": "torch.nn.ReLU"}
    assert safe_options(FILE, {"untyped": [linear]}, Foreign, {"untyped": [linear]}) == {"untyped": [linear]}
    for given in ({"anything": linear}, {"net": {"class_path": "torch.nn.ReLU"}}, {"untyped": [linear]}):
        with pytest.raises(InputError, match=r"names 'torch.nn.Linear' in net"):
            safe_options(FILE, {"net": linear}, Foreign, given)
    wider["init_args"]["device"] = EVIL
    with pytest.raises(InputError, match=r"names 'os.system' in net.device"):
        safe_options(FILE, {"net": wider}, Foreign, {"net": linear})


STORE = "distill_lightning.teachers.store.TeacherStore"


def store_in(path, **options):
    return {"teachers": {"class_path": STORE, "init_args": {"path": path, **options}}}


def pretrained(path):
    return {"teachers": [{"class_path": "distill_lightning.Pretrained", "init_args": {"checkpoint": path}}]}


def past(**options):
    return {"past": plain(StoredPast(**options))}


@pytest.mark.parametrize(
    ("kind", "options", "given", "key"),
    [
        (SelfKDModule, past(folder="/victim", in_checkpoint=0), {}, "past.folder"),
        (SelfKDModule, past(folder="/victim"), past(), "past.folder"),
        (Foreign, {"where": "a/b.c"}, {}, "where"),
    ],
)
def test_a_file_or_folder_that_the_configuration_does_not_name_is_refused(kind, options, given, key):
    with pytest.raises(InputError, match=r"x\.ckpt names the file or folder ") as caught:
        safe_options(FILE, options, kind, given)
    assert f" in {key}, which the configuration does not name" in str(caught.value)
    assert str(caught.value).endswith(f"name one in the configuration, in model.init_args.{key}")
    assert "\n" not in str(caught.value)
    own = {"_class_path": "a.B", **options}
    assert safe_options(FILE, own, kind, options) == options


@pytest.mark.parametrize(
    ("kind", "options", "given", "expected"),
    [
        (SelfKDModule, past(folder="old", keep=3), past(folder="new"), past(folder="new", keep=3)),
        (SelfKDModule, past(), past(folder="new"), past(folder="new")),
        (KDModule, store_in("old", top_k=3), store_in("new", top_k=5), store_in("new", top_k=3)),
        (KDModule, pretrained("old"), pretrained("new"), pretrained("new")),
        (Foreign, {"where": "a/b.c"}, {"where": Path("new")}, {"where": "new"}),
    ],
)
def test_the_configurations_place_wins_over_the_checkpoints(kind, options, given, expected):
    """It may have been moved since; other options are the checkpoint's."""
    assert safe_options(FILE, {"_class_path": "a.B", **options}, kind, given) == expected


@pytest.mark.parametrize(
    ("found", "path"),
    [
        ({"_class_path": "a.B", "x": 1}, "a.B"),
        ({"class_path": "a.B", "init_args": {}}, "a.B"),
        ({"class_path": "a.B", "x": 1}, ""),
        ({"_class_path": 3}, ""),
        ({}, ""),
    ],
)
def test_the_class_of_hyper_parameters(found, path):
    assert class_of(found) == path
