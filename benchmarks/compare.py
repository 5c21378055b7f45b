"""What a comparison costs whose rows read what their teachers said once, measured on the table of Fashion-MNIST.

    python -m benchmarks.compare

runs every section on one machine, prints tables and writes ``benchmarks/results/compare.json``. Every ratio is the
median over rounds in which the contestants took turns. ``--small`` runs everything once on next to nothing, ``--only``
some of the sections; what an earlier call has measured of the others is kept.

A section is a function of a `Bench` in `SECTIONS`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.compare_ray import ray_worker
from benchmarks.compare_whole import demo, whole_table
from benchmarks.timing import Figure, Turn, circumstances, ratio, take_turns
from distill_lightning.modules import DistillationModule, FEEDModule
from distill_lightning.studies.compare.config import CompareConfig, parse_config
from distill_lightning.studies.compare.experiment import Experiment
from distill_lightning.studies.compare.runner import make_trainer
from distill_lightning.teachers.recorder import record

Clock = Callable[[], float]
CLOCKS: Mapping[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
RESULT = Path(__file__).parent / "results/compare.json"
TABLE = Path(__file__).parent.parent / "configs/compare/fashion_mnist_methods.yaml"


class Bench:
    """Where the sections get their comparison from, and what they add to.

    Args:
        path: of the JSON file.
        rounds: how many turns each contestant takes.
        config: the comparison.
        images: how many training images an epoch has.
        clock: name of what measures, ``"wall"``, or on a machine that others use, too, ``"cpu"``.
        is_small: whether everything is run once, to see that it runs.
    """

    def __init__(
        self,
        path: Path,
        *,
        rounds: int,
        config: Path = TABLE,
        images: int = 1280,
        clock: str = "wall",
        is_small: bool = False,
    ) -> None:
        self.is_small = is_small
        self.path, self.rounds, self.config, self.images, self.clock = path, rounds, config, images, clock
        self.console = Console(width=120)
        known = json.loads(path.read_text()) if path.exists() else {}
        self.content: dict[str, Any] = {"ratios": {}, "spread": {}, "sections": {}, **known, "machine": circumstances()}

    def experiment(self, *changes: str) -> Experiment:
        """The comparison with some of its options changed."""
        return Experiment(self.parsed(*changes))

    def parsed(self, *changes: str) -> CompareConfig:
        """The configuration with some options changed."""
        of_all = [f"--data.init_args.subset={self.images}", "--accelerator=cpu"]
        return parse_config([str(self.config), *of_all, *changes])

    def section(self, name: str, rows: Sequence[dict[str, Any]], *, note: str = "") -> None:
        """Print a table, keep it and write all."""
        table = Table(title=f"{name}\n{note}" if note else name, title_justify="left")
        for column in rows[0]:
            table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
        for row in rows:
            table.add_row(*[_shown(value) for value in row.values()])
        self.console.print(table)
        plain = [
            {key: list(value) if isinstance(value, Figure) else value for key, value in row.items()} for row in rows
        ]
        self.content["sections"][name] = {"note": note, "rows": plain, "clock": self.clock, "machine": circumstances()}
        self.write()

    def ratio(self, name: str, figure: Figure) -> None:
        """Keep a ratio and its quartiles."""
        self.content["ratios"][name] = round(figure.median, 4)
        self.content["spread"][name] = [round(figure.low, 4), round(figure.high, 4)]

    def write(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def _shown(value: Any) -> str:
    if isinstance(value, Figure):
        return f"{value.median:,.3g} ({value.low:,.3g} to {value.high:,.3g})"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


class _EpochTimes(pl.Callback):
    """Seconds of each epoch's training, as a comparison measures them: validation is not in them."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seconds: list[float] = []
        self._begin = self._end = 0.0

    def on_train_epoch_start(self, *args: Any) -> None:
        self._begin = self.clock()

    def on_train_batch_end(self, *args: Any) -> None:
        self._end = self.clock()

    def on_train_epoch_end(self, *args: Any) -> None:
        self.seconds.append(self._end - self._begin)


class Store:
    """A comparison's teachers, trained for an epoch, and what is kept of them in a folder.

    Args:
        experiment: the comparison.
        folder: for the store.
        clock: that measures the turns.
    """

    def __init__(self, experiment: Experiment, folder: Path, clock: Clock) -> None:
        self.clock = clock
        self.experiment, self.storage, self.folder = experiment, experiment.storage, folder
        self._rows = {row.name: row for row in experiment.rows}
        # Set up once: files are not read again in every turn.
        self.data = experiment.data(order_seed=0)
        torch.manual_seed(0)
        self.networks = [experiment.teacher() for _ in range(self.storage.teachers)]
        for network in self.networks:
            # What follows those that know nothing ends in numbers so small that a processor is slow with them.
            self._fit(experiment.supervised(network), max_epochs=1)

    def fill(self, folder: Path) -> float:
        """Fill a store, start and writing included; seconds."""
        name = next(iter(self.storage.rows))
        module = self._module(name)
        self.storage.filled_by(folder, module, self.networks, self.experiment.sample.input_shape)
        self.data.views = self.storage.kept_views
        begin = self.clock()
        record(make_trainer(self.experiment.config), module, self.data)
        return self.clock() - begin

    def fill_another(self) -> float:
        """Fill a store of its own, and remove it; seconds."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            return self.fill(Path(folder))

    def run_once(self) -> float:
        """Make every view, and run the teachers on it, in inference mode; seconds."""
        self.data.setup("fit")
        dataset, size = self.data.dataset("train", augment=True), self.data.batch_size
        start = self.clock()
        with torch.inference_mode():
            for view in range(self.storage.kept_views):
                for begin in range(0, len(dataset), size):
                    samples = range(begin, min(begin + size, len(dataset)))
                    batch = dataset.__getitems__([(sample, view) for sample in samples])
                    for network in self.networks:
                        network.eval()(batch.input)
        return self.clock() - start

    def alone(self) -> Turn:
        """Epochs of the student alone."""
        return self._trained(self.experiment.supervised(self.experiment.student()))

    def reading(self, name: str) -> Turn:
        """Epochs of a row that reads the store."""
        module = self._module(name)
        self.storage.read_by(self.folder, module, name)
        return self._trained(module)

    def translators(self, name: str) -> Turn:
        """An epoch's forward, backward and step of a row's translators, on random features in memory."""
        module = self._module(name)
        if not isinstance(module, FEEDModule):
            raise TypeError(f"{name} has no translators")
        self.data.setup("fit")
        sizes = [batch.size for batch in self.data.train_dataloader()]
        inputs = next(iter(self.data.train_dataloader())).input
        _, features = module.student_tap(inputs)
        (shape,) = (feature.shape[1:] for feature in features.values())
        optimizer = torch.optim.SGD(module.translators.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        feature = torch.rand(max(sizes), *shape, requires_grad=True)

        def turn() -> float:
            begin = self.clock()
            for size in sizes:
                optimizer.zero_grad()
                outputs = [translator(feature[:size]) for translator in module.translators]
                torch.autograd.backward(outputs, [torch.full_like(output, 1e-6) for output in outputs])
                optimizer.step()
            return self.clock() - begin

        return turn

    def _module(self, name: str) -> DistillationModule:
        row = self._rows[name]
        count = self.storage.rows[name].teachers
        return self.experiment.method(row, self.experiment.student(), self.networks[:count])

    def _trained(self, module: DistillationModule) -> Turn:
        """A turn is a fit of two epochs from the same weights: seconds of the second one's training."""
        initial = copy.deepcopy(module.state_dict())

        def turn() -> float:
            module.load_state_dict(initial)
            return self._fit(module, max_epochs=2)

        return turn

    def _fit(self, module: DistillationModule, *, max_epochs: int) -> float:
        """Train; seconds of the last epoch."""
        times = _EpochTimes(self.clock)
        self.storage.number(self.data)
        options: dict[str, Any] = {"limit_val_batches": 0, "enable_checkpointing": False, "max_epochs": max_epochs}
        trainer = make_trainer(self.experiment.config, callbacks=[times], **options)
        trainer.fit(module, datamodule=self.data)
        return times.seconds[-1]


def _features_within(bench: Bench, views: int) -> str:
    """The option by which feature maps are in half precision, as the table's 24 views of 4,000 images fit."""
    return f"--teachers_store.features={2_000_000_000 * views * bench.images // (24 * 4000)}"


def epochs(bench: Bench) -> None:
    """An epoch of rows that read the store, over the student alone's."""
    # Two views, of which the second epoch reads the second one.
    limit = _features_within(bench, views=2)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(bench.experiment("--teachers_store.views=2", limit), Path(folder), CLOCKS[bench.clock])
        store.fill(store.folder)
        turns = {"alone": store.alone(), "translators": store.translators("feed")}
        turns |= {name: store.reading(name) for name in ("kd", "meal_v2", "feed")}
        measured = take_turns(turns, rounds=bench.rounds)
    floors = dict.fromkeys(("alone", "translators", "kd", "meal_v2"), measured["alone"])
    floors["feed"] = [sum(pair) for pair in zip(measured["alone"], measured["translators"], strict=True)]
    rows = []
    for name, values in measured.items():
        over = ratio(values, floors[name])
        rows.append({"row": name, "s an epoch": Figure.of(values), "over floor": over})
        if name in store.storage.rows:
            bench.ratio(f"{name}_reading_over_floor", over)
    note = (
        f"{bench.images} images; outputs {store.storage.outputs}, features {store.storage.features}; feed's floor: "
        "alone, and its translators on random features"
    )
    bench.section("an epoch of rows that read the store", rows, note=note)


def filling(bench: Bench) -> None:
    """Filling the store over running the teachers once for each view."""
    rows: list[dict[str, Any]] = []
    # The table has 24: what is left to be written when the teachers have said all counts less there.
    views = 2 if bench.is_small else 6
    kept = {"outputs": "--teachers_store.features=0", "outputs and features": _features_within(bench, views)}
    for what, limit in kept.items():
        with tempfile.TemporaryDirectory() as folder:
            experiment = bench.experiment(f"--teachers_store.views={views}", limit)
            store = Store(experiment, Path(folder), CLOCKS[bench.clock])
            turns = {"teachers run once": store.run_once, "store filled": store.fill_another}
            measured = take_turns(turns, rounds=bench.rounds)
        once = measured["teachers run once"]
        for name, values in measured.items():
            rows.append({"what": f"{name}, {what}", "s": Figure.of(values), "over running": ratio(values, once)})
        bench.ratio(f"filling_over_running_{what.replace(' ', '_')}", ratio(measured["store filled"], once))
    bench.section("filling the store", rows, note=f"{views} views of {bench.images} images, start and writing included")


SECTIONS: Mapping[str, Callable[[Bench], None]] = {
    "epochs": epochs,
    "filling": filling,
    "ray": ray_worker,
    "table": whole_table,
    "demo": demo,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="everything once and tiny, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--config", type=Path, default=TABLE)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), help="names of sections")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--images", type=int, default=1280)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rounds, images = (1, 128) if given.small else (given.rounds, given.images)
    bench = Bench(
        given.output, rounds=rounds, config=given.config, images=images, clock=given.clock, is_small=given.small
    )
    for name in given.only or SECTIONS:
        SECTIONS[name](bench)
    bench.write()
    for name, value in bench.content["ratios"].items():
        print(f"{name}: {value} {bench.content['spread'][name]}")
    print(f"Written: {bench.path}")


if __name__ == "__main__":
    main()
