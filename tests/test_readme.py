"""The README's code runs as it stands there."""

import importlib
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torchvision.io import write_png

import distill_lightning
from distill_lightning import SmallResNet, load_exported
from distill_lightning.cli import main
from distill_lightning.compression.onnx.session import OnnxNetwork
from distill_lightning.studies.compress.config import parse_config as parse_compress

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"), ids=["subclass", "notebook", "compare", "own_data", "compression"])
@pytest.mark.filterwarnings("default")  # as a user's own process has them
def test_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.slow
def test_the_subclass_works_in_yaml(tmp_path, monkeypatch):
    (tmp_path / "mymethod.py").write_text(blocks("python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    network = {"class_path": "SmallResNet", "init_args": {"num_classes": 10, "width": 2}}
    config = {
        "trainer": {"fast_dev_run": True, "accelerator": "cpu"},
        "model": {
            "class_path": "mymethod.DKDModule",
            "init_args": {"student": network, "teachers": [network, network], "beta": 0.5},
        },
        "data": {"class_path": "DigitsDataModule", "init_args": {"image_size": 8}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "config.yaml")]) == 0


def test_the_notebook_example_leaves_a_student():
    assert 'module.export_student("student.safetensors")' in blocks("python")[1]


@pytest.fixture
def with_teachers(tmp_path, monkeypatch):
    """A folder as ``make demo`` leaves it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for number in (1, 2, 3):
        folder = tmp_path / f"results/digits/runs/teacher_{number}"
        folder.mkdir(parents=True)
        save_file(SmallResNet(10, width=16).state_dict(), folder / "student.safetensors")
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("with_teachers")
def test_the_fit_command_runs():
    command = blocks("bash")[0].split()
    assert command[0] == "distill-lightning"
    # One epoch and one override, in the form that the text below the command names.
    assert main([*command[1:], "--trainer.max_epochs", "1", "--model.init_args.beta", "30"]) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:teacher_. has an accuracy of")  # they are not trained
def test_the_callbacks_of_the_command_line_draw(with_teachers):
    command = blocks("bash")[2].replace("\\\n", " ").split()
    assert main([*command[1:], "--trainer.max_epochs", "1"]) == 0
    names = {path.name.rpartition("_")[0] for path in with_teachers.rglob("figures/*.png")}
    assert names == {"teachers", "val_reliability", "val_risk_coverage"}


@pytest.mark.slow
@pytest.mark.usefixtures("with_teachers")
def test_the_record_command_leaves_a_store_that_stands_for_the_teachers(capsys):
    command = blocks("bash")[3].split()
    assert command[:2] == ["distill-lightning", "record"]
    assert main(command[1:]) == 0
    assert "results/digits_store is complete." in capsys.readouterr().out
    without = re.search(r"\(`--model.init_args.teachers '([^']*)'`\)", README)
    arguments = [*command[2:], "--trainer.max_epochs", "1", "--model.init_args.teachers", without[1].replace("\n", " ")]
    assert main(["fit", *arguments]) == 0


def test_the_compare_command_is_understood():
    from distill_lightning.studies.compare.config import parse_config

    command = blocks("bash")[1].split()
    assert command[:2] == ["distill-lightning", "compare"]
    config = parse_config([str(ROOT / command[2]), *command[3:]])
    assert config.seeds == [0, 1, 2, 3, 4]


def test_the_compress_command_is_understood():
    (block,) = (block for block in blocks("bash") if block.startswith("distill-lightning compress"))
    command = block.split("#")[0].split()
    config = parse_compress([str(ROOT / command[2]), *command[3:]])
    assert config.seeds == [0, 1, 2]
    assert not config.overrides


def test_the_commands_of_detection_and_translation_name_what_there_is():
    """Each configuration is run in a test of its own."""
    section = README.partition("## Detection and translation")[2].partition("\n## ")[0]
    named = re.findall(r"configs/[\w/]+\.yaml", section)
    assert len(named) >= 3
    assert all((ROOT / name).exists() for name in named)
    extras = re.search(r"distill-lightning\[([\w,]+)\]", section)[1].split(",")
    declared = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2]
    assert all(f"\n{extra} =" in declared for extra in extras)


@pytest.mark.slow
@pytest.mark.usefixtures("with_teachers")
def test_the_doctor_command_runs_and_finds_the_teachers_untrained(capsys):
    command = re.search(r"`distill-lightning (doctor [^`]*)`", README)[1].split()
    assert main([*command, "--steps", "1"]) == 1
    assert "no better than chance" in capsys.readouterr().out
    package, name = re.search(r"In Python: `([\w.]+)\.(\w+)\(module, data\)`", README).groups()
    assert callable(getattr(importlib.import_module(package), name))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_images_and_networks_of_ones_own_go_all_the_way(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for part, name, number in itertools.product(("train", "val", "test"), ("RBC", "WBC", "Platelets"), range(2)):
        folder = tmp_path / "cells" / part / name
        folder.mkdir(parents=True, exist_ok=True)
        write_png(torch.randint(256, (3, 64, 64), generator=generator).byte(), str(folder / f"{number}.png"))
    text = next(block for block in blocks("yaml") if block.startswith("# cells.yaml"))
    (tmp_path / "cells.yaml").write_text(text)
    for teacher in yaml.safe_load(text)["model"]["init_args"]["teachers"]:
        made, path = teacher["init_args"]["network"], tmp_path / teacher["init_args"]["checkpoint"]
        path.parent.mkdir(parents=True)
        build = getattr(distill_lightning, made["class_path"].rpartition(".")[2])
        torch.save(build(**made["init_args"]).state_dict(), path)
    lines = next(block for block in blocks("bash") if block.startswith("distill-lightning doctor cells.yaml"))
    commands = [line.split()[1:] for line in lines.strip().splitlines()]
    assert [verb for verb, *_ in commands] == ["doctor", "fit", "test", "export"]
    short = {
        "doctor": ["--steps", "1", "--trainer.accelerator", "cpu"],
        "fit": ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"],
        "test": ["--trainer.accelerator", "cpu"],
    }
    for command in commands:
        # The doctor finds that these teachers have learnt nothing of these images.
        assert main([*command, *short.get(command[0], [])]) in ((0, 1) if command[0] == "doctor" else (0,))
    assert "Checkpoint: runs/cells/best.ckpt (val/nll" in capsys.readouterr().out
    student = load_exported("runs/cells/best_export")
    images = torch.rand(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        wanted = student(images)
    found = OnnxNetwork(Path("runs/cells/best_export/model.onnx"))(images)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_make_knows_the_commands():
    makefile = (ROOT / "Makefile").read_text()
    for verb in ("demo", "compress", "test", "check", "bench", "table"):
        assert re.search(rf"^{verb}:", makefile, flags=re.MULTILINE)
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]+_(?:TABLE|WORDS)\b", README)


# What is quoted from a committed report is what stands there.


def section(begin, end):
    return README[README.index(begin) : README.index(end, README.index(begin))]


def table(text):
    """The rows of the first Markdown table: the first cell, and the others."""
    lines = itertools.dropwhile(lambda line: line[:1] != "|", text.splitlines())
    lines = itertools.takewhile(lambda line: line[:1] == "|", lines)
    rows = [[cell.strip(" *") for cell in line[1:-1].split("|")] for line in lines]
    return [(name, cells) for name, *cells in rows if not set(name) <= set("- :")]


def numbers(text):
    return [number.replace(",", "") for number in re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?![\w.])", text)]


def stands_in(number, report):
    """Whether a number of the README is one of a report's, rounded to as many places."""
    places = len(number.partition(".")[2])
    half = 0.5001 * 10**-places
    return any(abs(float(number) - float(other)) <= half for other in report)


def rows_of(report):
    """The numbers of each row of a comparison: its values, and its differences to the student alone."""
    found = {row: numbers(" ".join(cells)) for row, cells in table(report)}
    differences = report.find("| minus alone, ")
    for row, cells in table(report[differences:]) if differences >= 0 else []:
        if row in found:
            found[row] += numbers(" ".join(cells))
    return list(found.values())


COMPARISONS = {
    "cifar10_methods": ("| | accuracy % | minus alone | NLL | ECE % |", "What it shows:"),
    "fashion_mnist_methods": ("| | accuracy % | NLL | ECE % | s / epoch |", "What it shows:"),
    "fashion_mnist_rotation": ("| | mean absolute error, rad | NLL", "Matching distributions"),
    "multi30k libreoffice": ("| | BLEU | chrF |", "On Multi30k label smoothing"),
    "fashion_voc blood_cells": ("| | mAP % | mAP@50 % |", "No row is told apart"),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_tables_of_methods_are_those_of_their_reports(name):
    texts = [(ROOT / "benchmarks/results" / one / "results.md").read_text() for one in name.split()]
    every = [row for text in texts for row in rows_of(text)]
    quoted = table(section(*COMPARISONS[name]))
    assert len(quoted) >= 5
    for row, cells in quoted:
        # All of a row's numbers stand in one row of the report.
        assert any(all(stands_in(number, found) for number in numbers(" ".join(cells))) for found in every), row


def test_the_compression_excerpt_is_that_of_its_report():
    text = (ROOT / "benchmarks/results/compression/deep_compression_cnn/report.md").read_text()
    report = dict(table(text))
    lines = section("stage                  accuracy %", "```").splitlines()[1:]
    quoted = [line for line in lines if line.strip() and not line.startswith("final:")]
    assert len(quoted) == 7
    for line in quoted:
        name, rest = re.match(r"(.+?)\s{2,}(.*)", line).groups()
        cells = next(cells for row, cells in report.items() if row.startswith(name) and "before" not in row)
        assert all(stands_in(number, numbers(" ".join(cells))) for number in numbers(rest)), line
    claim = lines[-1].partition(" at batch 32")[0].removeprefix("final: ")
    assert claim in report["final"][-1]


KERNELS = {
    "ResNet-18, 64x64: half the channels": ("ResNet-18", "half the channels"),
    "LSTM language model, 2x256: half the hidden units": ("LSTM language model", "half the hidden units"),
    "Transformer encoder, d 128: half the heads and neurons": ("Transformer encoder", "half the heads and neurons"),
}


def test_the_table_of_what_compression_saves_is_that_of_its_report():
    text = (ROOT / "benchmarks/results/compression/kernels.md").read_text()
    quoted = table(section("| | parameters | MACs | bytes | time |", "## Does it help?"))
    network = None
    for row, cells in quoted:
        network, what = KERNELS.get(row, (network, row.partition(",")[0]))
        part = dict(table(text.partition(f"## {network}\n")[2].partition("\n## ")[0]))
        for name in what.split("; "):
            found = numbers(" ".join(part[name]))
            assert all(stands_in(number, found) for number in numbers(" ".join(cells))), row


def test_the_costs_are_those_of_the_benchmark():
    found = json.loads((ROOT / "benchmarks/results/throughput.json").read_text())
    spreads = [(found["ratios"][name], *found["spread"].get(name, ())) for name in found["ratios"]]
    quoted = table(section("| | ratio |", "`compile` brings"))
    assert len(quoted) > 8
    for row, (cell,) in quoted:
        given = numbers(cell)
        assert any(all(stands_in(number, spread) for number in given) for spread in spreads), row
