"""Batches and what is done to them need torch and scipy, and nothing that only some data need."""

import subprocess
import sys
from pathlib import Path

import pytest

import distill_lightning

# Without the package's own __init__, which is another matter.
CHECK = """
import sys, types
package = types.ModuleType("distill_lightning")
package.__path__ = [sys.argv[1]]
sys.modules["distill_lightning"] = package
from distill_lightning.data import batch, mixing, transforms, views
heavy = {"torch", "torchvision", "sklearn", "pytorch_lightning", "torchmetrics", "matplotlib"}
print(sorted(sys.modules.keys() & heavy))
"""


@pytest.mark.slow
def test_a_batch_and_its_transforms_need_no_data_sets():
    folder = str(Path(distill_lightning.__file__).parent)
    found = subprocess.run([sys.executable, "-c", CHECK, folder], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['torch']"
