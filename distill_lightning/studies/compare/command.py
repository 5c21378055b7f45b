"""The verb: check everything, train what is missing, write and print the results."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from distill_lightning.errors import InputError, refusing
from distill_lightning.studies.compare.config import CompareConfig, StoreConfig
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.measures import scores_of
from distill_lightning.studies.compare.paired import LEGEND
from distill_lightning.studies.compare.plan import plan
from distill_lightning.studies.compare.pool import InProcess, make_all
from distill_lightning.studies.compare.report import Report, as_list
from distill_lightning.studies.compare.runner import make_trainer
from distill_lightning.studies.compare.runs import Run
from distill_lightning.studies.compare.savings import told_of_storage
from distill_lightning.studies.compare.search import search_section, trials_in, write_search
from distill_lightning.studies.compare.trained_teachers import refuse_other_teachers, refuse_untrained
from distill_lightning.studies.compare.trial import try_runs
from distill_lightning.studies.compare.trials import searched
from distill_lightning.studies.data import keep_data, refuse_other_data, remove_runs
from distill_lightning.studies.output import claim_folder, print_written, refuse_foreign_folder, table_of, wide_console

_CONFIG_FILE = "compare.yaml"
_DATA = "data"


def run(config: CompareConfig, arguments: Sequence[str], *, console: Console | None = None) -> Report:
    """Run ``distill-lightning compare CONFIG [--key value ...]``.

    Args:
        config: the comparison.
        arguments: what follows the verb, for the heading of the results.
        console: where the progress and the table are shown.

    Returns:
        The scores that were written.

    Raises:
        ArgumentError: a class cannot be found or does not take what it is given.
        InputError: the configuration cannot be used, or the output folder belongs to another one, or to other data.
        SystemExit: with status 130, after Ctrl-C.
    """
    console = wide_console(console)
    folder = Path(config.output)
    config = _check_folder(folder, config)
    experiment = Experiment(config)
    make_trainer(config)
    refuse_untrained(experiment)
    data = {_DATA: experiment.splits}
    data |= {f"{_DATA} of backbone {name}": backbone.splits for name, backbone in experiment.backbones.items()}
    runs = plan(experiment, folder)
    try_runs(experiment, [run for run in runs if config.anew or not run.is_finished])
    if config.anew:
        remove_runs(folder)
    elif any(folder.glob("runs/*")):
        refuse_other_data(folder, data)
        refuse_other_teachers(experiment, runs)
    claim_folder(folder, known=_CONFIG_FILE, content=yaml.safe_dump(config.as_plain(), sort_keys=False))
    keep_data(folder, data)
    make_all(experiment, runs, InProcess(experiment), console)
    report = report_of(experiment, runs, arguments)
    paths = [*report.write(folder), *write_search(folder, trials_in(runs, experiment.task))]
    console.print(table_of(report.rows()))
    for note in report.notes():
        console.print(note, markup=False, highlight=False)
    console.print(report.scores.legend, style="dim", highlight=False)
    if report.paired:
        console.print()
        console.print(table_of(report.paired_rows()))
        console.print(LEGEND, style="dim", highlight=False)
    print_written(console, paths)
    return report


def _check_folder(folder: Path, config: CompareConfig) -> CompareConfig:
    """Refuse a folder of another configuration; methods, backbones, seeds, sets of teachers may be added to it.

    Returns:
        The configuration; of a folder that was begun before there were stores, without one.
    """
    refuse_foreign_folder(folder, known=_CONFIG_FILE)
    known = folder / _CONFIG_FILE
    if config.anew or not known.exists():
        return config
    with refusing(f"{known} is damaged, remove the folder or give another with --output", yaml.YAMLError, UnicodeError):
        stored = yaml.safe_load(known.read_text())
    if not isinstance(stored, dict):
        raise InputError(f"{known} is damaged: remove the folder or give another with --output")
    if "teachers_store" not in stored and config.teachers_store == StoreConfig():
        config = dataclasses.replace(config, teachers_store=None)
    given = yaml.safe_load(yaml.safe_dump(config.as_plain()))
    for key in sorted(stored.keys() | given.keys()):
        before, now = stored.get(key), given.get(key)
        if key == "seeds":
            same = set(before or []) <= set(now)
        elif key in ("methods", "backbones"):
            same = all((now or {}).get(name) == spec for name, spec in (before or {}).items())
        elif key == "teachers":
            # Sets can be added, and older folders do not tell of any.
            before = {"sets": 1, **before}
            same = before["sets"] <= now["sets"] and {**before, "sets": now["sets"]} == now
        elif key == "search":
            # Rows can be added with their searches, but none that are there can be chosen anew.
            same = (before or {}) == searched(config, stored["methods"])
        else:
            same = before == now
        if not same:
            raise InputError(
                f"output folder {folder} belongs to another configuration ({key} was {before}): "
                "give another folder with --output, or make the runs again with --anew"
            )
    return config


def report_of(experiment: Experiment, runs: Sequence[Run], arguments: Sequence[str]) -> Report:
    """The report of a comparison whose runs are finished.

    Args:
        experiment: the comparison.
        runs: all of its runs.
        arguments: what it was called with, for the heading.
    """
    sections = search_section(trials_in(runs, experiment.task), experiment.task, [row.name for row in experiment.rows])
    runs = [run for run in runs if not run.in_search]
    heading, legend = _heading(experiment, arguments, runs), _legend(experiment, runs)
    return Report(scores_of(experiment, runs, heading=heading, legend=legend, sections=sections))


def _heading(experiment: Experiment, arguments: Sequence[str], runs: Sequence[Run]) -> str:
    config = experiment.config
    kept = told_of_storage(experiment.storage, runs)
    made = [f"Data: {_called(config.data)}. Student: {_called(config.student)}."]
    if config.teachers.given is not None:
        made.append(f"Teachers, trained before: {'; '.join(map(_called, config.teachers.given))}.")
    if config.teachers.network is not None:
        epochs = config.teachers.epochs or config.epochs
        made.append(f"{config.teachers.number} teachers: {_called(config.teachers.network)}, {epochs} epochs.")
    for name, spec in (config.backbones or {}).items():
        histories = [run.result().history for run in runs if run.makes_backbone == name]
        reached = [experiment.backbones[name].task.validation_score(each[-1]) for each in histories if each]
        trained = f"{_called(spec)} on {_called(spec['data'])}, {spec['epochs']} epochs"
        made.append(f"Backbone {name}: {trained} ({', '.join(reached)}).")
    lines = [
        "# Comparison",
        "",
        f"`distill-lightning compare {shlex.join(arguments)}`",
        "",
        *(f"{note}." for note in dict.fromkeys(run.result().made for run in runs)),
        "",
        f"{' '.join(made)} Every student: {config.epochs} epochs.",
        "",
        *([kept, ""] if kept else []),
        f"Mean ± standard deviation over {len(config.seeds)} seeds ({', '.join(map(str, config.seeds))}), "
        f"{experiment.task.samples}, no epoch chosen on them.",
        "",
        as_list(_legend(experiment, runs)),
    ]
    return "\n".join(lines)


def _legend(experiment: Experiment, runs: Sequence[Run]) -> str:
    """What the table's titles mean, and how scores were computed where the modules say so."""
    signatures = dict.fromkeys(item for run in runs for item in run.result().signatures.items())
    lines = [f"signature of {name}: {signature}" for name, signature in signatures]
    return "\n".join([experiment.task.legend(with_ensemble=experiment.config.number_of_teachers > 0), *lines])


def _called(spec: dict[str, Any]) -> str:
    """A class with its arguments, and those of what is named among these."""
    arguments = ", ".join(
        f"{name}={_called(value) if isinstance(value, dict) and 'class_path' in value else value}"
        for name, value in (spec.get("init_args") or {}).items()
    )
    return f"{spec['class_path'].rpartition('.')[2]}({arguments})"
