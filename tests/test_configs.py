"""Every YAML file in the repository is run, on little data."""

import collections
import functools
import gzip
import io
import json
import pickle
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from scipy.io import savemat

from distill_lightning import FashionVOC, layers, networks, write_fashion_voc
from distill_lightning.cli import main
from distill_lightning.compression import load_compressed
from distill_lightning.studies.compare import command
from distill_lightning.studies.compare.config import parse_config

CONFIGS = Path(__file__).parents[1] / "configs"
COMPARE = sorted((CONFIGS / "compare").glob("*.yaml"))
START = sorted((CONFIGS / "start").glob("*.yaml"))
COMPRESSION = [path for path in START if "class_path: CompressionBaseline" in path.read_text()]


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


def small_translations(folder, config):
    """A few pairs in the files that a configuration reads, and what makes it read them; the network is small, too."""
    init, sizes = config["data"]["init_args"], {"test_size": 20, "subset": 64, "val_size": 40}
    lines = [(f"Open file {number}.", f"Öffne Datei {number}.") for number in range(200)]
    place = init.get("data_dir", "text")
    if place == "iwslt15":
        (folder / place).mkdir()
        for side, language in enumerate(("en", "de")):
            text = "".join(f"<url>x</url>\n{line[side]}\n" for line in lines)
            (folder / place / f"train.tags.en-de.{language}").write_text(text)
    elif "corpus" in init:
        (folder / place / "de/LC_MESSAGES").mkdir(parents=True)
        entries = "\n".join(f'msgid "{source}"\nmsgstr "{target}"\n' for source, target in lines)
        (folder / place / "de/LC_MESSAGES/x.po").write_text(entries)
    else:
        for side, language in enumerate(("en-US", "de")):
            (folder / place / language).mkdir(parents=True)
            text = "".join(f'<p id="par_id{number}">{line[side]}</p>\n' for number, line in enumerate(lines))
            (folder / place / language / "x.html").write_text(text)
        # With a folder, plain text would be looked for.
        sizes["corpus"] = "LibreOfficeHelp"
    # The doctor leaves the working folder as it was, but for the tokenizer.
    sizes |= {"data_dir": folder / place, "cache_dir": folder.with_name(f"{folder.name}_tokenizer")}
    small = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "heads": 2, "feedforward": 16, "max_length": 64}
    return [
        *(f"--data.init_args.{name}={value}" for name, value in sizes.items()),
        *(f"--model.init_args.student.init_args.{name}={value}" for name, value in small.items()),
    ]


def small_voc(folder):
    """As many classes as Pascal VOC has, in as many small images for training, and two for test."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for number in range(22):
        Image.effect_noise((96, 64), 50).convert("RGB").save(folder / f"JPEGImages/{number:06}.jpg")
        box = "<bndbox><xmin>20</xmin><ymin>10</ymin><xmax>60</xmax><ymax>50</ymax></bndbox>"
        (folder / f"Annotations/{number:06}.xml").write_text(
            "<annotation><size><width>96</width><height>64</height></size>"
            f"<object><name>class {number % 20:02}</name>{box}</object></annotation>"
        )
    for split, numbers in (("trainval", range(20)), ("test", range(20, 22))):
        (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{number:06}\n" for number in numbers))


def test_every_yaml_is_in_a_tested_folder():
    # Those of the papers are in test_configs_reproduce.py.
    assert set(CONFIGS.rglob("*.yaml")) == {*COMPARE, *START, *(CONFIGS / "reproduce").glob("*/*.yaml")}


def small_cifar(folder):
    """CIFAR-10's pickled files, of noise."""
    draw = np.random.default_rng(0)
    for name, count in {**{f"data_batch_{number}": 40 for number in range(1, 6)}, "test_batch": 50}.items():
        content = {"data": draw.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": [*range(10)] * (count // 10)}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def small_images(folder, data):
    """A few images in the files that a data module reads, and what makes it read them."""
    options = data.setdefault("init_args", {})
    options.update(subset=64, val_size=40, test_size=50)
    if "FashionMNIST" in data["class_path"]:
        if not list(folder.glob("*.gz")):
            small_fashion_mnist(folder)
        options["data_dir"] = str(folder)
    if "CIFAR" in data["class_path"]:
        if not (folder / "test_batch").exists():
            small_cifar(folder)
        options["data_dir"] = str(folder)
    if "ImageFolder" in data["class_path"]:
        if not (folder / "images").exists():
            small_image_folder(folder / "images", classes=12)
        options.update(subset=8, val_size=4, test_size=8, num_workers=0, data_dir=str(folder / "images"))


def small_detection(folder, config):
    """A few pictures with boxes, and images for the backbones."""
    options = config["data"]["init_args"]
    options.update(data_dir=str(folder / "voc"), batch_size=2, num_workers=0)
    pictures = {"items": "digits", "images": [4, 2, 2], "size": 64, "item_size": [16, 32]}
    if "pictures" in options:
        options["pictures"]["init_args"] = pictures
    else:
        write_fashion_voc(folder / "voc", FashionVOC(**pictures))
        options["class_names"] = list("0123456789")
    config["student"]["init_args"].update(min_size=64, max_size=64)
    for backbone in config["backbones"].values():
        backbone["epochs"] = 1
        small_images(folder, backbone["data"])


def samplers_in(methods):
    """The arguments of every `UnlabelledSampler` in a comparison's methods."""
    samplers = [sampler for spec in methods.values() for sampler in spec.get("init_args", {}).get("samplers", [])]
    return [sampler["init_args"] for sampler in samplers if sampler["class_path"] == "UnlabelledSampler"]


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPARE, ids=lambda path: path.stem)
def test_compare_runs(path, tmp_path):
    config = yaml.safe_load(path.read_text())
    config |= {"epochs": 1, "seeds": [0], "output": str(tmp_path / "out"), "accelerator": "cpu"}
    given = [str(tmp_path / "config.yaml")]
    if "Translation" in config["data"]["class_path"]:
        given += [option.replace("model.init_args.", "") for option in small_translations(tmp_path, config)]
    elif "VOC" in config["data"]["class_path"]:
        small_detection(tmp_path, config)
    else:
        small_images(tmp_path, config["data"])
    for sampler in samplers_in(config["methods"]):
        small_images(tmp_path, sampler["data"])
    if "sets" in config.get("teachers", {}):
        config["teachers"]["sets"] = 2
    if "search" in config:
        # Each row's first combination stands for its others, and two of the searches for all that are alike.
        config["teachers"]["network"]["init_args"]["width"] = 4
        config["trials"] = 1
        config["search"] = {row: config["search"][row] for row in ("label_smoothing", "unlabelled")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command.run(parse_config(given), given, console=Console(file=io.StringIO()))
    lines = (tmp_path / "out/results.csv").read_text().splitlines()
    rows = 1 + sum(spec.get("stages", 1) for spec in config["methods"].values())
    assert len(lines) == 1 + rows * config.get("teachers", {}).get("sets", 1)


def networks_in(value):
    """The arguments of every `Pretrained` that a configuration names."""
    if isinstance(value, list):
        return [pair for part in value for pair in networks_in(part)]
    if not isinstance(value, dict):
        return []
    if value.get("class_path") == "distill_lightning.Pretrained":
        return [value["init_args"]]
    return [pair for part in value.values() for pair in networks_in(part)]


def shortened(config, name):
    """A compression in one epoch for each of its phases, timed at one batch size."""
    model = config["model"]["init_args"]
    model["dense_epochs"] = 1
    for step in model["steps"]:
        if step["init_args"].get("finetune_epochs"):
            step["init_args"]["finetune_epochs"] = 1
    model["report"]["batch_sizes"] = [2]
    # An export takes seconds: one static and one dynamic int8 version are enough, where they can be made at all.
    if name not in ("structured_kd_cnn", "transformer_heads_ffn_int8") or not find_spec("onnxruntime"):
        model["report"]["onnx"] = "none"
    config["trainer"]["max_epochs"] = 1 + sum(step["init_args"].get("finetune_epochs", 0) for step in model["steps"])
    config["data"].setdefault("init_args", {}).update(subset=64, val_size=20, test_size=20)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPRESSION, ids=lambda path: path.stem)
def test_compression_fits(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = shortened(yaml.safe_load(path.read_text()), path.stem)
    if "Docstrings" in config["data"]["class_path"]:
        # Reading Python's own takes seconds.
        for number in range(9):
            (tmp_path / f"text_{number}.py").write_text(f'"""{f"What file {number} does. " * 60}"""\n')
        config["data"]["init_args"] |= {"data_dir": str(tmp_path), "subset": 32}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "short.yaml")]) == 0
    (compressed,) = tmp_path.rglob("compressed.ckpt")
    assert type(load_compressed(compressed)).__name__ == config["model"]["init_args"]["network"]["class_path"]
    done = torch.load(compressed, weights_only=True)["compression"]["structure"]
    assert done["changes"] or done["layers"]


@pytest.mark.slow
def test_deep_compression_holds_its_promise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(CONFIGS / "start/deep_compression_cnn.yaml")
    assert main(["compress", path, "--controls", "--output", "out"]) == 0
    stages = {stage["name"]: stage for stage in json.loads(Path("out/report.json").read_text())["stages"]["0"]}
    dense, final = stages["dense"], stages["final"]
    assert final["scores"]["accuracy"] >= dense["scores"]["accuracy"] - 0.01
    for key in ("artefact", "state_dict"):
        assert 20 * final["nbytes"]["artefact"] <= dense["nbytes"][key]


def voc_arguments(kind, folder):
    """A detection on few pictures, laid into a folder."""
    if kind == "FashionVOCDataModule":
        write_fashion_voc(folder / "fashion_voc", FashionVOC(items="digits", images=(10, 4, 4)))
        return ["--data.init_args.pictures.items", "digits", "--data.init_args.pictures.images", "[10, 4, 4]"]
    small_voc(folder / "VOCdevkit/VOC2007")
    sizes = {"subset": 2, "val_size": 2, "batch_size": 2, "num_workers": 0}
    given = [f"--data.init_args.{name}={value}" for name, value in sizes.items()]
    return ["--model.init_args.student.init_args.min_size=64", *given]


def leave_networks(model, folder):
    """Write what a comparison, or the training before this one, would have left."""
    left = collections.defaultdict(dict)
    for pretrained in networks_in(model):
        name = pretrained["network"]["class_path"].rpartition(".")[2]
        network = (getattr(layers, name, None) or getattr(networks, name))(**pretrained["network"]["init_args"])
        part = f"{pretrained['part']}." if "part" in pretrained else ""
        left[pretrained["checkpoint"]] |= {part + key: value for key, value in network.state_dict().items()}
    for file, state in left.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / file) if file.endswith(".safetensors") else torch.save(state, folder / file)


def small_texts(folder):
    """Python files with docstrings; reading Python's own takes seconds."""
    for number in range(30):
        (folder / f"text_{number}.py").write_text(f'"""{f"What file {number} does. " * 60}"""\n')


def small_mpiigaze(folder):
    """Three people, a day of 80 frames each, of which every eye is listed that looks left or right."""
    generator = np.random.default_rng(0)
    for person in ("p00", "p01", "p02"):
        data = {}
        for side in ("left", "right"):
            gaze = generator.normal(size=(80, 3)) * 0.2 + [0, 0, -1]
            images = generator.integers(0, 256, (80, 36, 60), dtype=np.uint8)
            data[side] = {"gaze": gaze, "image": images, "pose": generator.normal(size=(80, 3)) * 0.2}
        (folder / "Data/Normalized" / person).mkdir(parents=True)
        names = np.array([[f"{number:04}.jpg"] for number in range(80)], dtype=object)
        savemat(folder / "Data/Normalized" / person / "day01.mat", {"data": data, "filenames": names})
        lists = folder / "Evaluation Subset/sample list for eye image"
        lists.mkdir(parents=True, exist_ok=True)
        sides = ("left", "right")
        (lists / f"{person}.txt").write_text("".join(f"day01/{n:04}.jpg {sides[n % 2]}\n" for n in range(80)))


def small_arguments(path, folder):
    """A configuration on little data, with the files that it reads laid into the working folder."""
    config = yaml.safe_load(path.read_text())
    leave_networks(config["model"], folder)
    arguments = ["--config", str(path), "--trainer.accelerator", "cpu"]
    if "Translation" in config["data"]["class_path"]:
        return arguments + small_translations(folder, config)
    if not any(name in config["data"]["class_path"] for name in ("ImageFolder", "VOC")):
        arguments += ["--data.init_args.subset", "64", "--data.init_args.val_size", "40"]
    if "FashionMNIST" in config["data"]["class_path"]:
        small_fashion_mnist(folder)
        arguments += ["--data.init_args.data_dir", str(folder)]
    if "ImageFolder" in config["data"]["class_path"]:
        small_image_folder(folder / config["data"]["init_args"]["data_dir"])
        sizes = {"image_size": 32, "resize_size": 36, "subset": 4, "val_size": 4, "test_size": 4, "batch_size": 8}
        for name, value in (sizes | {"num_workers": 0}).items():
            arguments += [f"--data.init_args.{name}", str(value)]
    if "VOC" in config["data"]["class_path"]:
        arguments += voc_arguments(config["data"]["class_path"], folder / "data")
    if "Gaze" in config["data"]["class_path"]:
        small_mpiigaze(folder / config["data"]["init_args"]["data_dir"])
    if "Docstrings" in config["data"]["class_path"]:
        small_texts(folder)
        arguments += ["--data.init_args.data_dir", str(folder)]
    return arguments


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in START if path not in COMPRESSION], ids=lambda path: path.stem)
def test_fit_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *small_arguments(path, tmp_path), "--trainer.max_epochs", "1"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", START, ids=lambda path: path.stem)
def test_the_doctor_finds_nothing_but_the_teachers_untrained(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = small_arguments(path, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    status = main(["doctor", *arguments, "--steps", "1"])
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if line.startswith(("model", "data", "trainer"))]
    assert status == (1 if wrong else 0)
    untrained = ("no better than chance", "does not depend on its input")
    # Four images are not of a thousand classes.
    few = "data.init_args.subset" if "ImageFolder" in path.read_text() else "teacher"
    assert all(few in line or ("teacher" in line and any(said in line for said in untrained)) for line in wrong), wrong


# One for each set of options of a model.
MODELS = {path: yaml.safe_load(path.read_text())["model"] for path in START}
KINDS = {(model["class_path"], *model["init_args"]): path for path, model in MODELS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("path", KINDS.values(), ids=lambda path: path.stem)
def test_a_value_on_the_line_goes_before_the_file(path, capsys):
    """In whatever way the networks are made: by classes, by functions, one in another."""
    given = yaml.safe_load(path.read_text())["model"]["init_args"]
    size = "max_tokens" if "TranslationDataModule" in path.read_text() else "batch_size"
    changes = {"trainer.max_epochs": 7, f"data.init_args.{size}": 9, "model.init_args.optimizer.init_args.lr": 0.125}
    for name in ("student", "network", "generator"):
        if "num_classes" in given.get(name, {}).get("init_args", {}):
            changes[f"model.init_args.{name}.init_args.num_classes"] = 7
    line = [f"--{key}={value}" for key, value in changes.items()]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), *line, "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for key, value in changes.items():
        assert functools.reduce(lambda found, part: found[part], key.split("."), printed) == value


@pytest.mark.parametrize("path", COMPARE, ids=lambda path: path.stem)
def test_a_value_on_the_line_of_a_comparison_goes_before_the_file(path):
    assert parse_config([str(path), "--epochs", "7"]).epochs == 7


def test_the_compressions_are_there():
    names = {
        "deep_compression_cnn", "structured_kd_cnn", "lowrank_cnn", "lstm_hidden_units_int8",
        "transformer_heads_ffn_int8", "binary_ternary_qat",
    }  # fmt: skip
    assert {path.stem for path in COMPRESSION} == names


def test_every_method_has_a_start_for_both_data_sets():
    methods = (
        "supervised", "kd", "feed", "hint", "attention", "paraphraser", "factor_transfer", "self_kd", "meal_v2",
        "extracurricular", "generator", "extracurricular_generator", "regression_rotated", "extracurricular_rotated",
    )  # fmt: skip
    expected = {f"{method}_{data}" for method in methods for data in ("digits", "fashion_mnist")}
    assert expected <= {path.stem for path in START}
