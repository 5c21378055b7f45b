"""What is written is there whole or not at all, and a disk that is full or refuses is one line."""

import errno
import os
import subprocess

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from safetensors.torch import load_file

from distill_lightning import InputError, SmallCNN, SupervisedModule
from distill_lightning.callbacks import WholeCheckpointIO
from distill_lightning.cli import main
from distill_lightning.compression import export_onnx, write_artefact
from distill_lightning.networks.weights import read_weights
from distill_lightning.pages import write_pages
from distill_lightning.storage import files, whole_file, write_tensors, write_whole


def network():
    return SmallCNN(num_classes=3, width=8)


def onnx(path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export_onnx(network(), path, torch.randn(2, 1, 8, 8))


def checkpoint(path):
    WholeCheckpointIO().save_checkpoint({"state_dict": network().state_dict()}, path)


def figure(path):
    drawn = Figure()
    drawn.subplots().plot([1, 3, 2])
    with whole_file(path) as partial:
        drawn.savefig(partial)


WRITERS = {
    "safetensors": (lambda path: SupervisedModule(network(), num_classes=3).export_student(path), "x.safetensors"),
    "torch": (lambda path: SupervisedModule(network(), num_classes=3).export_student(path), "x.pt"),
    "tensors": (lambda path: write_tensors(path, {"logits": torch.randn(99, 9)}), "predictions.safetensors"),
    "onnx": (onnx, "x.onnx"),
    "packed": (lambda path: write_artefact(network(), path), "x.dlpk"),
    "checkpoint": (checkpoint, "last.ckpt"),
    "text": (lambda path: write_whole(path, [b"many " * 999]), "table.csv"),
    "page": (lambda path: write_pages(path.parent, {path.name: "many " * 999}, {}), "results.md"),
    "figure": (figure, "figure.png"),
}
EVERY = pytest.mark.parametrize(("write", "name"), WRITERS.values(), ids=WRITERS)


@pytest.fixture
def little_disk(tmp_path):
    """A file system with room for one page."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", folder], check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@EVERY
def test_a_full_disk_is_one_line_and_what_was_there_is_kept(write, name, little_disk):
    path = little_disk / name
    path.write_text("of before")
    with pytest.raises(
        InputError, match=f"the disk is full, .*{name} is not written: make room.*before is kept"
    ) as told:
        write(path)
    assert "\n" not in str(told.value)
    assert [(found.name, found.read_text()) for found in little_disk.iterdir()] == [(name, "of before")]


@EVERY
def test_a_write_that_fails_in_the_middle_leaves_what_was_there(write, name, tmp_path, monkeypatch):
    """The same without the right to mount: the disk takes only the first 100 bytes of a file."""
    if name == "figure.png":
        pytest.skip("Matplotlib writes it itself")
    path = tmp_path / name
    path.write_text("of before")

    def full(file, content):
        file.write(memoryview(content)[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_all", full)
    with pytest.raises(InputError, match=f"the disk is full, .*{name} is not written: make room.*before is kept"):
        write(path)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [(name, "of before")]


@EVERY
def test_folders_are_made_and_files_have_the_mode_that_the_umask_says(write, name, tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "new" / "folder" / name)
    finally:
        os.umask(before)
    assert (tmp_path / "new/folder" / name).stat().st_mode & 0o777 == 0o640


@EVERY
def test_a_folder_that_cannot_be_is_one_line(write, name, tmp_path):
    (tmp_path / "file").write_text("a file")
    for folder in ("file", "file/below"):
        with pytest.raises(InputError, match=rf"{folder}/{name} cannot be written \(.+\): give a path") as told:
            write(tmp_path / folder / name)
        assert "\n" not in str(told.value)
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\)"):
        write(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["file", name])


def test_a_folder_that_may_not_be_written_to_is_one_line(tmp_path):
    """In a process without root's rights, to whom every folder is open."""
    tmp_path.chmod(0o555)
    child = os.fork()
    if not child:
        done = 2
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            write_whole(tmp_path / "x", [b"x"])
        except InputError as error:
            done = 0 if "x cannot be written (Permission denied): give a path" in str(error) else 1
        finally:
            os._exit(done)
    _, status = os.waitpid(child, 0)
    tmp_path.chmod(0o755)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.csv").write_text("before")
    (tmp_path / "x.csv").symlink_to(tmp_path / "elsewhere/x.csv")
    write_whole(tmp_path / "x.csv", [b"after"])
    assert (tmp_path / "x.csv").is_symlink()
    assert (tmp_path / "elsewhere/x.csv").read_text() == "after"
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["x.csv"]


def test_the_files_hold_what_was_to_be_written(tmp_path):
    module = SupervisedModule(network(), num_classes=3)
    for name in ("x.safetensors", "x.pt"):
        found = read_weights(module.export_student(tmp_path / name))
        assert found.keys() == module.student.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in module.student.state_dict().items())
    state = {"state_dict": module.state_dict(), "epoch": 3}
    WholeCheckpointIO().save_checkpoint(state, tmp_path / "new/x.ckpt")
    loaded = torch.load(tmp_path / "new/x.ckpt", weights_only=True)
    assert loaded["epoch"] == 3
    assert all(torch.equal(loaded["state_dict"][key], value) for key, value in module.state_dict().items())


# On the command line


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = {"class_path": "SmallCNN", "init_args": {"num_classes": 10}}
    content = {
        "trainer": {
            "max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
            "limit_train_batches": 1, "limit_val_batches": 1, "limit_predict_batches": 1,
        },
        "model": {"class_path": "SupervisedModule", "init_args": {"student": student}},
        "data": {"class_path": "DigitsDataModule", "init_args": {"subset": 64, "val_size": 40}},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return "config.yaml"


def line_of(capsys, *arguments):
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.slow
def test_a_training_on_a_full_disk_ends_in_one_line(config, little_disk, capsys):
    line = line_of(capsys, "fit", "--config", config, "--trainer.default_root_dir", str(little_disk))
    assert "the disk is full" in line
    assert "make room and call again" in line
    assert not list(little_disk.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_comparison_on_a_full_disk_ends_in_one_line(little_disk, tmp_path, capsys):
    small = {"class_path": "SmallCNN", "init_args": {"width": 8}}
    content = {
        "data": {"class_path": "DigitsDataModule", "init_args": {"subset": 64, "val_size": 40, "test_size": 40}},
        "student": small, "teachers": {"number": 1, "network": small}, "epochs": 1, "seeds": [0],
        "methods": {"kd": {"class_path": "KDModule"}}, "output": str(little_disk / "out"),
    }  # fmt: skip
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content))
    assert "the disk is full, " in line_of(capsys, "compare", str(tmp_path / "compare.yaml"))


@pytest.mark.slow
def test_a_training_whose_folder_is_a_file_ends_in_one_line(config, capsys):
    line = line_of(capsys, "fit", "--config", config, "--trainer.default_root_dir", config)
    assert "config.yaml" in line
    assert "cannot be written (" in line


@pytest.mark.slow
def test_other_errors_of_the_system_stay_tracebacks(config, monkeypatch):
    def missing(*_):
        raise FileNotFoundError(errno.ENOENT, "No such file", "forgotten")

    monkeypatch.setattr(SupervisedModule, "terms", missing)
    with pytest.raises(FileNotFoundError):
        main(["fit", "--config", config])


@pytest.mark.slow
def test_predictions_overwrite_nothing(config, tmp_path, capsys):
    for logger, places in (
        ("true", ["lightning_logs/version_0/predictions", "lightning_logs/version_1/predictions"]),
        ("false", ["predictions", "predictions.2", "predictions.3"]),
    ):
        for place in places:
            (tmp_path / "before").mkdir(exist_ok=True)
            assert main(["predict", "--config", config, "--trainer.logger", logger]) == 0
            path = tmp_path / f"{place}.safetensors"
            assert f"Written: {path}" in capsys.readouterr().out
            assert load_file(path)["logits"].shape == (64, 10)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
