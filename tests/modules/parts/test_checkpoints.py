"""What a checkpoint holds of a module's arguments, and how it is refused."""

from pathlib import Path

import pytest
import torch

from distill_lightning import (
    FEEDModule,
    GeneratorModule,
    HintDistance,
    InputError,
    KDModule,
    ParaphraserModule,
    SmallResNet,
    Teachers,
)
from distill_lightning.modules.parts.checkpoints import FORMAT, check_format, hyperparameters, objects
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


def test_given_and_default_arguments_are_held_as_plain_values():
    found = hyperparameters(FEEDModule, {"num_classes": 3, "beta": 2.0, "student": TinyNet()})
    assert (found["num_classes"], found["beta"], found["teacher_reduction"]) == (3, 2.0, "sum")
    assert found["distance"]["class_path"].endswith(".FactorDistance")
    assert found["sizes"]["init_args"] == {}
    # Functions and networks are no plain values.
    assert not {"student", "optimizer"} & found.keys()


def test_only_given_arguments_that_cannot_be_held_are_named():
    given = {"student": TinyNet(), "num_classes": 3, "distance": HintDistance(), "optimizer": torch.optim.SGD}
    assert objects(FEEDModule, given) == ["student", "optimizer"]
    assert objects(FEEDModule, {}) == []


@pytest.mark.parametrize(("checkpoint", "version"), [({}, 1), ({"distill_lightning": FORMAT + 1}, FORMAT + 1)])
def test_another_format_is_refused_by_both_numbers(checkpoint, version):
    with pytest.raises(InputError, match=f"here has format {version} of .* this version reads {FORMAT}: train anew"):
        check_format(checkpoint, "here")


class Writing(KDModule):
    """A user's own method, which writes somewhere."""

    def __init__(self, student, teachers, *, folder: str | Path | None = None, **options):
        super().__init__(student, teachers, **options)
        self.folder = folder


def test_a_folder_of_a_methods_own_is_taken_from_no_checkpoint(tmp_path):
    path, trainer, networks = tmp_path / "run.ckpt", tiny_trainer(), {"student": TinyNet(), "teachers": TinyNet()}
    for folder in (None, "somewhere"):
        trainer.strategy.connect(Writing(**networks, num_classes=3, folder=folder))
        trainer.save_checkpoint(path, weights_only=True)
        if folder is None:
            assert Writing.load_from_checkpoint(path, **networks).folder is None
    with pytest.raises(
        InputError, match="names the file or folder 'somewhere' in folder, and .*path, folder="
    ) as error:
        Writing.load_from_checkpoint(path, **networks)
    assert "\n" not in str(error.value)
    assert Writing.load_from_checkpoint(path, **networks, folder="other").folder == "other"


@pytest.mark.slow
def test_a_checkpoint_notes_format_class_recipes_fingerprints_and_parts(tmp_path):
    module = KDModule(SmallResNet(3, width=2), [SmallResNet(3, width=4)], num_classes=3)
    trainer = tiny_trainer(limit_train_batches=1, limit_val_batches=0)
    trainer.fit(module, datamodule=TinyDataModule())
    found = {}
    for weights_only in (False, True):
        trainer.save_checkpoint(tmp_path / "kd.ckpt", weights_only=weights_only)
        found[weights_only] = torch.load(tmp_path / "kd.ckpt", weights_only=True)
    for checkpoint in found.values():
        assert checkpoint["distill_lightning"] == FORMAT == 2
        assert checkpoint["hyper_parameters"]["_class_path"] == "distill_lightning.modules.kd.KDModule"
        assert checkpoint["recipes"].keys() == {"student", "teachers"}
        assert checkpoint["recipes"]["teachers"]["combine"] == "probabilities"
        assert checkpoint["fingerprints"] == module.fingerprints()
        assert all(name.startswith("student.") for name in checkpoint["state_dict"])
    assert "parts" in found[False]
    assert "parts" not in found[True]


@pytest.mark.slow
def test_teachers_that_were_replaced_between_two_fits_are_warned_of(tmp_path):
    module = KDModule(TinyNet(), TinyNet(), num_classes=3)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "kd.ckpt")
    module.teachers = Teachers(TinyNet(), ask=module.teachers.questions)
    with pytest.warns(UserWarning, match="teachers: the weights are not those that this checkpoint was trained with"):
        tiny_trainer(max_epochs=2).fit(module, datamodule=TinyDataModule(), ckpt_path=str(tmp_path / "kd.ckpt"))


@pytest.mark.parametrize("kind", [ParaphraserModule, GeneratorModule], ids=lambda kind: kind.__name__)
def test_every_module_of_the_package_notes_and_checks_the_format(kind):
    if kind is ParaphraserModule:
        module = kind(TinyNet(), layers="features", input_shape=(1, 8, 8))
    else:
        module = kind(input_shape=(1, 8, 8), output_range=(0, 1), width=4)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["distill_lightning"] == FORMAT
    module.on_load_checkpoint(checkpoint)
    del checkpoint["distill_lightning"]
    with pytest.raises(InputError, match="the checkpoint has format 1"):
        module.on_load_checkpoint(checkpoint)
