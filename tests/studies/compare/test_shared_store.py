"""What teachers say is kept once for all rows and seeds of a comparison, and the table stays what it was."""

import io

import pytest
import torch
import yaml
from compare_files import compare, write_config
from rich.console import Console
from safetensors.torch import load_file

from distill_lightning import Batch, InputError
from distill_lightning.networks import Pretrained
from distill_lightning.studies.compare import command
from distill_lightning.studies.compare.config import parse_config
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.plan import plan
from distill_lightning.studies.compare.storage import bytes_of_size
from distill_lightning.teachers.shared import OutputsStore, Tapped
from distill_lightning.testing import TinyNet

pytestmark = pytest.mark.usefixtures("undrawn")

CONFIG = {
    "data": {"class_path": "distill_lightning.testing.TinyDataModule", "init_args": {"samples": 24}},
    "teachers": {"network": {"class_path": "distill_lightning.testing.TinyNet"}, "number": 2, "epochs": 2},
    "student": {"class_path": "distill_lightning.testing.TinyNet", "init_args": {"width": 2}},
    "methods": {"kd": {"class_path": "KDModule"}},
    "epochs": 3,
    "seeds": [0],
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
    "accelerator": "cpu",
}  # fmt: skip
FEATURE = {"student_layer": "features"}
READING = {
    "kd_one": {"class_path": "KDModule", "teachers": 1},
    "meal": {"class_path": "MEALV2Module", "init_args": {"discriminator": "FixedDiscriminator"}},
    "feed": {"class_path": "FEEDModule", "init_args": {**FEATURE, "logit_term": {"class_path": "LogitTerm"}}},
    "factor": {"class_path": "FEEDModule", "paraphrasers": {"epochs": 1}, "init_args": FEATURE},
}  # fmt: skip
LIVE = {
    "extra": {
        "class_path": "ExtracurricularModule",
        "init_args": {"samplers": [{"class_path": "MixupSampler", "init_args": {"alpha": 1.0}}]},
    },
    "mixed": {"class_path": "KDModule", "init_args": {"transforms": [{"class_path": "Mixup"}]}},
    "chain": {"class_path": "KDModule", "teachers": "kd_one"},
}  # fmt: skip


def written(folder, **changes):
    return write_config({**CONFIG, **changes}, folder)


def outputs(folder, row, seed=0):
    return load_file(folder / f"runs/{row}/seed_{seed}/test_logits.safetensors")["last"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The same comparison with a store and without."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("store")
    path = written(folder, methods={**READING, **LIVE}, seeds=[0, 1])
    compare(path, folder / "kept", "--teachers_store.features", "1MB")
    compare(path, folder / "live", "--teachers_store", "null")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("row", [*READING, *LIVE, "alone"])
def test_a_student_that_reads_is_the_one_whose_teachers_run_beside_it(tables, row):
    # These batches are small enough for the same kernels: not a bit differs.
    for seed in (0, 1):
        assert torch.equal(outputs(tables / "kept", row, seed), outputs(tables / "live", row, seed))


@pytest.mark.slow
def test_the_heading_says_who_reads_and_what_was_saved(tables):
    text = (tables / "kept/results.md").read_text()
    assert "kept once for kd_one, meal, feed, factor (3 views, outputs float32; features float32 of features)" in text
    assert "live for extra (it asks about inputs of its own), mixed (Mixup changes the inputs), chain (kd_one" in text
    # 24 images, 3 views and 2 teachers; 2 seeds of 3 epochs under 1 + 2 + 2 + 2 teachers.
    assert "144 forward passes of a teacher and a sample in" in text
    assert "instead of 1,008 beside the students" in text
    assert "kept once" not in (tables / "live/results.md").read_text()


@pytest.mark.slow
def test_a_seed_that_is_added_reads_the_same_store(tables, monkeypatch):
    def nobody(*_):
        raise AssertionError("a teacher ran again")

    monkeypatch.setattr("distill_lightning.teachers.recorder._Recorder.predict_step", nobody)
    config = written(tables, methods={**READING, **LIVE}, seeds=[0, 1, 2])
    before = {path: path.stat().st_mtime_ns for path in (tables / "kept/runs/store").rglob("*.shard")}
    compare(config, tables / "kept", "--teachers_store.features", "1MB")
    assert before == {path: path.stat().st_mtime_ns for path in (tables / "kept/runs/store").rglob("*.shard")}
    assert torch.isfinite(outputs(tables / "kept", "feed", 2)).all()


def kept_by(folder, *arguments, **changes):
    """A comparison's store, filled, with its teachers, and the data of a student's run."""
    given = [written(folder, **changes), "--output", str(folder / "out"), *arguments]
    config = parse_config(given)
    command.run(config, given, console=Console(file=io.StringIO()))
    experiment = Experiment(config)
    (store,) = (run for run in plan(experiment, folder / "out") if run.makes_store)
    teachers = [Pretrained(experiment.teacher(), run.student_file).eval() for run in store.teachers]
    data = experiment.data(order_seed=7)
    experiment.storage.number(data)
    data.setup("fit")
    return experiment.storage, store, teachers, data


GAUSSIAN = {"class_path": "distill_lightning.testing.TinyNet", "init_args": {"num_targets": 2}}


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "dtype", "tolerance"), [("1MB", "float32", 1e-6), (1200, "float16", 2**-11)])
@pytest.mark.parametrize("is_regression", [False, True])
def test_what_is_kept_is_what_a_teacher_says_about_the_very_view(tmp_path, limit, dtype, tolerance, is_regression):
    changes = {}
    if is_regression:
        changes["data"] = {**CONFIG["data"], "init_args": {"samples": 24, "num_targets": 2}}
        changes |= {"teachers": {**CONFIG["teachers"], "network": GAUSSIAN}, "student": GAUSSIAN}
    storage, run, teachers, data = kept_by(tmp_path, f"--teachers_store.logits={limit}", **changes)
    assert (storage.outputs, storage.views, storage.kept_views) == (dtype, 3, 3)
    store = OutputsStore(run.folder, teachers, outputs=dtype, fill="never")
    loader = data.train_dataloader()
    digests = [part_of(run.folder, number)["made_by"]["teachers"] for number in range(2)]
    made_by = {"data": data.fingerprint()["data"], "transform": data.fingerprint()["transform"], "transforms": []}
    store.begin(samples=24, views=3, made_by={**made_by, "precision": "32-true", "teachers": digests})
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            read = store.read_or_ask(batch, None, device="cpu")["logits"]
            for row in range(batch.size):
                for number, teacher in enumerate(teachers):
                    said = teacher(batch.input[row : row + 1])[0].detach()
                    assert torch.allclose(read[row, number], said, rtol=tolerance, atol=1e-6)


def part_of(folder, number):
    return yaml.safe_load((folder / f"teacher_{number}/output/header.json").read_text())


@pytest.mark.slow
def test_one_view_stands_for_those_that_are_alike(tmp_path):
    data = {"class_path": "DigitsDataModule", "init_args": {"subset": 40, "padding": 0, "image_size": 8}}
    storage, run, _, numbered = kept_by(tmp_path, data=data)
    assert (storage.kept_views, numbered.views) == (1, 3)
    assert len(list(run.folder.glob("teacher_0/output/view_*"))) == 1
    path = written(tmp_path, data=data)
    compare(path, tmp_path / "live", "--teachers_store", "null")
    assert torch.allclose(outputs(tmp_path / "out", "kd"), outputs(tmp_path / "live", "kd"), atol=1e-4)


def storage(folder, *arguments, **changes):
    return Experiment(parse_config([written(folder, **changes), *arguments])).storage


def test_what_does_not_fit_stays_live_and_earlier_rows_come_first(tmp_path):
    methods = {"kd": {"class_path": "KDModule"}, "feed": READING["feed"], "one": {**READING["kd_one"]}}
    # 24 images, 3 views, 2 teachers of 3 classes, 2 bytes each.
    enough = 24 * 3 * 2 * 3 * 2
    found = storage(tmp_path, f"--teachers_store.logits={enough}", methods=methods)
    assert (found.outputs, list(found.rows), list(found.live)) == ("float16", ["kd", "one"], ["feed"])
    assert "features are more than teachers_store.features: 0" in found.live["feed"]
    found = storage(tmp_path, f"--teachers_store.logits={enough - 1}", "--teachers_store.features=1MB", methods=methods)
    assert not found.rows
    assert "outputs of 864 bytes are more than teachers_store.logits: 863" in found.live["kd"]
    # Twice 8 channels of 4 x 4 in half precision.
    wide = 24 * 3 * 2 * 128 * 2
    found = storage(tmp_path, f"--teachers_store.features={wide}", methods=methods)
    assert (found.features, found.tapped) == ("float16", (Tapped(0, "features"), Tapped(1, "features")))
    assert storage(tmp_path, f"--teachers_store.features={wide - 1}", methods=methods).tapped == ()
    assert not storage(tmp_path, "--teachers_store", "null", methods=methods).rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teachers_store.logits", "2 apples"], "teachers_store.logits must be a number of bytes, for example"),
        (["--teachers_store.views", "0"], "teachers_store.views must be at least 1, got 0"),
        (["--teachers_store.views", "2", "--data.init_args.views", "3"], "teachers_store.views is 2, and the data"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_named(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        storage(tmp_path, *arguments)


@pytest.mark.parametrize("key", ["logits", "features"])
def test_sizes_are_checked_without_teachers_too(tmp_path, key):
    path = written(tmp_path, methods={}, teachers_store={key: "2 apples"})
    plain = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del plain["teachers"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(InputError, match=f"teachers_store.{key} must be a number of bytes"):
        Experiment(parse_config([path]))


@pytest.mark.parametrize(("size", "count"), [("2GB", 2 * 10**9), ("1.5 kb", 1500), (7, 7), ("7", 7), ("3B", 3)])
def test_sizes_are_read(size, count):
    assert bytes_of_size("features", size) == count


@pytest.mark.slow
def test_a_method_with_inputs_of_its_own_is_not_answered_about_others(tmp_path, monkeypatch):
    def elsewhere(self, batch):
        teacher = self.teachers.distribution(Batch(-batch.input, batch.target, batch.key.index, batch.key.view))
        return {"ce": self.output.label_loss(self.respond(batch), batch), "kd": teacher.sum() * 0}

    monkeypatch.setattr("distill_lightning.KDModule.terms", elsewhere)
    compare(written(tmp_path), tmp_path / "out")
    # The rest of the table is made.
    assert (
        "is not what the teachers say now. A method that asks about other" in (tmp_path / "out/results.md").read_text()
    )


@pytest.mark.slow
def test_a_folder_from_before_goes_on_without_a_store(tmp_path):
    config = written(tmp_path)
    compare(config, tmp_path / "out", "--teachers_store", "null")
    known = tmp_path / "out/compare.yaml"
    begun = yaml.safe_load(known.read_text())
    del begun["teachers_store"]
    known.write_text(yaml.safe_dump(begun))
    compare(written(tmp_path, seeds=[0, 1]), tmp_path / "out")
    assert not (tmp_path / "out/runs/store").exists()
    assert (tmp_path / "out/runs/kd/seed_1/result.json").exists()
    with pytest.raises(InputError, match="belongs to another configuration"):
        compare(config, tmp_path / "out", "--teachers_store.features", "1MB")


def test_teachers_of_other_weights_are_refused(tmp_path):
    first, second = TinyNet(), TinyNet()
    made_by = {"data": {"count": 2}, "teachers": ["first"]}
    store = OutputsStore(tmp_path, first)
    store.begin(samples=2, views=1, made_by=made_by)
    store.write(0, 0, {"0 output": torch.zeros(2, 3)})
    other = OutputsStore(tmp_path, second, fill="never")
    with pytest.raises(InputError, match="made by something else: teachers is first, not second"):
        other.begin(samples=2, views=1, made_by={**made_by, "teachers": ["second"]})
