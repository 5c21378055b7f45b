"""The versions that the metadata allow, and what is refused under the older ones."""

import configparser
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from lowest import SETUP, lowest
from packaging.requirements import Requirement
from packaging.version import Version
from safetensors.torch import load_file

from distill_lightning import GeneratorModule, KDModule, OneCycle, ParaphraserModule, SupervisedModule
from distill_lightning.cli import main
from distill_lightning.errors import InputError
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

MAKEFILE = (SETUP.parent / "Makefile").read_text()


def requirements(*extras):
    """Those of the package and of extras, as pip reads them; what an extra says of one comes last."""
    config = configparser.ConfigParser()
    config.read(SETUP)
    lines = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    return [Requirement(line) for line in "\n".join(lines).splitlines() if line and not line.startswith("#")]


def environments():
    """The extras in each of the environments of lowest versions that the Makefile makes."""
    return [extras.split() for extras in re.findall(r"tests/lowest\.py ([\w ]+?) >", MAKEFILE)]


def test_every_extra_of_the_package_is_tried_with_its_lowest_versions():
    tried = {"timm", "pytorchcv", "translation", "detection", "onnx"}
    assert {extra for extras in environments() for extra in extras} == tried
    for extras in environments():
        assert f"--editable '.[{','.join(extras)}]'" in MAKEFILE


@pytest.mark.parametrize("extras", environments())
def test_every_requirement_has_a_lowest_version_which_is_tried(extras):
    tried = lowest(*extras)
    assert {requirement.name for requirement in requirements(*extras)} == tried.keys()
    for requirement in requirements(*extras):
        assert requirement.specifier.contains(tried[requirement.name]), requirement
    last = {requirement.name: requirement for requirement in requirements(*extras)}
    for requirement in last.values():
        bounds = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
        assert bounds == [Version(tried[requirement.name])], requirement


def test_no_lightning_is_allowed_that_is_older_than_those_tried():
    first, second = map(Version, re.search(r"^LIGHTNINGS := (.*)$", MAKEFILE, re.MULTILINE)[1].split())
    allowed = next(requirement.specifier for requirement in requirements() if requirement.name == "pytorch-lightning")
    assert Version(lowest()["pytorch-lightning"]) == first
    assert second in allowed
    between = ["2.0.0", "2.0.9.post0", "2.1.4", "2.2.5", "2.3.3", "2.4.0"]
    assert all(first < Version(version) < second for version in between)
    assert not list(allowed.filter([*between, "1.9.4", "2.6.2", "2.6.3", "3.0.0"]))
    assert list(allowed.filter(["2.5.0.post0", "2.5.6", "2.6.6"])) == ["2.5.0.post0", "2.5.6", "2.6.6"]


# Going on from the middle of an epoch


TEACHER = TinyNet()


def supervised(seed):
    torch.manual_seed(seed)
    return SupervisedModule(
        TinyNet(), num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.05), lr_scheduler=OneCycle
    )


def kd(seed):
    torch.manual_seed(seed)
    return KDModule(TinyNet(), TEACHER, num_classes=3)


def generator(seed):
    torch.manual_seed(seed)
    return GeneratorModule(input_shape=(1, 8, 8), latent_dim=2, output_range=(-2, 3))


def paraphraser(seed):
    torch.manual_seed(seed)
    return ParaphraserModule([TEACHER], layers="features", input_shape=(1, 8, 8))


class SaveAt(pl.callbacks.Checkpoint):
    """Saves at one moment of the second epoch."""

    def __init__(self, path, moment):
        self.path, self.moment = path, moment

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and self.moment == batch_idx:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1 and self.moment == "end":
            trainer.save_checkpoint(self.path)


def fit(module, **options):
    path = options.pop("ckpt_path", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using .ckpt_path.")
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        tiny_trainer(max_epochs=3, **options).fit(module, datamodule=TinyDataModule(), ckpt_path=path)
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def old(monkeypatch):
    """As under a Lightning that cannot."""
    monkeypatch.setattr("distill_lightning.lightning_internals.versions.VERSION", (2, 4))


@pytest.mark.parametrize("moment", [0, 2])
@pytest.mark.parametrize("build", [supervised, kd, generator, paraphraser])
def test_the_middle_of_an_epoch_is_refused_in_one_line_that_names_the_version(tmp_path, old, build, moment):
    path = tmp_path / "middle.ckpt"
    fit(build(0), callbacks=[SaveAt(path, moment)], enable_checkpointing=True)
    with pytest.raises(InputError, match=r"pytorch-lightning [\w.]+ cannot go on from inside an epoch") as caught:
        fit(build(1), ckpt_path=str(path))
    assert f"lightning {pl.__version__} " in str(caught.value)
    assert f"after {moment + 1} of its batches: install pytorch-lightning>=2.5" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [{}, {"limit_train_batches": 2}], ids=["whole", "limited"])
def test_the_end_of_an_epoch_is_gone_on_from(tmp_path, old, limit):
    path = tmp_path / "end.ckpt"
    whole = fit(supervised(0), callbacks=[SaveAt(path, "end")], enable_checkpointing=True, **limit)
    resumed = fit(supervised(1), ckpt_path=str(path), **limit)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_what_trains_nothing_on_may_be_of_the_middle_of_an_epoch(tmp_path, old):
    path = tmp_path / "middle.ckpt"
    fit(supervised(0), callbacks=[SaveAt(path, 0)], enable_checkpointing=True)
    module = SupervisedModule.load_from_checkpoint(path, student=TinyNet())
    for run in (tiny_trainer().validate, tiny_trainer().test):
        assert run(module, datamodule=TinyDataModule(), ckpt_path=str(path), verbose=False)


class KeepsWhatItWasGiven(pl.Callback):
    def state_dict(self):
        return {"folder": Path("a/b"), "function": kd, "inner": [{"method": self.setup, "number": torch.ones(2)}]}


@pytest.mark.parametrize("build", [kd, generator, paraphraser])
def test_a_checkpoint_holds_what_pytorch_reads_from_a_file_of_weights(tmp_path, build):
    path = tmp_path / "end.ckpt"
    averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    callbacks = [SaveAt(path, "end"), KeepsWhatItWasGiven(), averaging]
    fit(build(0), callbacks=callbacks, enable_checkpointing=True)
    states = torch.load(path, weights_only=True)["callbacks"]
    assert states["KeepsWhatItWasGiven"].keys() == {"folder", "inner"}
    assert states["KeepsWhatItWasGiven"]["folder"] == str(Path("a/b"))
    (inner,) = states["KeepsWhatItWasGiven"]["inner"]
    assert inner.keys() == {"number"}
    assert torch.equal(inner["number"], torch.ones(2))


def test_averaging_goes_on_from_a_checkpoint(tmp_path):
    path = tmp_path / "end.ckpt"

    def averaged(seed, *callbacks, **options):
        averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
        torch.manual_seed(seed)
        module = SupervisedModule(TinyNet(), num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.05))
        return fit(module, callbacks=[*callbacks, averaging], enable_checkpointing=bool(callbacks), **options)

    whole = averaged(0, SaveAt(path, "end"))
    resumed = averaged(1, ckpt_path=str(path))
    assert all(torch.allclose(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("loaders", [1, 2])
def test_the_command_line_writes_what_is_predicted(tmp_path, loaders, monkeypatch):
    """Lightning before 2.0 has forgotten it by the end of the verb."""
    loader = TinyDataModule.predict_dataloader
    monkeypatch.setattr(TinyDataModule, "predict_dataloader", lambda data: [loader(data)] * loaders)
    config = {
        "trainer": {"accelerator": "cpu", "default_root_dir": str(tmp_path), "enable_progress_bar": False},
        "model": {
            "class_path": "SupervisedModule",
            "init_args": {"student": {"class_path": "distill_lightning.testing.TinyNet"}},
        },
        "data": {"class_path": "distill_lightning.testing.TinyDataModule"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["predict", "--config", str(tmp_path / "config.yaml")]) == 0
    (written,) = tmp_path.rglob("predictions.safetensors")
    data = TinyDataModule()
    data.setup("predict")
    assert load_file(written)["logits"].shape == (loaders * len(loader(data).dataset), data.num_classes)
