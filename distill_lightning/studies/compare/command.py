"""The verb: check everything, train what is missing, write and print the results."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from distill_lightning.errors import InputError
from distill_lightning.studies.compare.claims import AT_WORK, Presence
from distill_lightning.studies.compare.config import CompareConfig, StoreConfig
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.given import Given
from distill_lightning.studies.compare.measures import scores_of
from distill_lightning.studies.compare.plan import plan
from distill_lightning.studies.compare.pool import make_all
from distill_lightning.studies.compare.pools import pool_of, with_threads
from distill_lightning.studies.compare.report import Report, as_list
from distill_lightning.studies.compare.runner import make_trainer
from distill_lightning.studies.compare.runs import Run
from distill_lightning.studies.compare.savings import told_of_storage
from distill_lightning.studies.compare.search import search_section, trials_in, write_search
from distill_lightning.studies.compare.sharing import chosen, forget_failures, refuse_others, stored_config
from distill_lightning.studies.compare.trained_teachers import refuse_other_teachers, refuse_untrained
from distill_lightning.studies.compare.trial import try_runs
from distill_lightning.studies.compare.trials import search_seeds_in, searched, with_search_seeds
from distill_lightning.studies.data import Splits, keep_data, refuse_other_data, remove_runs
from distill_lightning.studies.output import claim_folder, print_written, refuse_foreign_folder, table_of, wide_console

_CONFIG_FILE = "compare.yaml"
_DATA = "data"


def run(
    config: CompareConfig, arguments: Sequence[str] | None, *, console: Console | None = None, shows: bool = True
) -> Report | None:
    """Run ``distill-lightning compare CONFIG [--key value ...]``.

    Args:
        config: the comparison.
        arguments: what follows the verb, for the heading of the results; ``None``: it is called from Python.
        console: where the progress and the table are shown.
        shows: whether the table is shown, and not the progress alone.

    Returns:
        The scores that were written; ``None``: runs are left that were not asked for.

    Raises:
        ArgumentError: a class cannot be found or does not take what it is given.
        InputError: the configuration cannot be used, or the output folder belongs to another one, or to other data.
        SystemExit: with status 130, after Ctrl-C.
    """
    console = wide_console(console)
    folder = Path(config.output)
    config = _check_folder(folder, with_threads(config, folder / _CONFIG_FILE))
    experiment = Experiment(config)
    if config.ray is None:
        make_trainer(config)
    refuse_untrained(experiment)
    data = {_DATA: experiment.splits}
    data |= {f"{_DATA} of backbone {name}": backbone.splits for name, backbone in experiment.backbones.items()}
    runs = plan(experiment, folder)
    # Before anything is written to the folder.
    _refuse_others(experiment, runs, data)
    wanted = chosen(runs, config)
    try_runs(experiment, [run for run in wanted if config.anew or not run.is_finished])
    with Presence(folder) as presence:
        # Another call may have come first, and with another configuration.
        _check_folder(folder, config)
        if config.anew:
            refuse_others("--anew", presence)
            remove_runs(folder)
        _refuse_others(experiment, runs, data)
        content = yaml.safe_dump(config.as_plain(), sort_keys=False)
        claim_folder(folder, known=_CONFIG_FILE, content=content, sweeps=presence.is_alone)
        keep_data(folder, data)
        if config.retry:
            refuse_others("--retry", presence)
            forget_failures(wanted)
        presence.admit()
        make_all(experiment, wanted, pool_of(experiment, partial(console.print, highlight=False)), console)
        left = sum(not run.is_finished for run in runs)
        if left:
            console.print(f"{left} of {len(runs)} runs are left for other calls; the last one writes the report.")
            return None
        report = report_of(experiment, runs, arguments)
        paths = [*report.write(folder), *write_search(folder, trials_in(runs, experiment.task))]
    if shows:
        _show(report, paths, console)
    return report


def _refuse_others(experiment: Experiment, runs: Sequence[Run], data: Mapping[str, Splits]) -> None:
    """Refuse a folder with runs on other data, or under other teachers, unless these are made anew."""
    folder = Path(experiment.config.output)
    if not experiment.config.anew and any(folder.glob("runs/*")):
        refuse_other_data(folder, data)
        refuse_other_teachers(experiment, runs)


def _show(report: Report, paths: Sequence[Path], console: Console) -> None:
    console.print(table_of(report.rows()))
    for note in report.notes():
        console.print(note, markup=False, highlight=False)
    console.print(report.scores.legend, style="dim", highlight=False)
    for table in report.tables():
        console.print()
        if table.title:
            console.print(table.title, style="bold", markup=False, highlight=False)
        if table.rows:
            console.print(table_of(table.rows))
        style = "dim" if table.rows else None
        console.print(table.text, style=style, markup=False, highlight=False)
    print_written(console, paths)


def _check_folder(folder: Path, config: CompareConfig) -> CompareConfig:
    """Refuse a folder of another configuration; methods, backbones, seeds, sets of teachers may be added to it.

    Returns:
        The configuration, with the seeds of its search; of a folder that was begun before there were stores, without
        one.
    """
    refuse_foreign_folder(folder, known=_CONFIG_FILE, ignored=AT_WORK)
    stored = None if config.anew else stored_config(folder / _CONFIG_FILE)
    config = with_search_seeds(config, stored)
    if stored is None:
        return config
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
            before = {"sets": 1, **(before or {})}
            same = before["sets"] <= now["sets"] and {**before, "sets": now["sets"]} == now
        elif key == "search":
            # Rows can be added with their searches, but none that are there can be chosen anew.
            same = (before or {}) == searched(config, stored["methods"])
        elif key == "search_seeds":
            before = search_seeds_in(stored)
            same = before in (None, now)
        else:
            same = before == now
        if not same:
            raise InputError(
                f"output folder {folder} belongs to another configuration ({key} was {before}): "
                "give another folder with --output, or make the runs again with --anew"
            )
    return config


def report_of(experiment: Experiment, runs: Sequence[Run], arguments: Sequence[str] | None) -> Report:
    """The report of a comparison whose runs are finished.

    Args:
        experiment: the comparison.
        runs: all of its runs.
        arguments: what it was called with, for the heading; ``None``: it was called from Python.
    """
    sections = search_section(trials_in(runs, experiment.task), experiment.task, [row.name for row in experiment.rows])
    # Trials were spared their teachers, too.
    kept = told_of_storage(experiment.storage, runs)
    runs = [run for run in runs if not run.in_search]
    heading, legend = _heading(experiment, arguments, runs, kept), _legend(experiment, runs)
    return Report(scores_of(experiment, runs, heading=heading, legend=legend, sections=sections))


def _heading(experiment: Experiment, arguments: Sequence[str] | None, runs: Sequence[Run], kept: str) -> str:
    config = experiment.config
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
        "`distill_lightning.compare(...)`"
        if arguments is None
        else f"`distill-lightning compare {shlex.join(arguments)}`",
        "",
        *(f"{note}." for note in dict.fromkeys(run.result().made for run in runs)),
        "",
        f"{' '.join(made)} Every student: {config.epochs} epochs.",
        "",
        *([kept, ""] if kept else []),
        f"{_spread(config)}, {experiment.task.samples}, no epoch chosen on them.",
        "",
        as_list(_legend(experiment, runs)),
    ]
    return "\n".join(lines)


def _spread(config: CompareConfig) -> str:
    """What ± stands for."""
    seeds = f"{len(config.seeds)} seeds ({', '.join(map(str, config.seeds))})"
    if config.teachers.sets == 1:
        return f"Mean ± standard deviation over {seeds}"
    return (
        f"Mean ± standard deviation over {config.teachers.sets} sets of teachers and {seeds} under each: that of a "
        "student with a seed and teachers of its own"
    )


def _legend(experiment: Experiment, runs: Sequence[Run]) -> str:
    """What the table's titles mean, and how scores were computed where the modules say so."""
    signatures = dict.fromkeys(item for run in runs for item in run.result().signatures.items())
    lines = [f"signature of {name}: {signature}" for name, signature in signatures]
    config = experiment.config
    legend = experiment.task.legend(with_ensemble=config.number_of_teachers > 0, confidence=config.confidence)
    return "\n".join([legend, *lines])


def _called(spec: dict[str, Any]) -> str:
    """A class with its arguments, and those of what is named among these."""
    arguments = ", ".join(
        f"{name}={_called(value) if isinstance(value, dict) and 'class_path' in value else value}"
        for name, value in (spec.get("init_args") or {}).items()
    )
    made = spec["class_path"]
    return f"{made.name if isinstance(made, Given) else made.rpartition('.')[2]}({arguments})"
