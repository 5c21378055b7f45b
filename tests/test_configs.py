"""Every YAML file in the repository is run, on little data."""

import collections
import gzip
import io
import struct
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from distill_lightning import layers, networks
from distill_lightning.cli import main
from distill_lightning.compare import command

CONFIGS = Path(__file__).parents[1] / "configs"
COMPARE = sorted((CONFIGS / "compare").glob("*.yaml"))
START = sorted((CONFIGS / "start").glob("*.yaml"))


def small_fashion_mnist(folder):
    """A few images in Fashion-MNIST's real on-disk format."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 200), ("t10k", 60)):
        pixels = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        header = struct.pack(">HBB3I", 0, 8, 3, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.numpy().tobytes()))
        header = struct.pack(">HBBI", 0, 8, 1, count)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.numpy().tobytes()))


def small_image_folder(folder, classes=1000):
    """As many classes as ImageNet, one small image each for training and one for test."""
    picture = io.BytesIO()
    Image.effect_noise((40, 36), 50).convert("RGB").save(picture, format="JPEG")
    for part in ("train", "val"):
        for number in range(classes):
            place = folder / part / f"n{number:08d}"
            place.mkdir(parents=True)
            (place / f"{part}_{number}.JPEG").write_bytes(picture.getvalue())


def test_every_yaml_is_in_a_tested_folder():
    assert set(CONFIGS.rglob("*.yaml")) == {*COMPARE, *START}


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPARE, ids=lambda path: path.stem)
def test_compare_runs(path, tmp_path):
    config = yaml.safe_load(path.read_text())
    config |= {"epochs": 1, "seeds": [0], "output": str(tmp_path / "out")}
    config["data"].setdefault("init_args", {}).update(subset=64, val_size=40, test_size=50)
    if "FashionMNIST" in config["data"]["class_path"]:
        small_fashion_mnist(tmp_path)
        config["data"]["init_args"]["data_dir"] = str(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command.run([str(tmp_path / "config.yaml")], console=Console(file=io.StringIO()))
    lines = (tmp_path / "out/results.csv").read_text().splitlines()
    rows = 1 + sum(spec.get("stages", 1) for spec in config["methods"].values())
    assert len(lines) == 1 + rows


def networks_in(value):
    """The arguments of every `Pretrained` that a configuration names."""
    if isinstance(value, list):
        return [pair for part in value for pair in networks_in(part)]
    if not isinstance(value, dict):
        return []
    if value.get("class_path") == "distill_lightning.Pretrained":
        return [value["init_args"]]
    return [pair for part in value.values() for pair in networks_in(part)]


@pytest.mark.parametrize("path", START, ids=lambda path: path.stem)
def test_fit_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text())
    # What a comparison, or the training before this one, would have left.
    left = collections.defaultdict(dict)
    for pretrained in networks_in(config["model"]):
        name = pretrained["network"]["class_path"].rpartition(".")[2]
        network = (getattr(layers, name, None) or getattr(networks, name))(**pretrained["network"]["init_args"])
        part = f"{pretrained['part']}." if "part" in pretrained else ""
        left[pretrained["checkpoint"]] |= {part + key: value for key, value in network.state_dict().items()}
    for file, state in left.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(state, tmp_path / file) if file.endswith(".safetensors") else torch.save(state, tmp_path / file)
    arguments = ["fit", "--config", str(path), "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    if "FashionMNIST" in config["data"]["class_path"]:
        small_fashion_mnist(tmp_path)
        for name, value in {"data_dir": tmp_path, "subset": 64, "val_size": 40}.items():
            arguments += [f"--data.init_args.{name}", str(value)]
    if "ImageFolder" in config["data"]["class_path"]:
        small_image_folder(tmp_path / config["data"]["init_args"]["data_dir"])
        sizes = {"image_size": 32, "resize_size": 36, "subset": 4, "val_size": 4, "test_size": 4, "batch_size": 8}
        for name, value in (sizes | {"num_workers": 0}).items():
            arguments += [f"--data.init_args.{name}", str(value)]
    assert main(arguments) == 0


def test_every_method_has_a_start_for_both_data_sets():
    methods = (
        "supervised", "kd", "feed", "hint", "attention", "paraphraser", "factor_transfer", "self_kd", "meal_v2",
        "extracurricular", "generator", "extracurricular_generator", "regression_rotated", "extracurricular_rotated",
    )  # fmt: skip
    expected = {f"{method}_{data}" for method in methods for data in ("digits", "fashion_mnist")}
    assert expected <= {path.stem for path in START}
