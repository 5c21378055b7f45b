"""What the doctor finds, the key that it names for it, and that it leaves nothing behind."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import (
    FEEDModule,
    InputError,
    KDModule,
    SelfKDModule,
    StoredPast,
    SupervisedModule,
    TeacherStore,
)
from distill_lightning.cli import main
from distill_lightning.studies.doctor import checks, examination
from distill_lightning.studies.doctor.examination import examine
from distill_lightning.studies.doctor.keys import Keys
from distill_lightning.studies.doctor.watch import Channels, Clock, Heard, Watch
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


@pytest.fixture(scope="module")
def trained():
    """A teacher that has learnt the tiny images."""
    torch.manual_seed(0)
    network = TinyNet()
    optimizer = {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.02)}
    data = TinyDataModule(samples=96)
    tiny_trainer(max_epochs=12).fit(SupervisedModule(network, num_classes=3, **optimizer), datamodule=data)
    return network.eval()


def data(**options):
    return TinyDataModule(**{"samples": 96, **options})


def found_by(module, datamodule=None, **options):
    return examine(module, datamodule or data(), trainer=tiny_trainer(max_epochs=2), **options)


def only(report):
    """The one thing that is wrong."""
    assert len(report.wrong) == 1, report.rows()
    return report.wrong[0]


def one(report, check):
    return next(finding for finding in report.findings if finding.check == check)


def tensors_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# All is well


def test_of_a_sound_training_all_is_well_and_in_figures(trained):
    report = found_by(KDModule(TinyNet(), copy.deepcopy(trained), num_classes=3))
    assert report.is_well, report.rows()
    assert one(report, "shapes").found == (
        "input float32 (8, 1, 8, 8); target int64 (8,); student float32 (8, 3); validation float32 (8, 1, 8, 8)"
    )
    count = sum(parameter.numel() for parameter in TinyNet().parameters())
    assert f"all {count:,} parameters" in one(report, "optimiser").found
    datamodule = data()
    labels = [int(label) for batch in datamodule.train_dataloader() for label in batch.target]
    fewest, most = (pick(labels.count(number) for number in range(3)) for pick in (min, max))
    assert one(report, "classes").found == f"{fewest} to {most} of 96 samples in each of 3 classes"
    assert "12 steps and the validation" in one(report, "time").found
    assert "MiB" in one(report, "memory").found


def test_a_teachers_accuracy_is_that_of_a_plain_loop(trained):
    datamodule = data()
    datamodule.setup()
    right = total = 0
    with torch.no_grad():
        for batch in datamodule.val_dataloader():
            for image, label in zip(batch.input, batch.target, strict=True):
                right += int(trained(image[None]).argmax() == label)
                total += 1
    report = found_by(KDModule(TinyNet(), copy.deepcopy(trained), num_classes=3))
    assert f"teacher 0 (TinyNet): accuracy {right / total:.3f} of {total} validation" in one(report, "teachers").found


def test_no_more_validation_samples_are_scored_than_asked(trained):
    report = found_by(KDModule(TinyNet(), copy.deepcopy(trained), num_classes=3), scored=32)
    assert "of 32 validation samples" in one(report, "teachers").found


def test_mean_and_deviation_are_those_of_numpy():
    channels, parts = Channels(), [torch.randn(4, 3, 5, 5) * 2 + 1, torch.randn(7, 3, 5, 5)]
    for part in parts:
        channels.add(part)
    every = np.concatenate([part.numpy().astype(np.float64) for part in parts])
    np.testing.assert_allclose(channels.mean, every.mean(axis=(0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(channels.std, every.std(axis=(0, 2, 3)), rtol=1e-9)
    assert (channels.low, channels.high) == (every.min(), every.max())


# What is wrong, and where


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.0, 2.0, 1.0]))

    def forward(self, images):
        return self.bias + 0 * images.flatten(1).sum(1, keepdim=True)


def test_a_constant_teacher(trained):
    finding = only(found_by(KDModule(TinyNet(), [copy.deepcopy(trained), Constant()], num_classes=3)))
    assert finding.key == "model.init_args.teachers, teacher 1 (Constant)"
    assert "the same output for 96 inputs" in finding.found
    assert "does not depend on its input" in finding.way_out


class Scrambled(nn.Module):
    """Depends on its input, and on nothing in it that tells the class."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)) * 30)

    def forward(self, images):
        noise = torch.sin(1e4 * images.flatten(1))
        return noise @ self.weight.T


def test_a_teacher_at_chance(trained):
    finding = only(found_by(KDModule(TinyNet(), [Scrambled(), copy.deepcopy(trained)], num_classes=3)))
    assert finding.key == "model.init_args.teachers, teacher 0 (Scrambled)"
    assert "chance" in finding.found
    assert "no better than chance" in finding.way_out


def test_what_always_says_the_most_frequent_class_is_at_chance_however_frequent_it_is():
    targets = torch.tensor([0] * 90 + [1] * 10)
    assert checks._classification(torch.zeros(100, dtype=torch.long), targets)[1]
    # As accurate, and not at chance: nine in ten of the rare class are found.
    found = targets.clone()
    found[:9], found[90:91] = 1, 0
    accuracy = (found == targets).float().mean()
    assert accuracy == 0.9
    assert not checks._classification(found, targets)[1]


def test_a_regressions_teacher_at_chance():
    module = KDModule(TinyNet(None, num_targets=2), TinyNet(None, num_targets=2), num_targets=2)
    with torch.no_grad():
        for parameter in module.teachers[0].head.parameters():
            parameter.mul_(50)
    finding = only(found_by(module, data(num_targets=2)))
    assert finding.key == "model.init_args.teachers, teacher 0 (TinyNet)"
    assert "root mean square" in finding.found


def test_the_error_of_a_regressions_teacher_is_that_of_a_plain_loop():
    answers, targets = torch.randn(40, 4), torch.randn(40, 2)
    errors = [sum((answers[n, d] - targets[n, d]) ** 2 for d in range(2)) for n in range(40)]
    middle = [sum(targets[n, d] for n in range(40)) / 40 for d in range(2)]
    spreads = [sum((targets[n, d] - middle[d]) ** 2 for d in range(2)) for n in range(40)]
    error, spread = (math.sqrt(sum(values) / 40) for values in (errors, spreads))
    found, is_chance = checks._regression(answers, targets)
    assert f"error {error:.3g} (" in found
    assert f"mean's: {spread:.3g}" in found
    assert is_chance == (error >= spread)


def test_few_samples_say_nothing_about_chance():
    report = found_by(KDModule(TinyNet(), Scrambled(), num_classes=3), data(val_size=16))
    assert report.is_well
    assert one(report, "teachers").found.endswith("too few to tell")


class Raw(TinyDataModule):
    mean, std = 0.0, 1.0


class Bytes(TinyDataModule):
    mean, std = 0.0, 1 / 255


def test_a_damaged_image_is_the_datas_and_not_the_models():
    keys = Keys(SupervisedModule(TinyNet(), num_classes=3), data())
    line = "cells/val/WBC/0.png cannot be decoded (the PNG file is not complete): mend it, or take it out of the folder"
    assert keys.said_in(line) == "data"


def test_pale_images_are_normalised_as_pretrained_networks_ask_for():
    # Cells on a white ground: far from 0 in blue under ImageNet's mean and deviation, and less far are all others.
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = torch.cat([torch.ones(30, 3, 8, 8), torch.full((2, 3, 8, 8), 0.2)])
    seen = Channels()
    seen.add((pixels - mean[:, None, None]) / std[:, None, None])
    assert 2 < float(seen.mean.max()) < 2.65
    keys = Keys(SupervisedModule(TinyNet(), num_classes=3), data())
    assert checks.normalisation(seen, keys, are_images=True).is_well


@pytest.mark.parametrize("kind", [Raw, Bytes])
def test_data_that_are_not_normalised(kind):
    finding = only(found_by(SupervisedModule(TinyNet(), num_classes=3), kind(samples=96)))
    assert finding.check == "normalisation"
    # They cannot be given to this data module.
    assert finding.key == "data"
    assert "mean and std" in finding.way_out


def test_images_of_integers():
    class Integers(pl.LightningDataModule):
        def val_dataloader(self):
            return self.train_dataloader()

        def train_dataloader(self):
            images = torch.randint(255, (16, 1, 8, 8), dtype=torch.uint8)
            return DataLoader(TensorDataset(images, torch.arange(16) % 3), batch_size=8)

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = TinyNet()

        def forward(self, images):
            return self.network(images.float())

    finding = only(found_by(SupervisedModule(Cast(), num_classes=3), Integers()))
    assert (finding.check, finding.key) == ("shapes", "data")
    assert "uint8" in finding.way_out


class Two(TinyDataModule):
    """Of three classes, as it says."""

    def read(self):
        rest, test = super().read()
        return rest.take(rest.targets < 2), test

    def __init__(self, *, subset=None, **options):
        super().__init__(**options)
        self.subset = subset


def test_a_missing_class():
    finding = only(found_by(SupervisedModule(TinyNet(), num_classes=3), Two(samples=96, val_size=32)))
    assert (finding.check, finding.key) == ("classes", "data.init_args.subset")
    assert "is of class 2 of 3" in finding.found


def test_token_ids_are_not_called_anything_else():
    read = examination._labels([(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.long))])
    found = checks.class_counts(read[0], 3, Keys(SupervisedModule(TinyNet(), num_classes=3), data()), is_all=read[1])
    assert "token ids" in found.found
    assert "not one class for each sample" in found.found


def test_classes_are_counted_by_reading_where_the_data_set_does_not_tell_them():
    labels = torch.tensor([0, 0, 1, 0, 2, 1])
    loader = DataLoader(TensorDataset(torch.zeros(6, 1), labels), batch_size=4)
    from distill_lightning.studies.doctor.examination import _labels

    read, is_all = _labels(loader)
    assert is_all
    keys = Keys(SupervisedModule(TinyNet(), num_classes=3), data())
    assert checks.class_counts(read, 3, keys, is_all=True).found == "1 to 3 of 6 samples in each of 3 classes"
    # Rare classes may not be among some of the samples.
    assert checks.class_counts(read, 4, keys, is_all=False).is_well
    assert not checks.class_counts(read, 4, keys, is_all=True).is_well


class Forgetful(SupervisedModule):
    def parameter_groups(self):
        return [{"params": list(self.student.features.parameters())}]


def test_a_parameter_outside_of_the_optimiser():
    finding = only(found_by(Forgetful(TinyNet(), num_classes=3)))
    assert (finding.check, finding.key) == ("optimiser", "model.class_path")
    assert finding.found == "in no group: student.head.weight, student.head.bias"


class DropsTheLast(torch.optim.SGD):
    def __init__(self, groups, lr=0.1):
        super().__init__([{"params": groups[0]["params"][:-1]}], lr=lr)


def test_an_optimiser_that_leaves_a_parameter_out():
    finding = only(found_by(SupervisedModule(TinyNet(), num_classes=3, optimizer=DropsTheLast)))
    assert (finding.check, finding.key) == ("optimiser", "model.init_args.optimizer")


# Stores


def of_store(store):
    return KDModule(TinyNet(), store, num_classes=3)


def filled(path, network, epochs):
    store = TeacherStore(path, copy.deepcopy(network))
    tiny_trainer(max_epochs=epochs).fit(of_store(store), datamodule=data(views=2))
    return store


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_store_that_is_not_there_is_filled_by_the_training_and_not_by_the_doctor(trained, tmp_path):
    report = found_by(of_store(TeacherStore(tmp_path / "store", copy.deepcopy(trained))), data(views=2))
    assert report.is_well, report.rows()
    assert "is empty; the training fills it" in one(report, "store").found
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_store_that_somebody_fills(trained, tmp_path):
    filled(tmp_path / "store", trained, epochs=1)
    before = files_in(tmp_path)
    report = found_by(of_store(TeacherStore(tmp_path / "store", copy.deepcopy(trained))), data(views=2))
    assert report.is_well, report.rows()
    assert "96 of 192 answers" in one(report, "store").found
    assert files_in(tmp_path) == before


def test_an_incomplete_store_that_nobody_fills(trained, tmp_path):
    filled(tmp_path / "store", trained, epochs=1)
    before = files_in(tmp_path)
    finding = only(found_by(of_store(TeacherStore(tmp_path / "store")), data(views=2)))
    assert finding.key == "model.init_args.teachers.init_args.networks"
    assert "96 of 192 answers" in finding.found
    finding = only(
        found_by(of_store(TeacherStore(tmp_path / "store", copy.deepcopy(trained), fill="never")), data(views=2))
    )
    assert finding.key == "model.init_args.teachers.init_args.fill"
    assert files_in(tmp_path) == before


def test_a_complete_store(trained, tmp_path):
    filled(tmp_path / "store", trained, epochs=2)
    report = found_by(of_store(TeacherStore(tmp_path / "store")), data(views=2))
    assert report.is_well, report.rows()
    assert one(report, "store").found.endswith("192 of 192 answers, made by these teachers and data; complete")


def test_a_store_of_other_teachers(trained, tmp_path):
    filled(tmp_path / "store", trained, epochs=1)
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other.head.bias[0] += 0.001
    report = found_by(of_store(TeacherStore(tmp_path / "store", other)), data(views=2))
    finding = next(finding for finding in report.wrong if finding.check == "store")
    assert finding.key == "model.init_args.teachers.init_args.path"
    assert "teachers" in finding.found


# What stops a step


def test_what_stops_the_training_is_a_row_with_its_key():
    class Broken(TinyDataModule):
        def read(self):
            rest, test = super().read()
            rest.targets[:] = 7
            return rest, test

    report = found_by(SupervisedModule(TinyNet(), num_classes=3), Broken(samples=96))
    finding = next(finding for finding in report.wrong if finding.check in ("validation", "training"))
    assert finding.key == "data"
    assert "the label of sample" in finding.found


def test_an_unknown_exception_is_a_bug_and_keeps_its_traceback():
    class Bug(SupervisedModule):
        def terms(self, batch):
            raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError, match="of the user's own"):
        found_by(Bug(TinyNet(), num_classes=3))


def test_taps_that_fired_and_what_they_gave(trained):
    module = FEEDModule(TinyNet(), copy.deepcopy(trained), num_classes=3, student_layer="features")
    report = found_by(module)
    assert report.is_well, report.rows()
    assert one(report, "taps").found == (
        "student features float32 (8, 8, 4, 4); teacher 0 features float32 (8, 8, 4, 4)"
    )


def test_a_silent_tap():
    class Lazy(FEEDModule):
        def terms(self, batch):
            return {"ce": self.output.label_loss(self.student(batch.input), batch)}

        def weights(self):
            return {"ce": 1.0}

    module = Lazy(TinyNet(), TinyNet(), num_classes=3, student_layer="features", teacher_layers="features.3")
    report = found_by(module, data(val_size=8))
    finding = next(finding for finding in report.wrong if finding.check == "taps")
    assert finding.found == "silent: teacher 0 features.3"
    assert finding.key == "model.init_args.teacher_layers"


# Damaged files


@pytest.mark.parametrize(
    ("answer", "found"), [([], "none is damaged"), (["a.png", "b.png"], "2 are damaged: a.png, b.png"), (None, "none")]
)
def test_damaged_files(answer, found):
    datamodule = data()
    datamodule.check = lambda: answer
    finding = one(found_by(SupervisedModule(TinyNet(), num_classes=3), datamodule), "files")
    assert finding.found.startswith(found)
    assert finding.key == ("data" if answer else "")


def test_very_many_files_are_left_to_the_user(monkeypatch):
    monkeypatch.setattr(examination, "_FILES", 95)
    datamodule = data()
    datamodule.check = lambda: pytest.fail("it would take hours")
    finding = one(found_by(SupervisedModule(TinyNet(), num_classes=3), datamodule), "files")
    assert finding.is_well
    assert "check()" in finding.found


# No trace


def test_nothing_of_a_module_or_the_random_numbers_changes(trained):
    module = KDModule(TinyNet(), copy.deepcopy(trained), num_classes=3).eval()
    before, state, trainer = tensors_of(module), torch.get_rng_state(), tiny_trainer(max_epochs=2)
    callbacks = trainer.callbacks
    assert examine(module, data(), trainer=trainer).is_well
    after = tensors_of(module)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(state, torch.get_rng_state())
    assert trainer.callbacks is callbacks
    assert not module.training


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = SelfKDModule(TinyNet(), num_classes=3, past=StoredPast(in_checkpoint=0, folder=tmp_path / "past"))
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, logger=CSVLogger(tmp_path), profiler="simple")
    assert examine(module, data(), trainer=trainer).is_well
    assert list(tmp_path.rglob("*")) == []


def test_several_processes_are_refused():
    class TwoProcesses:
        world_size = 2

    with pytest.raises(InputError, match="devices=1"):
        examine(SupervisedModule(TinyNet(), num_classes=3), data(), trainer=TwoProcesses())


def test_steps_are_timed_by_their_median_after_the_warm_up():
    clock = Clock()
    clock.laps = [100.0, 50.0, 3.0, 1.0, 2.0]
    assert clock.seconds == 2
    clock.laps = [100.0]
    assert clock.seconds == 100
    clock.laps = []
    assert clock.seconds is None


def test_the_epoch_is_estimated_from_steps_and_validation():
    watch = Watch(SupervisedModule(TinyNet(), num_classes=3), steps=1, scored=1)
    watch.clock.laps, watch.val_clock.laps = [9.0, 9.0, 0.5], [9.0, 9.0, 0.25]
    watch.batches, watch.val_batches = 100.0, 40.0
    time = next(checks.costs(watch, epochs=30, steps=-1))
    assert time.found == "500 ms a step, 100 steps and the validation: 1.0 min an epoch, 30.0 min for 30"
    watch.clock.laps = [9.0, 9.0, 1.39]
    assert next(checks.costs(watch, epochs=None, steps=-1)).found.startswith("1.4 s a step, 100 steps")


def test_a_constant_is_one_whatever_its_scale():
    for scale in (1e-6, 1.0, 1e6):
        heard = Heard("teacher 0")
        heard.add(torch.full((4, 3), scale), None)
        heard.add(torch.full((4, 3), scale * (1 + 1e-7)), None)
        assert heard.is_constant
        heard.add(torch.full((4, 3), scale * 1.01), None)
        assert not heard.is_constant


# The command line


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        content = {
            "trainer": {"max_epochs": 2, "accelerator": "cpu"},
            "model": {
                "class_path": "SupervisedModule",
                "init_args": {"student": {"class_path": "SmallResNet", "init_args": {"num_classes": 10, "width": 2}}},
            },
            "data": {"class_path": "DigitsDataModule", "init_args": {"subset": 64, "val_size": 40, "image_size": 8}},
        }
        for part, change in changes.items():
            content[part] |= change
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        return "config.yaml"

    return write


@pytest.mark.parametrize("form", [["{}"], ["--config", "{}"], ["--config={}"], ["-c", "{}"]])
def test_the_status_is_0_where_all_is_well_and_nothing_is_written(config, form, tmp_path, capsys):
    path = config()
    words = [word.format(path) for word in form]
    assert main(["doctor", *words, "--steps", "1", "--data.init_args.batch_size", "16"]) == 0
    captured = capsys.readouterr()
    assert "All is well." in captured.out
    assert "float32 (16, 1, 8, 8)" in captured.out
    assert captured.err == ""
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_the_status_is_1_where_something_is_wrong_and_the_key_is_named(config, capsys):
    teacher = {"class_path": "SmallResNet", "init_args": {"num_classes": 10, "width": 2}}
    model = {"class_path": "KDModule", "init_args": {"student": teacher, "teachers": [teacher]}}
    assert main(["doctor", config(model=model), "--steps", "1"]) == 1
    out = capsys.readouterr().out
    assert "All is well" not in out
    assert "\nmodel.init_args.teachers, teacher 0 (SmallResNet): it is no better than chance" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the path of a configuration"),
        (["nothing.yaml"], "there is no configuration nothing.yaml"),
        (["config.yaml", "--steps", "0"], "--steps must be at least 1"),
        (["config.yaml", "--steps", "many"], "doctor: argument --steps"),
        (["config.yaml", "--model.init_args.nothing", "1"], "nothing"),
    ],
)
def test_bad_input_ends_with_status_2(config, arguments, message, capsys):
    config()
    assert main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_the_table_has_a_row_for_each_finding(trained):
    report = found_by(KDModule(TinyNet(), [copy.deepcopy(trained), Constant()], num_classes=3))
    rows = report.rows()
    assert rows[0] == ["check", "found", "change"]
    assert len(rows) == 1 + len(report.findings)
    assert {row[2] for row in rows[1:]} == {"ok", "model.init_args.teachers, teacher 1 (Constant)"}


def test_help_needs_no_pytorch():
    code = (
        "import sys; from distill_lightning.cli import main\ntry: main(['doctor', '--help'])\nexcept SystemExit: pass\n"
    )
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "exit status" in " ".join(done.stdout.split())
