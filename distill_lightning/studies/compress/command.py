"""The verb: compress, train the controls, write and print the report."""

from __future__ import annotations

import datetime
import shlex
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from distill_lightning.callbacks import Measurements
from distill_lightning.callbacks.stages import trained_before
from distill_lightning.compression.report.report import Report, circumstances
from distill_lightning.compression.report.stage import FINAL
from distill_lightning.compression.run.preview import Preview
from distill_lightning.data.datamodules import ViewDataModule
from distill_lightning.errors import InputError
from distill_lightning.networks import recipe_of
from distill_lightning.networks.provenance import weights_from
from distill_lightning.storage import whole_file
from distill_lightning.studies.compress.config import CompressConfig
from distill_lightning.studies.compress.runs import (
    CHECKPOINT,
    ONNX,
    ONNX_INT8,
    PACKED,
    Run,
    Setup,
    execute,
    plan,
    preview_of,
)
from distill_lightning.studies.data import Splits, has_loader, keep_data, refuse_other_data, remove_runs, splits_of
from distill_lightning.studies.output import claim_folder, print_written, refuse_foreign_folder, table_of, wide_console
from distill_lightning.studies.progress import OnEpoch, train_missing

_KNOWN = "compress.yaml"
_ABSENT = {"same_size": "control of the same size", "random": "control with a random criterion"}
# Columns of a terminal; intervals of times need more.
_NARROW = 110

Make = Callable[[Sequence[str]], Setup]
"""Makes a module, its data and a Trainer from arguments of the command line."""


def run(
    config: CompressConfig, arguments: Sequence[str], make: Make, *, console: Console | None = None
) -> Report | None:
    """Run ``distill-lightning compress CONFIG [--preview] [--output FOLDER] [--seeds 0 1] [--dense-epochs N] ...``.

    Args:
        config: which configuration is compressed, and how often.
        arguments: what follows the verb, for the report.
        make: what builds a configuration's setup.
        console: where the progress and the table are shown.

    Returns:
        The report that was written; ``None`` if there was only to be a preview.

    Raises:
        ArgumentError: the configuration cannot be parsed.
        InputError: it cannot be used, or the output folder belongs to another one, or to other data.
        SystemExit: with status 130, after Ctrl-C.
    """
    console = wide_console(console)
    folder = Path(config.output)

    def setup_of(seed: int, root: Path, epochs: int | None = None) -> Setup:
        longer = [] if epochs is None else ["--trainer.max_epochs", str(epochs)]
        own = ["--seed_everything", str(seed), "--trainer.default_root_dir", str(root)]
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
        return make(["--config", config.module, *config.overrides, *own, *quiet, *longer])

    first = setup_of(config.seeds[0], folder)
    if config.preview:
        _show(preview_of(first), console)
        return None
    _check_metric(first.model, config.metric)
    earlier = _epochs_before(first, config.dense_epochs)
    splits = _splits(config.seeds, first, lambda seed: setup_of(seed, folder))
    # A configuration that cannot be used claims no folder.
    _reserve_folder(folder, config, splits)
    wanted = first.callback.measurements or Measurements()
    if wanted.onnx == "none" and find_spec("onnxruntime"):
        wanted = replace(wanted, onnx="float")
    epochs = first.trainer.max_epochs or 0
    runs = plan(folder, config.seeds, config.controls, earlier=earlier, epochs=epochs)
    for line in _warnings(first, runs):
        console.print(line, highlight=False)
    _execute(runs, setup_of, splits, wanted, epochs=epochs, folder=folder, console=console)
    report = _report(runs, arguments, config.metric, higher_is_better=_higher_is_better(first.model, config.metric))
    paths = _write(report, runs[0], folder)
    console.print(_table(report, console.width))
    console.print(report.caption(), style="dim", highlight=False)
    if console.width < _NARROW and report.tells_epochs:
        console.print(report.epochs_line(), style="dim", highlight=False)
    absent = [
        f"{said}: {reason}" for said, reason in report.about.items() if said.removeprefix("no ") in _ABSENT.values()
    ]
    for line in [*absent, *report.notes()]:
        console.print(line, style="dim", highlight=False)
    for line in _claims(report):
        console.print(line, highlight=False)
    if not find_spec("onnxruntime"):
        console.print("no ONNX file: pip install 'distill-lightning[onnx]'", highlight=False)
    print_written(console, paths)
    return report


def _show(preview: Preview, console: Console) -> None:
    console.print(table_of(preview.table()))
    if preview.units:
        console.print(table_of(preview.units_table()))
    for note in preview.notes:
        console.print(note, style="dim", highlight=False)


def _check_metric(model: Any, metric: str) -> None:
    """Refuse a score that the report could not be about, before the training."""
    metrics = getattr(model, "test_metrics", None)
    if metrics is None:
        return
    names = [name.removeprefix("test/") for name in metrics]
    if metric not in names:
        raise InputError(f"--metric {metric}: {type(model).__name__} has no such score, but {', '.join(names)}")


def _epochs_before(setup: Setup, told: int | None) -> int | None:
    """For how many epochs the dense network was trained before; ``None``: nobody knows.

    Raises:
        InputError: the user says so of one that is known to be fresh.
    """
    network = getattr(setup.model, setup.callback.attribute, None)
    if not isinstance(network, nn.Module):
        return told
    recipe = recipe_of(network)
    is_fresh = recipe is not None and not recipe["arguments"].get("pretrained") and not weights_from(network)
    if told and is_fresh:
        raise InputError(
            f"--dense-epochs {told}: the weights of {type(network).__name__} are fresh, it was not trained before; "
            "leave it out, and give model.init_args.dense_epochs for its training before the first step"
        )
    if told is not None:
        return told
    return 0 if is_fresh else trained_before(network)


def _higher_is_better(model: Any, metric: str) -> bool:
    """What the module's own metric says of itself; of what says nothing, more is better."""
    metrics = getattr(model, "test_metrics", None)
    return metrics is None or metrics[f"test/{metric}"].higher_is_better is not False


def _splits(seeds: Sequence[int], first: Setup, make: Callable[[int], Setup]) -> dict[int, Splits]:
    """The data of each seed's runs; of a data module that has no seed of its own, they may depend on the run's."""
    found: dict[int, Splits] = {}
    for seed in seeds:
        if found and isinstance(first.data, ViewDataModule):
            found[seed] = found[seeds[0]]
            continue
        data = (make(seed) if found else first).data
        # A module may have loaders of its own.
        if data is not None:
            data.prepare_data()
            data.setup("fit")
            if has_loader(data, "test"):
                data.setup("test")
        found[seed] = splits_of(data)
    return found


def _reserve_folder(folder: Path, config: CompressConfig, splits: Mapping[int, Splits]) -> None:
    """Refuse an output folder of another configuration or of other data; only seeds and controls may be added."""
    refuse_foreign_folder(folder, known=_KNOWN)
    known = folder / _KNOWN
    told: dict[str, Any] = {"config": Path(config.module).read_text(), "overrides": list(config.overrides)}
    if config.dense_epochs is not None:
        told["dense_epochs"] = config.dense_epochs
    content = yaml.safe_dump(told, sort_keys=False)
    by_name = {f"seed {seed}": found for seed, found in splits.items()}
    if config.anew or not any(folder.glob("runs/*/stages.json")):
        remove_runs(folder)
    elif known.read_text() != content:
        raise InputError(
            f"output folder {folder} belongs to another configuration: give another folder with --output, or make the "
            "runs again with --anew"
        )
    else:
        refuse_other_data(folder, by_name)
    claim_folder(folder, known=_KNOWN, content=content)
    keep_data(folder, by_name)


def _warnings(setup: Setup, runs: Sequence[Run]) -> list[str]:
    """What the user should know before the training starts."""
    network = getattr(setup.model, setup.callback.attribute, None)
    lines = []
    if network is not None and recipe_of(network) is None:
        lines.append(
            f"{type(network).__name__} was built by no factory of this package: {PACKED} and {CHECKPOINT} will be "
            "loaded with load_compressed(path, network), given one that is built as this one is"
        )
    if any(run.kind == "same_size" and run.earlier is None for run in runs):
        lines.append(
            f"nobody knows for how many epochs {type(network).__name__} was trained before: the control of the same "
            f"size has only this run's {setup.trainer.max_epochs}; give --dense-epochs N (0: its weights are fresh)"
        )
    return lines


def _execute(
    runs: Sequence[Run],
    make: Callable[[int, Path], Setup],
    splits: Mapping[int, Splits],
    wanted: Measurements,
    *,
    epochs: int,
    folder: Path,
    console: Console,
) -> None:
    def train(run: Run, on_epoch: OnEpoch) -> None:
        # An interrupted run is made again from its beginning.
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        execute(run, make, splits[run.seed], wanted, on_epoch)

    train_missing(runs, train, name="compress", epochs=lambda run: run.epochs or epochs, folder=folder, console=console)


def _report(runs: Sequence[Run], arguments: Sequence[str], metric: str, *, higher_is_better: bool) -> Report:
    by_seed: dict[int, list[Any]] = {}
    reasons = {}
    for run in runs:
        by_seed.setdefault(run.seed, []).extend(run.stages())
        reason = run.reason()
        if reason is not None:
            reasons[f"no {_ABSENT[run.kind]}"] = reason
    about = {
        "command": f"distill-lightning compress {shlex.join(arguments)}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **circumstances(),
        **reasons,
    }
    return Report(by_seed, metric=metric, higher_is_better=higher_is_better, about=about)


def _write(report: Report, first: Run, folder: Path) -> list[Path]:
    """The report's files and figures, and the first seed's network."""
    paths = report.write(folder)
    for name in (PACKED, CHECKPOINT, ONNX, ONNX_INT8):
        if (first.folder / name).exists():
            with whole_file(folder / name) as partial:
                shutil.copyfile(first.folder / name, partial)
            paths.append(folder / name)
    return paths


def _claims(report: Report) -> list[str]:
    """What may be claimed of each row that shows a time, and of the last network and the controls in any case."""
    lines = []
    for name in report.names:
        stage = report.first(name)
        if stage is not None and (stage.latency or name == FINAL or stage.kind == "control"):
            lines.append(f"{name}: {report.claim(name)}")
    return lines


def _table(report: Report, width: int) -> Table:
    narrow = width < _NARROW
    header, *body = report.brief_rows(narrow=narrow)
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for number, name in enumerate(header):
        table.add_column(_broken(name) if narrow else name, justify="right" if number else "left", overflow="fold")
    for name, *cells in body:
        # Left to itself the table would break words.
        table.add_row(*([textwrap.fill(name, 18), *map(_broken, cells)] if narrow else [name, *cells]))
    return table


def _broken(cell: str) -> str:
    return (
        cell.replace(" ±", "\n±")
        .replace(" (", "\n(")
        .replace("not ", "not\n")
        .replace(", batch", ",\nbatch")
        .replace(", ONNX ", ",\nONNX\n")
    )
