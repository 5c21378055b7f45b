"""The options that data modules share: the same in Python, in YAML and on the command line."""

import inspect
import os
import re

import pytest
import pytorch_lightning as pl
import yaml
from jsonargparse import ArgumentParser

from distill_lightning import (
    CIFARDataModule,
    ColorJitter,
    DigitsDataModule,
    DocstringsDataModule,
    FashionMNISTDataModule,
    FashionVOCDataModule,
    ImageFolderDataModule,
    InMemoryImageDataModule,
    InputError,
    Lighting,
    RandAugment,
    RotatedDigitsDataModule,
    RotatedFashionMNISTDataModule,
    VOCDetectionDataModule,
)
from distill_lightning.data.datamodules import ImageDataModule, LoadingOptions, ViewDataModule, ViewOptions

# The sizes of the splits are each data module's own: their defaults depend on how much data there is.
OWN = {"val_size", "test_size"}
VALUES = {
    "subset": 7, "batch_size": 12, "views": 6, "views_per_load": 3, "partners": True, "seed": 5, "order_seed": 8,
    "drop_last": True, "num_workers": 2,
}  # fmt: skip
LOADING = {name: value for name, value in VALUES.items() if name in LoadingOptions.__optional_keys__}
MODULES = {
    DigitsDataModule: VALUES,
    CIFARDataModule: VALUES,
    FashionMNISTDataModule: VALUES,
    RotatedDigitsDataModule: VALUES,
    RotatedFashionMNISTDataModule: VALUES,
    ImageFolderDataModule: VALUES,
    DocstringsDataModule: LOADING,
    FashionVOCDataModule: LOADING,
    VOCDetectionDataModule: LOADING,
}
EVERY = [*MODULES, ImageDataModule, InMemoryImageDataModule]


def keywords(kind):
    return {name: one for name, one in inspect.signature(kind).parameters.items() if name != "self"}


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
    return tmp_path


def needed(kind, folder):
    """What has no default."""
    if kind is VOCDetectionDataModule:
        return {"data_dir": folder, "class_names": ["cat"]}
    if kind is CIFARDataModule:
        return {"data_dir": folder}
    return {"data_dir": folder, "val_size": 1} if kind is ImageFolderDataModule else {}


def parsed(kind, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    parser.add_argument("--config", action="config")
    return parser.instantiate_classes(parser.parse_args(arguments)).data


def test_the_options_are_the_keywords_of_the_base():
    base = keywords(ViewDataModule)
    assert ViewOptions.__optional_keys__ == base.keys() - OWN
    assert LoadingOptions.__optional_keys__ == base.keys() - OWN - {"views", "views_per_load", "partners"}
    assert not ViewOptions.__required_keys__
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in base.values())
    assert {name: one.annotation for name, one in base.items() if name not in OWN} == {
        name: annotation.__forward_arg__
        for kind in (LoadingOptions, ViewOptions)
        for name, annotation in kind.__annotations__.items()
    }


@pytest.mark.parametrize("options", [LoadingOptions, ViewOptions])
def test_every_option_is_documented_with_its_default(options):
    documented = inspect.getdoc(options).partition("Args:")[2]
    base = keywords(ViewDataModule)
    parts = re.split(r"^ {4}(\w+): ", documented, flags=re.M)[1:]
    described = dict(zip(parts[::2], parts[1::2], strict=True))
    assert described.keys() == options.__optional_keys__
    for name, text in described.items():
        default, words = base[name].default, " ".join(text.split())
        assert f"``{default}``, the default" in words or f"{default} by default" in words.replace("`", ""), name


@pytest.mark.parametrize("kind", EVERY)
def test_a_data_module_has_few_arguments_of_its_own_and_names_none_again(kind):
    own = keywords(kind)
    options = own.pop("options")
    assert options.kind is inspect.Parameter.VAR_KEYWORD
    assert not own.keys() & ViewOptions.__optional_keys__
    assert len(own) <= 14


@pytest.mark.parametrize("kind", MODULES)
def test_the_options_reach_the_data_module(kind, folder):
    given = MODULES[kind]
    data = kind(**needed(kind, folder), **given)
    assert {name: getattr(data, name) for name in given} == given


@pytest.mark.parametrize("kind", MODULES)
def test_the_defaults_are_those_of_the_base(kind, folder):
    data, base = kind(**needed(kind, folder)), keywords(ViewDataModule)
    workers = len(os.sched_getaffinity(0)) if kind.default_workers is None else 0
    expected = {name: base[name].default for name in MODULES[kind]} | {"num_workers": workers}
    # A detector keeps much of each image.
    expected |= {"batch_size": 8} if issubclass(kind, VOCDetectionDataModule) else {}
    assert {name: getattr(data, name) for name in expected} == expected
    assert kind(**needed(kind, folder), num_workers=0).num_workers == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("way", ["line", "yaml"])
def test_the_options_are_read_from_yaml_and_the_command_line(kind, way, folder):
    given = needed(kind, folder) | MODULES[kind]
    if way == "line":
        arguments = [f"--data={kind.__name__}", *(f"--data.{name}={value}" for name, value in given.items())]
    else:
        lines = ["data:", f"  class_path: {kind.__name__}", "  init_args:"]
        lines += [f"    {name}: {str(value).lower() if value is True else value}" for name, value in given.items()]
        (folder / "config.yaml").write_text("\n".join(lines))
        arguments = [f"--config={folder / 'config.yaml'}"]
    data = parsed(kind, arguments)
    assert type(data) is kind
    assert {name: getattr(data, name) for name in MODULES[kind]} == MODULES[kind]


# Choices of augmentations


@pytest.mark.parametrize(
    ("kind", "name", "choice"),
    [
        (CIFARDataModule, "randaugment", RandAugment(operations=3, magnitude=9)),
        (FashionMNISTDataModule, "randaugment", RandAugment(operations=1, magnitude=4)),
        (ImageFolderDataModule, "color_jitter", ColorJitter(brightness=0.1, hue=0.2)),
        (ImageFolderDataModule, "lighting", Lighting(std=0.3)),
    ],
)
def test_a_choice_is_read_from_yaml_and_the_command_line(kind, name, choice, folder):
    given = {key: str(value) for key, value in needed(kind, folder).items()}
    fields = {key: value for key, value in vars(choice).items() if value != getattr(type(choice), key)}
    lines = [f"--data={kind.__name__}", *(f"--data.{key}={value}" for key, value in given.items())]
    made = [parsed(kind, [*lines, *(f"--data.{name}.{key}={value}" for key, value in fields.items())])]
    for written in (fields, {"class_path": type(choice).__name__, "init_args": fields}):
        config = {"data": {"class_path": kind.__name__, "init_args": given | {name: written}}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        made.append(parsed(kind, [f"--config={folder / 'config.yaml'}"]))
    assert [getattr(data, name) for data in made] == [choice] * 3
    assert getattr(parsed(kind, lines), name) is None


UNKNOWN = [
    *[(kind, "batchsize") for kind in MODULES],
    *[(kind, "flip") for kind in (DigitsDataModule, RotatedDigitsDataModule, RotatedFashionMNISTDataModule)],
    *[(kind, "randaugment") for kind in (RotatedDigitsDataModule, RotatedFashionMNISTDataModule)],
    *[(DocstringsDataModule, name) for name in ("flip", "views", "views_per_load", "partners")],
    *[(VOCDetectionDataModule, name) for name in ("flip", "views", "partners")],
    (ImageFolderDataModule, "padding"),
]


@pytest.mark.parametrize(("kind", "name"), UNKNOWN)
def test_an_unknown_option_is_refused_everywhere(kind, name, folder):
    given = needed(kind, folder)
    with pytest.raises(TypeError, match=name):
        kind(**given, **{name: 1})
    line = [f"--data={kind.__name__}", *(f"--data.{key}={value}" for key, value in given.items())]
    with pytest.raises(Exception, match=name) as error:
        parsed(kind, [*line, f"--data.{name}=1"])
    assert type(error.value).__name__ == "ArgumentError"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"subset": -1}, "subset must be at least 1, got -1"),
        ({"num_workers": -1}, "num_workers cannot be negative, got -1"),
        ({"views_per_load": 0}, "views_per_load must be at least 1, got 0"),
        ({"views_per_load": 3}, "batch_size=64 is not a multiple of views_per_load=3"),
        ({"views_per_load": 2, "views": 5}, "views=5 is not a multiple of views_per_load=2"),
    ],
)
def test_an_option_that_is_out_of_range_is_refused(options, message, folder):
    for kind, known in MODULES.items():
        if options.keys() <= known.keys():
            with pytest.raises(InputError, match=message):
                kind(**needed(kind, folder), **options)


# Worker processes


class Machine:
    """What a data module asks a Trainer about it."""

    def __init__(self, devices):
        self.num_devices = devices


@pytest.mark.parametrize(("cpus", "devices", "workers"), [(1, 1, 1), (6, 1, 6), (6, 4, 1), (8, 2, 4), (96, 2, 16)])
def test_the_workers_of_all_processes_share_the_cpus(monkeypatch, folder, cpus, devices, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus)))
    data = ImageFolderDataModule(data_dir=folder, val_size=1)
    data.trainer = Machine(devices)
    assert data.num_workers == workers
    data.num_workers = 3
    assert data.num_workers == 3
    data.num_workers = None
    assert data.num_workers == workers


def test_where_the_affinity_is_unknown_every_cpu_counts(monkeypatch, folder):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert ImageFolderDataModule(data_dir=folder, val_size=1).num_workers == 5


# The last batch


def drawn(data, epoch=0, rank=0, world=1, begin=0):
    """The keys of an epoch's batches, of which a resumed one leaves out the first."""
    data.trainer = None
    loader = data.train_dataloader()
    loader.sampler.num_replicas, loader.sampler.rank = world, rank
    loader.sampler.num_samples = -(-len(loader.dataset) // world)
    loader.sampler.total_size = loader.sampler.num_samples * world
    loader.sampler.set_epoch(epoch)
    if begin:
        loader.load_state_dict({"epoch": epoch, "batches": begin})
    return [list(zip(batch.index.tolist(), batch.view.tolist(), strict=True)) for batch in loader], len(loader)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("views_per_load", [1, 2])
def test_without_its_last_batch_an_epoch_is_the_same(world, views_per_load):
    # 50 samples, of which 2 processes have 25 and 3 have 17 each.
    options = {"subset": 50, "batch_size": 8, "views": 4, "views_per_load": views_per_load}
    for rank in range(world):
        for epoch in (0, 3):
            every, _ = drawn(DigitsDataModule(**options), epoch, rank, world)
            whole, length = drawn(DigitsDataModule(**options, drop_last=True), epoch, rank, world)
            assert every[: len(whole)] == whole
            assert {len(keys) for keys in whole} == {8}
            assert [len(keys) for keys in every[len(whole) :]] == [-(-50 // world) * views_per_load % 8]
            assert length == len(whole)
            rest, _ = drawn(DigitsDataModule(**options, drop_last=True), epoch, rank, world, begin=1)
            assert rest == whole[1:]


def test_a_last_batch_as_large_as_the_others_stays():
    data = DigitsDataModule(subset=48, batch_size=8, drop_last=True)
    assert len(drawn(data)[0]) == 6


def test_only_training_leaves_out_samples():
    data = DigitsDataModule(val_size=13, test_size=11, batch_size=8, drop_last=True)
    assert sum(batch.size for batch in data.val_dataloader()) == 13
    assert sum(batch.size for batch in data.test_dataloader()) == 11


def test_an_epoch_of_no_batch_is_refused():
    data = DigitsDataModule(subset=7, batch_size=8, drop_last=True)
    with pytest.raises(InputError, match="with drop_last=True and batch_size=8 nothing is left of an epoch of 7 views"):
        data.train_dataloader()
