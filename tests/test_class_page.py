"""``--model.help`` and ``--data.help`` show a class's own page."""

import inspect

import pytest

import distill_lightning
from distill_lightning import FEEDModule, KDModule, SelfKDModule
from distill_lightning.arguments import arguments_of
from distill_lightning.cli import main
from distill_lightning.cli.class_page import class_page

METHODS = [
    value
    for value in (getattr(distill_lightning, name) for name in distill_lightning.__all__)
    if inspect.isclass(value) and issubclass(value, distill_lightning.DistillationModule)
]


def shown(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("form", [["--model.help", "KDModule"], ["--model.help=KDModule"]])
def test_the_page_is_the_methods_own(form, capsys):
    page = shown(capsys, *form)
    assert page.startswith("KDModule: Knowledge distillation from any number of teachers")
    assert len(page.splitlines()) < 90
    assert "torch.nn" not in page
    assert f"  temperature: float = {arguments_of(KDModule)['temperature'].default}\n      " in page
    assert "One of Boxes, Categorical, Gaussian, Tokens." in page
    assert "One of CutMix, Cutout, LabelSmoothing, Mixup." in page
    assert "Any class of PyTorch modules" in page


def test_of_a_data_module_too(capsys):
    page = shown(capsys, "--data.help", "DigitsDataModule")
    assert page.startswith("DigitsDataModule: ")
    assert "Arguments, under data.init_args:" in page
    assert "  subset: int | None" in page
    assert "number of training samples, drawn by" in page


def test_choices_are_named_with_the_default():
    page = class_page(FEEDModule, "model.init_args")
    assert "  distance: Distance = FactorDistance(p=1," in page
    assert "One of AttentionDistance, FactorDistance, HintDistance." in page
    assert "One of MovingAverage, PastModel, StoredPast." in class_page(SelfKDModule, "model.init_args")


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_every_argument_stands_there_with_what_its_docstring_says(kind):
    lines = class_page(kind, "model.init_args").splitlines()
    for name in arguments_of(kind):
        place = next((n for n, line in enumerate(lines) if line.startswith(f"  {name}: ")), None)
        assert place is not None, name
        assert lines[place + 1].startswith("      "), name
        assert not lines[place + 1].strip().startswith("see `"), name


def test_an_unknown_class_is_still_refused_in_one_line(capsys):
    assert main(["fit", "--model.help", "NoModule"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
