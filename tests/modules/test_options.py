"""The shared options: one list, known to Python, YAML and the command line."""

import inspect
from typing import Unpack

import pytest
import torch
import yaml
from torch import nn

from distill_lightning import (
    Categorical,
    DistillationModule,
    EmpiricalSampler,
    ExtracurricularModule,
    FEEDModule,
    FixedDiscriminator,
    HintDistance,
    InputError,
    KDModule,
    MEALV2Module,
    SelfKDModule,
    SmallResNet,
    SupervisedModule,
    TrainingOptions,
)
from distill_lightning.arguments import arguments_of
from distill_lightning.callbacks.run_keeper import RunKeeper
from distill_lightning.cli import main
from distill_lightning.modules.parts.adversary import discriminator_term
from distill_lightning.teachers import EnsembleRule
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


class Named(SupervisedModule):
    """What a user writes."""

    def __init__(self, student, *, num_classes: int, twice: int = 2, **options: Unpack[TrainingOptions]) -> None:
        super().__init__(student, num_classes=num_classes, **options)
        self.twice = twice


def test_the_keys_are_the_bases_keywords():
    base = inspect.signature(DistillationModule.__init__).parameters
    keywords = {name for name, parameter in base.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    assert set(TrainingOptions.__annotations__) == keywords - {"num_classes", "num_targets"}
    assert TrainingOptions.__required_keys__ == frozenset()


@pytest.mark.parametrize("kind", [SupervisedModule, KDModule, FEEDModule, MEALV2Module, Named])
def test_every_method_takes_them_with_the_bases_defaults(kind):
    own, base = arguments_of(kind), arguments_of(DistillationModule)
    for name in TrainingOptions.__annotations__:
        assert own[name].default == base[name].default


@pytest.mark.parametrize("kind", [SupervisedModule, KDModule, Named])
def test_python_refuses_an_unknown_key(kind):
    with pytest.raises(TypeError, match="unexpected keyword argument 'optimiser'"):
        kind(TinyNet(), num_classes=3, optimiser=None)


def test_a_subclass_hands_them_on():
    module = Named(TinyNet(), num_classes=3, channels_last=True, input_shape=(1, 8, 8), twice=3)
    assert (module.input_shape, module.twice, module.hparams["channels_last"]) == ((1, 8, 8), 3, True)


# The command line

NETWORK = {"class_path": "SmallResNet", "init_args": {"num_classes": 10, "width": 2}}


def run(tmp_path, *arguments, **model):
    config = {
        "trainer": {
            "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
            "limit_val_batches": 0, "default_root_dir": str(tmp_path),
        },
        "model": {
            "class_path": "FEEDModule",
            "init_args": {"student": NETWORK, "teachers": [NETWORK], "student_layer": "stage3", "beta": 1.0} | model,
        },
        "data": {"class_path": "DigitsDataModule", "init_args": {"subset": 32, "val_size": 16, "test_size": 16}},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return main(["fit", "--config", str(tmp_path / "run.yaml"), *arguments])


def loaded(tmp_path):
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    with pytest.warns(UserWarning, match="teachers: the weights are not those"):
        return FEEDModule.load_from_checkpoint(path)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["yaml", "line"])
def test_yaml_and_command_line_refuse_an_unknown_key(tmp_path, capsys, where):
    arguments, options = ([], {"optimiser": 1}) if where == "yaml" else (["--model.optimiser=1"], {})
    assert run(tmp_path, *arguments, **options) == 2
    assert "optimiser" in capsys.readouterr().err


@pytest.mark.slow
def test_a_choice_by_its_name_and_its_options_on_the_line(tmp_path, capsys):
    assert run(tmp_path, distance="HintDistance") == 0, capsys.readouterr().err
    assert loaded(tmp_path).distance == HintDistance()


@pytest.mark.slow
def test_an_option_of_the_default_choice_on_the_line(tmp_path, capsys):
    assert run(tmp_path, "--model.distance.p", "2", "--model.channels_last=true") == 0, capsys.readouterr().err
    module = loaded(tmp_path)
    assert (module.distance.p, module.hparams["channels_last"]) == (2, True)


@pytest.mark.slow
def test_the_data_tell_the_shape_of_an_input(tmp_path, capsys):
    assert run(tmp_path) == 0, capsys.readouterr().err
    assert loaded(tmp_path).input_shape == (1, 16, 16)


# Checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder, networks = tmp_path_factory.mktemp("checkpoints"), [SmallResNet(3, width=2) for _ in range(2)]
    modules = {
        FEEDModule: {"student_layer": "stage3", "distance": HintDistance(reduction="sum"), "beta": 0.1},
        MEALV2Module: {"discriminator": FixedDiscriminator(lr=0.25)},
    }
    for kind, options in modules.items():
        trainer = tiny_trainer(limit_train_batches=1, limit_val_batches=0)
        module = kind(SmallResNet(3, width=2), networks, num_classes=3, **options)
        trainer.fit(module, datamodule=TinyDataModule())
        trainer.save_checkpoint(folder / f"{kind.__name__}.ckpt")
    return folder, networks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "choice"),
    [
        (FEEDModule, "distance", HintDistance(reduction="sum")),
        (MEALV2Module, "discriminator", FixedDiscriminator(lr=0.25)),
    ],
)
def test_choices_are_hyper_parameters_and_come_back(checkpoints, kind, name, choice):
    folder, networks = checkpoints
    module = kind.load_from_checkpoint(folder / f"{kind.__name__}.ckpt", teachers=networks)
    held = module.hparams[name]
    assert held["class_path"] == f"{type(choice).__module__}.{type(choice).__name__}"
    assert {key: held["init_args"][key] for key in vars(choice) if key != "translator"} == {
        key: value for key, value in vars(choice).items() if key != "translator"
    }
    assert choice in vars(module).values()
    assert not module._missing


# Options that nobody would read, and names that nobody knows


class Shouting(FixedDiscriminator):
    """A discriminator of a user's own, whose names are not checked."""

    def __post_init__(self) -> None:
        """Nothing is looked at."""


def shown(**options):
    module = MEALV2Module(TinyNet(4), TinyNet(4), num_classes=4, discriminator=Shouting(**options))
    tiny_trainer().fit(module, datamodule=TinyDataModule(num_classes=4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EnsembleRule("median").combined(torch.zeros(2, 1, 3)), "combine must be .* got 'median'"),
        (lambda: Categorical(3).collapse([torch.zeros(1, 3)], combine="median"), "combine must be .* got 'median'"),
        (lambda: RunKeeper("runs", seed=0, mode="higher"), "mode must be 'max' or 'min', got 'higher'"),
        (
            lambda: discriminator_term(nn.Linear(3, 2), "rival", torch.zeros(1, 3), torch.zeros(1, 3), None),
            "mode must be one of cooperative, adversarial, detached, got 'rival'",
        ),
        (lambda: shown(shown="odds"), "Shouting: shown must be one of .* got 'odds'"),
        (lambda: shown(mode="rival"), "mode must be one of .* got 'rival'"),
        (
            lambda: SelfKDModule(TinyNet(), num_classes=3, alpha_schedule="constant", alpha_unit="step"),
            "alpha_unit=step would do nothing with alpha_schedule='constant'",
        ),
        (
            lambda: SelfKDModule(TinyNet(), num_classes=3, alpha_schedule="constant", total_epochs=5),
            "total_epochs=5 would do nothing with alpha_schedule='constant'",
        ),
        (
            lambda: ExtracurricularModule(
                TinyNet(), TinyNet(), num_classes=3, samplers=[EmpiricalSampler()], sampler_weights=[2.0]
            ),
            "sampler_weights=.2.0. would do nothing without additional inputs",
        ),
    ],
)
def test_what_nobody_would_read_or_know_is_refused(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
