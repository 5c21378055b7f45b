"""Every notebook runs, and is committed without output."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# The settings cell of each notebook, made small.
QUICK = {
    "01_first_distillation": (
        "training_images, num_teachers, teacher_width, student_width, epochs, seeds = 50, 2, 3, 2, 2, [0]"
    ),
    "02_what_of_a_network_is_needed": (
        "dense_epochs, finetune_epochs, amount, clusters, training_images = 1, 2, 0.5, 8, 64"
    ),
    "03_does_it_help_on_my_data": "training_images, num_teachers, teacher_width, epochs, seeds = 64, 1, 2, 1, [0, 1]",
    "04_write_your_own_method": (
        "training_images, num_teachers, teacher_width, student_width, epochs, seeds = 64, 1, 2, 2, 1, [0]"
    ),
    "05_ensembles_and_features": (
        "training_images, num_teachers, teacher_width, student_width, epochs, probe_epochs, seeds = "
        "64, 1, 2, 2, 1, 1, [0]"
    ),
    "06_self_kd_and_confidence": (
        "training_images, wrong_labels, width, epochs, alpha, seeds = 64, 0.2, 2, 2, 0.8, [0]"
    ),
    "07_meal_v2_and_the_discriminator": (
        "training_images, num_teachers, teacher_width, student_width, epochs, seeds = 64, 1, 2, 2, 1, [0]"
    ),
    "08_extracurricular_learning": "training_points, num_teachers, epochs, seeds = 100, 1, 1, [0]",
    "09_your_own_data_and_teachers": (
        "labelled, unlabelled, teacher_side, student_width, epochs, seeds = 20, 25, 32, 2, 2, [0]"
    ),
}


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_without_output(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not [cell for cell in cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_silences_no_warning(path):
    source = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    assert not [word for word in ("filterwarnings", "simplefilter", "catch_warnings", "%%capture") if word in source]


@pytest.fixture(scope="module")
def kernel():
    """One process for all notebooks, which would take longer over their imports than over everything else."""
    quick = nbformat.v4.new_code_cell(QUICKLY)
    client = NotebookClient(nbformat.v4.new_notebook(cells=[quick]), timeout=300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with client.setup_kernel():
            client.reset_execution_trackers()
            client.execute_cell(quick, 0)
            yield client


# The process is quick where those of the tests are.
QUICKLY = f"import runpy; _ = runpy.run_path({str(Path(__file__).with_name('conftest.py'))!r})"
# What a notebook leaves behind, the next one must not find: its names, its folder, and how much Lightning says.
AFRESH = """\
import logging
for name in ("pytorch_lightning", "lightning_fabric"):
    logging.getLogger(name).setLevel(logging.INFO)
%reset -f
%cd -q {folder}"""


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, kernel, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    names = {line.split("=")[0].strip() for line in settings.source.splitlines()}
    assert names == set(QUICK[path.stem].split(" = ")[0].split(", ")), "the settings cell has other names"
    settings.source = QUICK[path.stem]
    kernel.nb = notebook
    kernel.reset_execution_trackers()
    kernel.execute_cell(nbformat.v4.new_code_cell(AFRESH.format(folder=tmp_path)), 0)
    for number, cell in enumerate(notebook.cells):
        kernel.execute_cell(cell, number)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if "image/png" in output.get("data", {})], "it shows no picture"
    assert not [output for output in outputs if output.get("name") == "stderr"]
