"""Every experiment that the README of the configurations lists is read, and trained on two batches of two.

Files have the formats of the real ones. The teachers' and students' names are timm's own, with their tags; weights are
not fetched. What takes longest is left out: random numbers (here they repeat), three of four rows and columns of
CIFAR's images, all but the first teacher of the three largest ensembles, ImageNet's teachers once they have answered,
and in compressions the search for the amount in large networks, and AlexNet's linear layers.
"""

import io
import os
import pickle
import re
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from scipy.io import savemat

from distill_lightning import CIFARDataModule, modules
from distill_lightning.cli.lightning_cli import DistillCLI

CONFIGS = Path(__file__).parents[1] / "configs"
REPRODUCE = CONFIGS / "reproduce"


def paths_of(experiment):
    return [REPRODUCE / f"{name}.yaml" for name in experiment]


def experiments():
    """The files of each row in the README's tables."""
    rows = [line for line in (CONFIGS / "README.md").read_text().splitlines() if line.startswith("| `base/")]
    return [tuple(re.findall(r"`([^`]+)`", row.split("|")[1])) for row in rows]


EXPERIMENTS = experiments()


def own_file(experiment):
    return next(name for name in experiment if not name.startswith("base/"))


# Each file as it stands, and one small network with each kind of what goes on top. Sequential FEED of a larger network
# is FEED with one of its teachers.
ON_TOP = [
    ("feed/resnet56", "base/baseline", "base/cutmix"),
    ("feed/resnet56", "base/kd"),
    ("extracurricular/cifar100", "base/baseline", "base/mixup"),
    ("meal_v2/mobilenetv3_small_075", "base/baseline"),
    ("self_kd/preact_resnet18", "base/cutout"),
    ("self_kd/preact_resnet18", "base/cutmix"),
    ("self_kd/preact_resnet18", "base/label_smoothing"),
    ("self_kd/preact_resnet18", "base/baseline", "base/label_smoothing"),
    ("extracurricular/mpiigaze", "base/kd"),
    ("extracurricular/mpiigaze", "base/baseline_regression"),
]
NOT_TRAINED = ("feed/resnet110_sequential", "feed/wrn28_10_sequential", "feed/resnext29_16x64d_sequential")
TRAINED = [
    experiment
    for experiment in EXPERIMENTS
    if experiment[1:] in ON_TOP
    or (experiment[-1] in (own_file(experiment), "base/380") and own_file(experiment) not in NOT_TRAINED)
]


def test_every_file_is_in_an_experiment_and_trained():
    files = {str(path.relative_to(REPRODUCE).with_suffix("")) for path in REPRODUCE.rglob("*.yaml")}
    assert files == {name for experiment in EXPERIMENTS for name in experiment}
    assert len(set(EXPERIMENTS)) == len(EXPERIMENTS)
    assert {name for name in files if not name.startswith("base/")} == {*map(own_file, TRAINED), *NOT_TRAINED}
    assert set(ON_TOP) <= {one[1:] for one in TRAINED}


@pytest.mark.parametrize("name", ["feed/resnet56_sequential", *NOT_TRAINED])
def test_a_stage_of_sequential_feed_has_the_first_teacher_alone(name):
    paths = paths_of([name.removesuffix("_sequential"), name])
    parallel, stage = (yaml.safe_load(path.read_text()) for path in paths)
    teachers = parallel["model"]["init_args"].pop("teachers")
    assert stage["model"]["init_args"].pop("teachers") == teachers[0]
    assert stage == parallel
    assert len({teacher["init_args"]["checkpoint"] for teacher in teachers}) == len(teachers) == 5


@pytest.fixture(scope="module")
def parser():
    """The command line's, with its many classes."""
    paths = paths_of(EXPERIMENTS[0])
    given = [word for path in paths for word in ("--config", str(path))]
    reading = pytest.MonkeyPatch()
    reading.setattr(DistillCLI, "instantiate_classes", lambda cli: None)
    reading.setattr(sys, "argv", ["distill-lightning"])
    try:
        return DistillCLI(given, run=False).parser
    finally:
        reading.undo()


def read(parser, experiment):
    words = [word for path in paths_of(experiment) for word in ("--config", str(path))]
    return parser.parse_args(words).as_dict()


# What goes on top meets every method, and one network of each.
READ = {(Path(own_file(one)).parent, *one[2:]): one for one in reversed(EXPERIMENTS) if one[-1] != own_file(one)}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", READ.values(), ids=" ".join)
def test_what_goes_on_top_changes_nothing_else(parser, experiment):
    """So a baseline has the method's network, data, augmentation, optimiser and schedule."""
    own = experiment[: experiment.index(own_file(experiment)) + 1]
    alone, found = read(parser, own), read(parser, experiment)
    before, after = (config["model"]["init_args"] for config in (alone, found))
    kind = getattr(modules, found["model"]["class_path"].rpartition(".")[2])
    tops = [yaml.safe_load(path.read_text()) for path in paths_of(experiment[len(own) :])]
    classes = [top["model"]["class_path"] for top in tops if "class_path" in top.get("model", {})]
    assert kind.__name__ == (classes or [alone["model"]["class_path"].rpartition(".")[2]])[-1]
    added = [
        one["class_path"] for top in tops for one in top.get("model", {}).get("init_args", {}).get("transforms+", [])
    ]
    assert [one["class_path"].rpartition(".")[2] for one in after.get("transforms") or []] == added
    for name in ("student", "optimizer", "lr_scheduler", "metrics", *(["teachers"] if "base/kd" in experiment else [])):
        assert after.get(name) == before.get(name)
    sizes = {} if "base/380" not in experiment else {"image_size": 380, "resize_size": 434}
    assert found["data"] == alone["data"] | {"init_args": alone["data"]["init_args"] | sizes}
    assert found["trainer"] == alone["trainer"]


# Files in the real formats


def cifar(folder):
    """CIFAR-100 and CIFAR-10, pickled as they are published."""
    draw = np.random.default_rng(0)
    for place, parts, label, classes in (
        ("cifar-100-python", {"train": 6, "test": 2}, b"fine_labels", 100),
        ("cifar-10-batches-py", {**{f"data_batch_{n}": 2 for n in range(1, 6)}, "test_batch": 2}, b"labels", 10),
    ):
        (folder / "data" / place).mkdir(parents=True)
        for part, count in parts.items():
            content = {
                b"data": draw.integers(0, 256, (count, 3072), dtype=np.uint8),
                label: [0, classes - 1] * (count // 2),
            }
            (folder / "data" / place / part).write_bytes(pickle.dumps(content, protocol=2))


def imagenet(folder):
    """A thousand folders of one image, all of them the same file."""
    picture = io.BytesIO()
    Image.effect_noise((40, 36), 50).convert("RGB").save(picture, format="JPEG")
    (folder / "one.JPEG").write_bytes(picture.getvalue())
    for number in range(1000):
        for part in ("train", "val"):
            place = folder / "data/imagenet" / part / f"n{number:08}"
            place.mkdir(parents=True)
            os.link(folder / "one.JPEG", place / "1.JPEG")


def mpiigaze(folder):
    """Three people, of whom a day of four frames is listed."""
    draw, root = np.random.default_rng(0), folder / "data/MPIIGaze"
    lists = root / "Evaluation Subset/sample list for eye image"
    lists.mkdir(parents=True)
    for person in ("p00", "p01", "p02"):
        sides = {
            side: {
                "gaze": draw.normal(size=(4, 3)) * 0.2 + [0, 0, -1],
                "image": draw.integers(0, 256, (4, 36, 60), dtype=np.uint8),
                "pose": draw.normal(size=(4, 3)) * 0.2,
            }
            for side in ("left", "right")
        }
        (root / "Data/Normalized" / person).mkdir(parents=True)
        names = np.array([[f"{number:04}.jpg"] for number in range(4)], dtype=object)
        savemat(root / "Data/Normalized" / person / "day01.mat", {"data": sides, "filenames": names})
        (lists / f"{person}.txt").write_text("".join(f"day01/{number:04}.jpg left\n" for number in range(4)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("papers")
    for write in (cifar, imagenet, mpiigaze):
        write(folder)
    return folder / "data"


# Less work


@pytest.fixture
def quick(monkeypatch):
    """Large networks in a fraction of the time."""
    noise = torch.randn(65_537)

    def repeating(method):
        own = getattr(torch.Tensor, method)

        def draw(tensor, first=0.0, second=1.0, **options):
            if tensor.numel() < len(noise):
                return own(tensor, first, second, **options)
            # Deviation and mean of numbers from `first` to `second`, or with these as mean and deviation.
            mean, scale = (first, second) if method == "normal_" else ((first + second) / 2, (second - first) / 12**0.5)
            return (
                tensor.copy_(noise.repeat(tensor.numel() // len(noise) + 1)[: tensor.numel()].view(tensor.shape))
                .mul_(scale)
                .add_(mean)
            )

        return draw

    for method in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, method, repeating(method))
    own_read = CIFARDataModule.read
    monkeypatch.setattr(CIFARDataModule, "input_shape", (3, 8, 8))
    monkeypatch.setattr(
        CIFARDataModule,
        "read",
        lambda self: tuple(part._replace(images=part.images[:, :, ::4, ::4].contiguous()) for part in own_read(self)),
    )


TEACHERS = {}


def pixels(images):
    """Logits that cost nothing."""
    return images.flatten(1)[:, :1000]


@pytest.fixture
def without_weights(monkeypatch):
    """Has timm make networks of which it knows the weights that are asked for, without these; teachers once for all.

    A teacher computes in the first experiment that has it; from then on it answers with pixels.
    """
    own = timm.create_model

    def create(name, *, pretrained, **options):
        assert pretrained
        assert "." in name
        assert timm.is_model_pretrained(name)
        if not name.startswith(("senet", "resnet152", "tf_efficientnet_b4")):
            return own(name, pretrained=False, **options)
        if name in TEACHERS:
            TEACHERS[name].forward = pixels
        else:
            TEACHERS[name] = own(name, pretrained=False, **options)
        return TEACHERS[name]

    monkeypatch.setattr(timm, "create_model", create)


def leave_networks(value):
    """Write what the trainings before this one would have left."""
    if isinstance(value, list):
        for part in value:
            leave_networks(part)
    elif isinstance(value, dict) and value.get("class_path") == "distill_lightning.Pretrained":
        network, path = value["init_args"]["network"], Path(value["init_args"]["checkpoint"])
        module, _, name = network["class_path"].rpartition(".")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(getattr(import_module(module), name)(**network["init_args"]).state_dict(), path)
    elif isinstance(value, dict):
        leave_networks(list(value.values()))


def shortened(path, folder):
    """A file with one teacher of the largest, and with a compression in two epochs."""
    config = yaml.safe_load(path.read_text())
    options = config["model"].setdefault("init_args", {})
    if path.stem in ("resnet110", "wrn28_10", "resnext29_16x64d"):
        del options["teachers"][1:]
    if "steps" in options:
        options["dense_epochs"] = min(options.get("dense_epochs", 0), 1)
        options |= {"calibration_batches": 1, "report": None}
        trained = [step for step in options["steps"] if "finetune_epochs" in step.get("init_args", {})]
        for step in trained:
            step["init_args"]["finetune_epochs"] = 1
            if path.stem in ("resnet56_channels", "resnet110_filters", "resnet50_filters"):
                # To find the amount takes the network apart a dozen times.
                step["init_args"] = {**step["init_args"], "budget": None, "amount": 0.25}
            if path.stem == "alexnet_deep_compression":
                # The linear layers have 58 million weights to sort and to share out.
                step["init_args"] |= {"k": 16} if "k" in step["init_args"] else {}
                step["init_args"]["targets"] = ["Conv2d"]
        config["trainer"]["max_epochs"] = options["dense_epochs"] + len(trained)
    leave_networks(config)
    (folder / path.name).write_text(yaml.safe_dump(config))
    return folder / path.name


@pytest.mark.slow
# The official discriminator is easily dead to a few rows of untrained networks, and the student is untrained.
@pytest.mark.filterwarnings("ignore:MEALV2Module. (the discriminator's output|in its first batch)")
@pytest.mark.parametrize("experiment", TRAINED, ids=" ".join)
def test_two_batches_of_two(experiment, data, quick, without_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for found in data.iterdir():
        (Path("data") / found.name).symlink_to(found)
    own, kind = own_file(experiment), yaml.safe_load(paths_of(experiment)[0].read_text())["data"]["class_path"]
    paths = [
        shortened(path, tmp_path) if name == own else path
        for name, path in zip(experiment, paths_of(experiment), strict=True)
    ]
    given = {"batch_size": 2, "subset": 4, "val_size": 2, "test_size": 2, "num_workers": 0}
    if kind == "ImageFolderDataModule":
        side = 64 if "alexnet" in own else 32
        given |= {"image_size": side, "resize_size": side}
    words = [word for path in paths for word in ("--config", str(path))]
    words += [f"--data.init_args.{name}={value}" for name, value in given.items()]
    if not own.startswith("compression/"):
        words.append("--trainer.max_epochs=1")
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    words += [f"--trainer.{name}=false" for name in quiet]
    # What BatchNorm has seen of two batches is too little for deep networks in eval mode.
    words.append("--trainer.limit_val_batches=0")
    monkeypatch.setattr(sys, "argv", ["distill-lightning"])
    # As fit makes it, without the parsers of the other verbs.
    cli = DistillCLI([*words, "--trainer.accelerator=cpu"], run=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 2 * cli.trainer.max_epochs
    assert all(parameter.isfinite().all() for parameter in cli.model.student.parameters())
