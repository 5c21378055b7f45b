"""The rooms and who may enter them, the public names, and what they promise."""

import ast
import functools
import inspect
import re
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
import torchmetrics
from torch import nn

import distill_lightning
from distill_lightning import (
    callbacks,
    compression,
    functional,
    layers,
    modules,
    networks,
    outputs,
    plots,
    schedules,
    storage,
    teachers,
    testing,
)
from distill_lightning.arguments import arguments_of
from distill_lightning.data import datamodules, mixing, samplers, transforms, views
from distill_lightning.outputs import metrics

PACKAGE = Path(distill_lightning.__file__).parent

# What is in each room, from the bottom to the top: a file or folder may import those in the lines above its own, and
# the ones that stand in its own line are strangers to each other. A new file needs a place here.
ROOMS = {
    "": """
        errors part processes plots
        arguments choices functional libraries schedules storage
        callables layers pages
        networks data
        outputs lightning_internals compression
        teachers
        callbacks
        modules
        testing studies
        cli
        __main__ __init__
    """,
    "lightning_internals": """
        summary versions
        batches place
        changes resuming
        portable
    """,
    "callbacks": """
        checkpoint_io loggers prediction_writers structure_hooks stages run_keeper compression_checks training_batches
        figures tables stage_log
        compression reconstruction samples teacher_report
    """,
    "cli": """
        class_page from_file
        lightning_cli
        entry
    """,
    "compression": """
        access
        costs mask shrink
        factor values
        structure
        file onnx
        steps
        run
        report
    """,
    "compression/access": """
        hooks old_hooks parameters snapshots targets weights
        copies
        calibration computed
        readings batch_sizes outputs
        moments
    """,
    "compression/costs": """
        latency parameters products
        macs
    """,
    "compression/factor": """
        decompositions
        ranks
        layers
        convolutions recurrent
        plans products
        factoring
    """,
    "compression/file": """
        bits
        packed
        format
        artefact
    """,
    "compression/mask": """
        criteria masks sensitivity
        lottery selection
        learned second_order
        penalties
    """,
    "compression/onnx": """
        files session
        export int8 latency
    """,
    "compression/report": """
        controls details measure stage
        cells measure_stage
        claims
        stages_by_seed
        drawing
        report
    """,
    "compression/run": """
        batch_norm phases
        compressor preview
    """,
    "compression/shrink": """
        attention norms numbers tying
        axes
        cutting sizes watching
        groups
        ledger transformer
        layer_rules moves products
        operations
        tracing
        channels
        recurrent
    """,
    "compression/steps": """
        mixed_precision schedules workpiece
        sensitivity trial
        base weights
        coverage encode pruning tie_layers units
        unit_trials
        low_rank prune_weights quantize share_weights unit_amounts
        learn_mask prune_units
        regularise
    """,
    "compression/structure": """
        changes
        checkpoints
    """,
    "compression/values": """
        codebook corrections equalisation hashed scheme
        ranges
        allocation estimators
        activations quantizer
    """,
    "data": """
        views
        batch digests
        columns detection_batch sequences
        fingerprint image_operations
        augmentation mixing
        datamodules
        samplers transforms
        unlabelled
    """,
    "data/datamodules": """
        options view_dataset view_sampler indexed image_file mat_file
        gaze_files resumable_loader
        view_data_module
        image_data_module docstrings translation
        cifar_pickle image_files in_memory
        cifar digits fashion_mnist image_folder
        rotated detection gaze
    """,
    "data/datamodules/detection": """
        annotation augmentation
        files
        scenes voc
        fashion_voc
    """,
    "data/datamodules/translation": """
        corpus length_sampler pair_options tokenizer
        catalogues dataset iwslt libreoffice splits
        parallel_text
        module
    """,
    "functional": """
        common mean
        adversarial calibration detection features gaze predictions scores self_distillation
        gaussian
    """,
    "layers": """
        autoencoder batch_norm call channels discriminator gaussian_head modes translator wrappers
        feature_tap fingerprints
    """,
    "modules": """
        options
        parts
        base generator paraphraser
        translates
        compression detection extracurricular feed kd meal_v2 self_kd supervised
        self_kd_detection sequential_feed translation
    """,
    "modules/parts": """
        adversary alpha asleep_norms backbone checkpoints data_wait distances evaluation extra_inputs
        guard holds_frozen means optimization past_network random_state refinement regions search sizes
        boxes past skipping vocabulary
        translating
    """,
    "networks": """
        budget provenance sizes weights
        adapted gaze images libraries pretrained sequences
        backbones translation
        detectors
    """,
    "outputs": """
        metrics output
        boxes categorical gaussian
        tokens
    """,
    "outputs/metrics": """
        exact
        box_metric mean gap
        classification detection regression
        translation
    """,
    "plots": """
        style
        comparison compression confidence detection reconstruction teachers
    """,
    "storage": """
        files top_k
        header lock
        rows
        exchange log prediction_rows sidecar
        prediction shards
    """,
    "studies": """
        data error_line output progress quiet
        compare compress export doctor
    """,
    "studies/compare": """
        blueprint claims given intervals memory python_digest rows task constructors foreign_data
        trials
        checks
        config
        outputs_task paired scored_task scores specs subject
        drawn
        foreign tasks
        backbones storage from_python
        experiment
        runs
        plan search trained_teachers
        runner savings
        attempt trial
        pool sharing
        workers
        cluster_task
        cluster
        pools
        measures
        report
        command comparison
        api
    """,
    "studies/compress": """
        config runs
        command
    """,
    "studies/export": """
        config citations student
        formats
        card
        command
    """,
    "studies/doctor": """
        config findings keys watch
        checks
        examination
        command
    """,
    "teachers": """
        about ensemble frozen row_codec
        layer_errors origin questions
        store
        teachers
        recorder shared
    """,
    "testing": """
        processes tiny tiny_detection tiny_translation waits
        kits
        points
        points_of_networks points_of_runs
        contract
    """,
}
# What is above may be kept out all the same.
NEVER = {
    ("modules", "data.datamodules"), ("modules", "plots"), ("callbacks", "data.datamodules"),
    ("data", "plots"), ("teachers", "data.datamodules"), ("layers", "storage"), ("functional", "storage"),
}  # fmt: skip
# CompressionBaseline is CompressionCallback with a loss, so that there is one implementation.
MAY_ENTER = {("modules/compression.py", "callbacks"), ("modules/compression.py", "compression")}
GUARDED = {("modules", "callbacks"), ("modules", "compression")}
LIGHTNING = {"callbacks", "cli", "data/datamodules", "lightning_internals", "modules", "studies", "teachers", "testing"}

SOURCES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in SOURCES})


def name_of(path):
    """A file or folder, from the package's root."""
    return path.relative_to(PACKAGE).as_posix().removesuffix(".py").removeprefix(".")


@functools.cache
def imports_of(path):
    """The modules that a file imports when it runs, dotted; those for type checkers alone are left out."""
    return list(_imports_of(path))


def _imports_of(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if is_a_file(below) else node.module


def is_a_file(module):
    place = PACKAGE.parent.joinpath(*module.split("."))
    return place.is_dir() or place.with_suffix(".py").exists()


def entries(folder):
    """Files and folders in a folder, without its ``__init__``, which hands on the names of all of them."""
    files = {entry.stem for entry in folder.glob("*.py") if entry.stem != "__init__" or folder == PACKAGE}
    return files | {entry.parent.name for entry in folder.glob("*/__init__.py")}


def imports_within(folder):
    """For each entry of a folder, the other entries that it imports."""
    prefix = ("distill_lightning", *folder.relative_to(PACKAGE).parts)
    found, known = defaultdict(set), entries(folder)
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).with_suffix("").parts[0]
        for module in imports_of(path):
            parts_of_name = tuple(module.split("."))
            if parts_of_name[: len(prefix)] == prefix and len(parts_of_name) > len(prefix):
                used = parts_of_name[len(prefix)]
                if used != own and used in known:
                    found[own].add(used)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: name_of(folder) or "package")
def test_a_room_has_an_order(folder):
    name, used = name_of(folder), imports_within(folder)
    lines = [line.split() for line in ROOMS[name].strip().splitlines()]
    place = {entry: number for number, line in enumerate(lines) for entry in line}
    unknown = sorted(place.keys() ^ entries(folder))
    assert not unknown, f"{name}: {unknown} have no place, or are not there"
    for entry, others in used.items():
        if entry == "__init__":
            continue
        up = [other for other in others if place[other] >= place[entry]]
        assert not up, f"{name}/{entry} imports {up}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: name_of(folder) or "package")
def test_a_room_says_what_is_in_it(folder):
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_who_may_come_in(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports_of(path):
        root, _, inside = module.partition(".")
        if root == "pytorch_lightning":
            assert name_of(path).startswith(tuple(LIGHTNING)), f"{name_of(path)} imports Lightning"
        if root != "distill_lightning":
            continue
        for room, forbidden in NEVER:
            assert own != room or not f"{inside}.".startswith(f"{forbidden}."), f"{name_of(path)} imports {inside}"
        for room, forbidden in GUARDED:
            if own == room and f"{inside}.".startswith(f"{forbidden}."):
                assert (path.relative_to(PACKAGE).as_posix(), forbidden) in MAY_ENTER, (
                    f"{name_of(path)} imports {inside}"
                )


def test_only_one_room_knows_lightnings_insides():
    """Lightning's loops, and attributes that begin with an underscore, by way of the linter's own rule."""
    inside = re.compile(r'getattr\([^,]*(trainer|strategy|loop)[^,]*, "_|\.(fit_loop|epoch_loop|precision_plugin)\b')
    for path in SOURCES:
        if path.parent.name != "lightning_internals":
            assert not inside.search(path.read_text()), name_of(path)
        silenced = [line for line in path.read_text().splitlines() if "noqa: SLF001" in line]
        assert not [line for line in silenced if "trainer" in line or "_loop" in line], name_of(path)


def test_plots_know_only_arrays():
    for path in (PACKAGE / "plots").rglob("*.py"):
        assert not [name for name in imports_of(path) if name.split(".")[0] in ("torch", "pytorch_lightning")]


def public_callables():
    for module in (
        distill_lightning, callbacks, compression, datamodules, functional, layers, metrics, mixing, modules, networks,
        outputs, plots, samplers, schedules, storage, teachers, testing, transforms, views,
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
        "GeneratorSampler", "EmpiricalSampler", "CIFARDataModule", "ImageFolderDataModule", "AURC", "GapReduction",
        "AngularError",
    }  # fmt: skip
    assert names <= set(distill_lightning.__all__)
    assert all(hasattr(distill_lightning, name) for name in distill_lightning.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("value", PUBLIC)
def test_public_things_are_annotated_documented_and_take_no_surplus(value):
    assert inspect.getdoc(value), f"{value} has no docstring"
    if inspect.isclass(value) and (issubclass(value, (Exception, tuple)) or getattr(value, "_is_protocol", False)):
        return
    signature = inspect.signature(value.__init__ if inspect.isclass(value) else value)
    for name, parameter in signature.parameters.items():
        if name == "self" or (inspect.isclass(value) and "__init__" not in vars(value)):
            continue
        assert parameter.annotation is not inspect.Parameter.empty, f"{value}: {name} is not annotated"
        # Those of compare are the keys of a comparison's YAML file, each refused where it is unknown.
        given_on = (testing.tiny_trainer, distill_lightning.compare)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and value not in given_on:
            # Shared options, whose keys and types a TypedDict says.
            assert "Unpack[" in str(parameter.annotation), f"{value} takes **{name}"


@pytest.mark.slow
@pytest.mark.parametrize("value", [param for param in PUBLIC if inspect.isclass(param.values[0])])
def test_constructor_arguments_are_documented(value):
    # A dataclass has the arguments of its bases, which document them.
    documented = "\n".join(base.__doc__ or "" for base in value.__mro__)
    if issubclass(value, (Exception, tuple)) or getattr(value, "_is_protocol", False):
        return
    if "__init__" not in vars(value):
        return
    for name in list(inspect.signature(value.__init__).parameters)[1:]:
        assert f"{name}:" in documented, f"{value.__name__}: argument {name} is not documented"


WITH_EXAMPLES = [functional, layers, outputs, metrics]
EXAMPLES = [
    pytest.param(getattr(room, name), id=f"{room.__name__}.{name}")
    for room in WITH_EXAMPLES
    for name in room.__all__
    if inspect.isclass(getattr(room, name)) or inspect.isfunction(getattr(room, name))
]


@pytest.mark.slow
@pytest.mark.parametrize("value", EXAMPLES)
def test_public_names_of_formulas_layers_and_outputs_have_an_example(value):
    # Its own docstring: inspect.getdoc would take a base class's.
    assert "\nExample:\n    >>> " in inspect.cleandoc(value.__doc__ or ""), f"{value.__name__} has no example"


@pytest.mark.parametrize("room", WITH_EXAMPLES, ids=lambda room: room.__name__)
def test_the_examples_are_run(room):
    root = PACKAGE.parent
    with (root / "pyproject.toml").open("rb") as file:
        paths = tomllib.load(file)["tool"]["pytest"]["ini_options"]["testpaths"]
    assert any(Path(room.__file__).is_relative_to(root / path) for path in paths)


METHODS = [
    value.values[0]
    for value in PUBLIC
    if inspect.isclass(value.values[0]) and issubclass(value.values[0], distill_lightning.DistillationModule)
]


@pytest.mark.parametrize("module", METHODS)
def test_only_networks_are_positional(module):
    for name, parameter in arguments_of(module).items():
        networks_first = name in ("student", "teachers", "network")
        assert networks_first == (parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD), name


@pytest.mark.slow
@pytest.mark.parametrize("module", METHODS)
def test_no_tensor_hides_outside_the_buffers(module):
    options = {"num_classes": 3, "student_layer": "features", "input_shape": (1, 8, 8), "pad_id": 0}
    network = testing.TinyNet
    if module is distill_lightning.RegressionModule:
        options, network = {"num_targets": 3}, lambda: testing.TinyNet(None, num_targets=3)
    if issubclass(module, distill_lightning.DetectionModule):
        options, network = {"num_classes": 2}, testing.TinyFasterRCNN
    accepted = arguments_of(module)
    networks_needed = [network() for name in ("student", "network", "teachers") if name in accepted]
    if "discriminator" in accepted:
        options["discriminator"] = distill_lightning.FixedDiscriminator()
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


def docstring_lines(node):
    """The numbers of the lines that docstrings take."""
    documented = set()
    for child in ast.walk(node):
        if isinstance(child, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(child) is not None:
            documented |= set(range(child.body[0].lineno, child.body[0].end_lineno + 1))
    return documented


def lines_of_code(path):
    """Lines of a file without docstrings, comments, blank lines and imports."""
    text = path.read_text()
    tree = ast.parse(text)
    left_out = docstring_lines(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    return sum(
        1
        for number, line in enumerate(text.splitlines(), start=1)
        if number not in left_out and line.strip() and not line.strip().startswith("#")
    )


@pytest.mark.parametrize("path", sorted((PACKAGE / "modules").glob("*.py")), ids=lambda path: path.stem)
def test_a_method_fits_on_two_screens(path):
    assert lines_of_code(path) <= (200 if path.stem == "base" else 120)


@pytest.mark.parametrize("module", METHODS)
def test_a_method_has_few_arguments_of_its_own(module):
    own = [name for name in inspect.signature(module.__init__).parameters if name not in ("self", "options")]
    assert len(own) <= 13, own


def test_files_of_tests_have_names_of_their_own():
    """Pytest imports them by these."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("*.py"))
    assert not [name for name, count in names.items() if count > 1]
