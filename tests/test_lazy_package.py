"""The package: importing it loads neither PyTorch nor Lightning, and its names are there when they are asked for."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import distill_lightning

TREE = ast.parse(Path(distill_lightning.__file__).read_text())


def fresh(code):
    """What a new interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def imported_for_type_checkers():
    """Name and module of each import under ``if TYPE_CHECKING``."""
    (block,) = (node for node in TREE.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    for node in block.body:
        for alias in node.names:
            # Only the form "A as A" is handed on.
            assert alias.asname == alias.name
            yield alias.name, node.module


def test_importing_the_package_loads_neither_torch_nor_lightning():
    code = "import sys, json, distill_lightning as d; print(json.dumps([d.__version__, sorted(sys.modules)]))"
    version, loaded = fresh(code)
    assert version == distill_lightning.__version__
    assert "distill_lightning" in loaded
    assert not {"torch", "pytorch_lightning", "numpy", "jsonargparse", "matplotlib"} & set(loaded)


@pytest.mark.slow
def test_names_and_sub_packages_are_imported_when_they_are_asked_for():
    code = """
import json, sys, distill_lightning as d
errors = d.InputError.__module__
before = "torch" in sys.modules
functional = d.functional.__name__
samplers = d.samplers.__name__
# No public names, but parts of the package.
others = [d.callbacks.__name__, d.schedules.__name__, d.studies.__name__]
print(json.dumps([errors, before, functional, samplers, others, "torch" in sys.modules]))
"""
    assert fresh(code) == [
        "distill_lightning.errors",
        False,
        "distill_lightning.functional",
        "distill_lightning.data.samplers",
        ["distill_lightning.callbacks", "distill_lightning.schedules", "distill_lightning.studies"],
        True,
    ]


def test_type_checkers_see_the_names_that_there_are():
    imported = list(imported_for_type_checkers())
    assert len({name for name, _ in imported}) == len(imported)
    by_module = {}
    for name, module in imported:
        by_module.setdefault(module, []).append(name)
    assert {module: sorted(names) for module, names in by_module.items()} == {
        module: sorted(names) for module, names in distill_lightning._PUBLIC.items()
    }
    assert distill_lightning.__all__ == sorted(name for name, _ in imported)


def test_every_public_name_is_what_its_module_has():
    for module, names in distill_lightning._PUBLIC.items():
        for name in names:
            value = getattr(distill_lightning, name)
            if isinstance(value, ModuleType):
                assert value is importlib.import_module(f"{module}.{name}")
            else:
                assert value is getattr(importlib.import_module(module), name)


def test_dir_lists_the_public_names():
    code = "import json, distill_lightning as d; print(json.dumps(dir(d)))"
    assert {*distill_lightning.__all__, "__version__", "__doc__"} <= set(fresh(code))


@pytest.mark.slow
def test_import_all_imports_every_public_part():
    code = "import json, distill_lightning as d; d.import_all(); print(json.dumps(sorted(vars(d))))"
    assert set(distill_lightning.__all__) <= set(fresh(code))


@pytest.mark.parametrize("name", ["nope", "__main__", "_nope"])
def test_a_name_that_there_is_not_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'distill_lightning' has no attribute '{name}'"):
        getattr(distill_lightning, name)


def test_the_version_can_be_read_without_importing():
    (value,) = (
        node.value for node in TREE.body if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    )
    assert ast.literal_eval(value) == distill_lightning.__version__
