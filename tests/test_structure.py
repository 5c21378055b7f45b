"""The layers, the public names, and what they promise."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
import torchmetrics
from torch import nn

import distill_lightning
from distill_lightning import (
    callbacks,
    compression,
    datamodules,
    functional,
    layers,
    metrics,
    mixing,
    modules,
    networks,
    plots,
    samplers,
    schedules,
    stores,
    testing,
    views,
)

PACKAGE = Path(distill_lightning.__file__).parent

LAYERS = {
    "errors": -1, "batch": 0, "processes": 0,
    "functional": 1, "views": 1, "mixing": 1, "weights": 1, "schedules": 1, "stores": 1, "plots": 1,
    "layers": 2, "metrics": 2, "networks": 2.5, "samplers": 2.5, "compression": 2.7,
    "datamodules": 3, "callbacks": 3,
    "modules": 4,
    "testing": 5, "compare": 5, "compress": 5, "cli": 5, "__main__": 5, "__init__": 5,
}  # fmt: skip
NEVER = {("modules", "datamodules"), ("modules", "callbacks"), ("modules", "plots"), ("datamodules", "callbacks")}
LIGHTNING = {"modules", "datamodules", "callbacks", "compare", "compress", "cli", "testing"}


def part_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "distill_lightning":
                yield from (f"distill_lightning.{alias.name}" for alias in node.names)


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = part_of(path)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "pytorch_lightning":
            assert own in LIGHTNING, f"{own} imports Lightning"
        if parts[0] != "distill_lightning" or len(parts) == 1 or parts[1] == own or parts[1].startswith("_"):
            continue
        used = parts[1]
        if used not in LAYERS:
            assert own in ("compare", "cli"), f"{own} takes {name} from the top of the package"
            continue
        assert LAYERS[used] < LAYERS[own] or (LAYERS[used] == LAYERS[own] == 5), f"{own} imports {used}"
        # CompressionBaseline is CompressionCallback with a loss, so that there is one implementation.
        if path.name == "compression.py" and (own, used) == ("modules", "callbacks"):
            assert name.rpartition(".")[2] in ("compression", "reshaping", "stages"), name
            continue
        assert (own, used) not in NEVER, f"{own} imports {used}"


def test_every_file_has_a_layer():
    assert {part_of(path) for path in SOURCES} <= LAYERS.keys()


def test_plots_know_only_arrays():
    for path in (PACKAGE / "plots").rglob("*.py"):
        assert not [name for name in imports_of(path) if name.split(".")[0] in ("torch", "pytorch_lightning")]


def public_callables():
    for module in (
        distill_lightning, callbacks, compression, datamodules, functional, layers, metrics, mixing, modules, networks,
        plots, samplers, schedules, stores, testing, views,
    ):  # fmt: skip
        names = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
        for name in names:
            value = getattr(module, name)
            if callable(value) and getattr(value, "__module__", "").startswith("distill_lightning"):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


PUBLIC = list(public_callables())


def test_the_public_names_of_the_design_are_there():
    names = {
        "DistillationModule", "SupervisedModule", "KDModule", "FEEDModule", "TeacherEnsemble", "Pretrained", "Batch",
        "DigitsDataModule", "FashionMNISTDataModule", "functional", "SelfKDModule", "MEALV2Module",
        "ExtracurricularModule", "IndexedDataModule", "PredictionStore", "MixupSampler", "CutMixSampler",
        "GeneratorSampler", "EmpiricalSampler", "ImageFolderDataModule", "AURC", "GapReduction", "AngularError",
    }  # fmt: skip
    assert names <= set(distill_lightning.__all__)
    assert all(hasattr(distill_lightning, name) for name in distill_lightning.__all__)


@pytest.mark.parametrize("value", PUBLIC)
def test_public_things_are_annotated_documented_and_take_no_surplus(value):
    assert inspect.getdoc(value), f"{value} has no docstring"
    if inspect.isclass(value) and (issubclass(value, (Exception, tuple)) or getattr(value, "_is_protocol", False)):
        return
    signature = inspect.signature(value)
    for name, parameter in signature.parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty, f"{value}: {name} is not annotated"
        if name != "options" or value is not testing.tiny_trainer:
            assert parameter.kind is not inspect.Parameter.VAR_KEYWORD, f"{value} takes **{name}"


@pytest.mark.parametrize("value", [param for param in PUBLIC if inspect.isclass(param.values[0])])
def test_constructor_arguments_are_documented(value):
    documented = inspect.getdoc(value)
    if issubclass(value, (Exception, tuple)) or getattr(value, "_is_protocol", False):
        return
    for name in inspect.signature(value).parameters:
        assert f"{name}:" in documented, f"{value.__name__}: argument {name} is not documented"


METHODS = [
    value.values[0]
    for value in PUBLIC
    if inspect.isclass(value.values[0]) and issubclass(value.values[0], distill_lightning.DistillationModule)
]


@pytest.mark.parametrize("module", METHODS)
def test_only_networks_are_positional(module):
    for name, parameter in inspect.signature(module).parameters.items():
        networks_first = name in ("student", "teachers", "network")
        assert networks_first == (parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD), name


@pytest.mark.parametrize("module", METHODS)
def test_no_tensor_hides_outside_the_buffers(module):
    options = {"num_classes": 3, "student_layer": "features", "input_shape": (1, 8, 8), "discriminator": "fixed"}
    network = testing.TinyNet
    if module is distill_lightning.RegressionModule:
        options, network = {"num_targets": 3}, lambda: testing.TinyNet(None, num_targets=3)
    accepted = inspect.signature(module).parameters
    networks_needed = [network() for name in ("student", "network", "teachers") if name in accepted]
    built = module(*networks_needed, **{name: value for name, value in options.items() if name in accepted})
    for child in built.modules():
        if isinstance(child, torchmetrics.Metric):
            continue
        hidden = [
            name
            for name, value in vars(child).items()
            if isinstance(value, torch.Tensor)
            or (isinstance(value, (list, dict)) and holds_module(value) and name[0] != "_")
        ]
        assert not hidden, f"{type(child).__name__} keeps {hidden} where the optimiser and the checkpoint do not look"


def holds_module(values):
    values = values.values() if isinstance(values, dict) else values
    return any(isinstance(value, nn.Module) for value in values)


def test_methods_stay_readable():
    for path in (PACKAGE / "modules").glob("*.py"):
        code = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(code) <= 360, f"{path.name} has {len(code)} lines"
