"""What the tests of comparisons share: writing a configuration, running it, and reading what that has left."""

import copy
import csv
import io

import yaml
from rich.console import Console

from distill_lightning.studies.compare import command
from distill_lightning.studies.compare.config import parse_config

# Columns that differ from run to run.
COST = ("seconds_per_epoch", "peak_memory", "shared")


def write_config(config, folder, change=lambda config: None):
    """The path of a file with a configuration, of which a copy was changed."""
    config = copy.deepcopy(config)
    change(config)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)


def compare(config, output, *arguments):
    """What the command prints."""
    shown = io.StringIO()
    given = [config, "--output", str(output), *arguments]
    command.run(parse_config(given), given, console=Console(file=shown, width=160))
    return shown.getvalue()


def lines_of(path):
    """The lines of a results file."""
    return list(csv.DictReader(path.read_text().splitlines()))


def numbers_in(path):
    """The lines of a results file, without what they cost."""
    return [{name: value for name, value in line.items() if name not in COST} for line in lines_of(path)]


def numbers_of(output):
    """All numbers of the results, of students and of teachers, but their cost."""
    return numbers_in(output / "results.csv") + numbers_in(output / "teachers.csv")
