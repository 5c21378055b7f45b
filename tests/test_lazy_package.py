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


@pytest.fixture(scope="module")
def asked():
    """What one new interpreter finds on its way from the package alone to all that is in it."""
    return fresh("""
import json, sys, distill_lightning as d
loaded = lambda: [name for name in sys.modules if name == "torch" or name.startswith("distill_lightning.")]
told = {"errors": d.InputError.__module__, "after errors": loaded()}
told["a method"] = d.KDModule.__module__
told["after a method"] = loaded()
told["parts"] = [d.functional.__name__, d.samplers.__name__]
# No public names, but parts of the package.
told["others"] = [d.callbacks.__name__, d.schedules.__name__, d.studies.__name__]
told["before all"] = list(vars(d))
d.import_all()
print(json.dumps({**told, "all": list(vars(d))}))
""")


@pytest.mark.slow
def test_names_and_sub_packages_are_imported_when_they_are_asked_for(asked):
    assert asked["errors"] == "distill_lightning.errors"
    assert "torch" not in asked["after errors"]
    assert "torch" in asked["after a method"]
    assert asked["parts"] == ["distill_lightning.functional", "distill_lightning.data.samplers"]
    assert asked["others"] == [
        "distill_lightning.callbacks",
        "distill_lightning.schedules",
        "distill_lightning.studies",
    ]


@pytest.mark.slow
def test_a_plain_method_loads_no_compression(asked):
    assert asked["a method"] == "distill_lightning.modules.kd"
    assert asked["a method"] in asked["after a method"]
    assert not [module for module in asked["after a method"] if "compression" in module or "callbacks" in module]


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
def test_import_all_imports_every_public_part(asked):
    assert len(set(distill_lightning.__all__) & set(asked["before all"])) < 10
    assert set(distill_lightning.__all__) <= set(asked["all"])


@pytest.mark.parametrize("name", ["nope", "__main__", "_nope"])
def test_a_name_that_there_is_not_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'distill_lightning' has no attribute '{name}'"):
        getattr(distill_lightning, name)


def test_the_version_can_be_read_without_importing():
    (value,) = (
        node.value for node in TREE.body if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    )
    assert ast.literal_eval(value) == distill_lightning.__version__
