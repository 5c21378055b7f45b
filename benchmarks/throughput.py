"""What a step costs, with the teachers at work and with their answers in a store.

    make bench

runs every section on one machine in one process (memory peaks: a process each), prints tables and writes
``benchmarks/results/throughput.json``. Every ratio is the median over rounds in which the contestants took turns; the
plain PyTorch loop, which most ratios refer to, has its batches in memory and logs nothing. ``--small`` runs everything
once on next to nothing, ``--only`` some of the sections.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import data_path, growth, views
from benchmarks.contestants import (
    BATCH_SIZE,
    CLASSES,
    LEARNING_RATE,
    METHODS,
    RandomImages,
    Stores,
    looped,
    quiet_trainer,
    sgd,
    student,
    teachers,
    trained,
)
from benchmarks.peers import plain_step, torchdistill_step
from benchmarks.timing import Figure, Turn, circumstances, peak_memory, ratio, stopwatch, take_turns
from distill_lightning import SelfKDModule, SupervisedModule
from distill_lightning.layers import Discriminator, Translator
from distill_lightning.teachers.recorder import record

RESULT = Path(__file__).parent / "results/throughput.json"
_FEATURES = 64  # channels of both networks' last feature map


class Report:
    """What was measured; written after each section, so that nothing is lost.

    Args:
        path: of the JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.console = Console(width=120)
        self.content: dict[str, Any] = {"machine": circumstances(), "ratios": {}, "spread": {}, "sections": {}}

    def ratio(self, name: str, figure: Figure) -> None:
        """Keep a ratio and its quartiles."""
        self.content["ratios"][name] = round(figure.median, 4)
        self.content["spread"][name] = [round(figure.low, 4), round(figure.high, 4)]

    def section(self, name: str, rows: Sequence[dict[str, Any]], *, note: str = "") -> None:
        """Print a table, keep it and write all."""
        table = Table(title=f"{name}\n{note}" if note else name, title_justify="left")
        for column in rows[0]:
            table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
        for row in rows:
            table.add_row(*[_shown(value) for value in row.values()])
        self.console.print(table)
        self.content["sections"][name] = {"note": note, "rows": [_plain(row) for row in rows]}
        self.write()

    def write(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def _shown(value: Any) -> str:
    if isinstance(value, Figure):
        return (
            f"{value.median:,.3g} ({value.low:,.3g} to {value.high:,.3g})"
            if value.median < 1000
            else f"{value.median:,.0f}"
        )
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, Figure) else value for name, value in row.items()}


def _milliseconds(values: Iterable[float]) -> Figure:
    return Figure.of(1000 * value for value in values)


class Throughput:
    """The sections of the benchmark.

    Args:
        report: what they add to.
        rounds: of the cheaper sections; the expensive ones have half as many.
        images: in an epoch that is a turn.
        batch_size: images per batch.
        counts: numbers of teachers.
    """

    def __init__(
        self,
        report: Report,
        *,
        rounds: int,
        images: int,
        batch_size: int = BATCH_SIZE,
        counts: Sequence[int] = (1, 3, 5),
    ) -> None:
        self.report, self.rounds, self.batch_size, self.counts = report, rounds, batch_size, tuple(counts)
        self.data = RandomImages(images, batch_size=batch_size)
        self.stores = Stores(self.data)

    def supervised(self, **options: Any) -> SupervisedModule:
        """Plain training through the Trainer."""
        return SupervisedModule(student(), num_classes=CLASSES, optimizer=sgd, **options)

    def bare(self) -> Turn:
        """The plain loop."""
        return looped(plain_step("supervised", student(), [], lr=LEARNING_RATE), self.data)

    def steps(self) -> None:
        """A plain step, ours, and methods that read what their teachers have said."""
        count = self.counts[-1]
        fast = trained(self.stores.reading("kd", count, channels_last=True, compile=True), self.data)
        with stopwatch() as seconds:
            fast()
        plain, ours, own_past = "plain PyTorch loop", "SupervisedModule", "SelfKDModule, stored"
        self_kd = SelfKDModule(student(), num_classes=CLASSES, optimizer=sgd, total_epochs=1)
        # The narrow limits first, among few, so that little time lies between two turns that are compared.
        close = {
            plain: self.bare(),
            ours: trained(self.supervised(), self.data),
            own_past: trained(self_kd, self.data),
            **{_stored(method, count): self._reading(method, count) for method in ("kd", "meal_v2")},
        }
        measured = take_turns(close, rounds=2 * self.rounds)
        rows = self._compared(measured)
        self.report.ratio("trainer_over_bare", ratio(measured[ours], measured[plain]))
        self.report.ratio("self_kd_stored_over_supervised", ratio(measured[own_past], measured[ours]))
        self._store_ratios(measured, [count])
        kd = f"{_stored('kd', count)}, channels_last"
        others = {name: close[name] for name in (plain, ours)}
        fewer = self.counts[:-1]
        others |= {_stored(method, m): self._reading(method, m) for method in ("kd", "meal_v2") for m in fewer}
        others[f"{ours}, channels_last"] = trained(self.supervised(channels_last=True), self.data)
        others[kd] = self._reading("kd", count, channels_last=True)
        others[f"{kd}, compile"] = fast
        measured = take_turns(others, rounds=self.rounds)
        self._store_ratios(measured, fewer)
        self.report.ratio("kd_store_channels_last_over_bare", ratio(measured[kd], measured[plain]))
        self.report.ratio("kd_store_fast_over_bare", ratio(measured[f"{kd}, compile"], measured[plain]))
        self.report.content["compile_warm_up_seconds"] = round(seconds(), 1)
        note = f"ResNet-20, batches of {self.batch_size}; the first fit with compile took {seconds():.0f} s"
        rows += [row for row in self._compared(measured) if row["contestant"] not in (plain, ours)]
        self.report.section("a, b. a step with full stores", rows, note=note)

    def _reading(self, method: str, count: int, **options: Any) -> Turn:
        return trained(self.stores.reading(method, count, **options), self.data)

    def _compared(self, measured: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
        return [
            {
                "contestant": name,
                "ms a step": _milliseconds(values),
                "over plain loop": ratio(values, measured["plain PyTorch loop"]),
                "over SupervisedModule": ratio(values, measured["SupervisedModule"]),
            }
            for name, values in measured.items()
        ]

    def _store_ratios(self, measured: Mapping[str, Sequence[float]], counts: Sequence[int]) -> None:
        for method, count in [(method, count) for method in ("kd", "meal_v2") for count in counts]:
            over = ratio(measured[_stored(method, count)], measured["SupervisedModule"])
            self.report.ratio(f"{method}_store_over_supervised_{count}_teachers", over)

    def features(self) -> None:
        """FEED with a full store, over plain training and what its translators cost alone."""
        contestants: dict[str, Turn] = {"SupervisedModule": trained(self.supervised(), self.data)}
        for count in self.counts:
            contestants[f"translators of {count}"] = self._translators(count)
            contestants[f"FEEDModule, store of {count}"] = trained(self.stores.reading("feed", count), self.data)
        measured = take_turns(contestants, rounds=self.rounds)
        supervised = measured["SupervisedModule"]
        rows = [{"contestant": "SupervisedModule", "ms a step": _milliseconds(supervised), "over floor": ""}]
        for count in self.counts:
            alone, stored = measured[f"translators of {count}"], measured[f"FEEDModule, store of {count}"]
            floor = [first + second for first, second in zip(supervised, alone, strict=True)]
            rows.append({"contestant": f"translators of {count}", "ms a step": _milliseconds(alone), "over floor": ""})
            over = ratio(stored, floor)
            rows.append(
                {"contestant": f"FEEDModule, store of {count}", "ms a step": _milliseconds(stored), "over floor": over}
            )
            self.report.ratio(f"feed_store_over_floor_{count}_teachers", over)
        self.report.section(
            "b. FEED with full stores of feature maps",
            rows,
            note="floor: SupervisedModule and the translators' own forward, backward and SGD step",
        )

    def _translators(self, count: int) -> Turn:
        """Forward, backward and step of the translators alone, on features in memory."""
        translators = nn.ModuleList(Translator(_FEATURES, _FEATURES) for _ in range(count))
        optimizer = sgd(translators.parameters())
        feature = torch.rand(self.batch_size, _FEATURES, 8, 8, requires_grad=True)
        gradient = torch.full_like(feature, 1e-6)

        def step(_images: torch.Tensor, _labels: torch.Tensor) -> None:
            optimizer.zero_grad()
            outputs = [translator(feature) for translator in translators]
            torch.autograd.backward(outputs, [gradient] * count)
            optimizer.step()

        return looped(step, self.data)

    def online(self) -> None:
        """The teachers at work in every step, here and at the peers, and the same work with a store."""
        count = min(self.data.count, 5 * self.batch_size)
        stores = {
            method: Stores(RandomImages(count, batch_size=self.batch_size, partners=method == "extracurricular"))
            for method in METHOD_NAMES
        }
        peers = {"plain loop": plain_step, "torchdistill": torchdistill_step}
        contestants: dict[str, Turn] = {}
        cases = [(method, number) for method in METHOD_NAMES for number in self.counts]
        for method, number in cases:
            data, case = stores[method].data, f"{method}, {number}"
            contestants[f"{case}, ours online"] = trained(METHODS[method](student(), teachers(number)), data)
            contestants[f"{case}, ours stored"] = trained(stores[method].reading(method, number), data)
            for peer, make in peers.items() if method in WITH_PEERS else ():
                step = make(method, student(), teachers(number), lr=LEARNING_RATE, **_companions(method, number))
                contestants[f"{case}, {peer}"] = looped(step, data)
        measured = take_turns(contestants, rounds=max(self.rounds // 2, 1))
        rows = []
        for method, number in cases:
            case = f"{method}, {number}"
            times = {who: measured.get(f"{case}, {who}", []) for who in (*peers, "ours online", "ours stored")}
            row = {"method": METHOD_NAMES[method], "teachers": str(number)}
            row |= {f"{who}, ms": _milliseconds(values) if values else "" for who, values in times.items()}
            others = {who: times[who] for who in (peers if method in WITH_PEERS else ["ours online"])}
            fastest = min(others, key=lambda who: Figure.of(others[who]).median)
            over = ratio(others[fastest], times["ours stored"])
            who = "peer" if method in WITH_PEERS else "ours"
            self.report.ratio(f"{who}_online_over_{method}_store_{number}_teachers", over)
            rows.append({**row, "online / stored": over})
        note = "online / stored: the faster peer over ours, or where there is no peer ours over ours"
        self.report.section("b, c. teachers at work in every step, and stored", rows, note=note)

    def data_path(self) -> None:
        """Images a second, and how many the student takes."""
        rates = data_path.images_per_second(rounds=max(self.rounds // 2, 1), count=8 * self.data.count)
        bare = take_turns({"bare": self.bare()}, rounds=max(self.rounds // 2, 1))["bare"]
        appetite = Figure.of(self.batch_size / seconds for seconds in bare)
        over = Figure.of(value / appetite.median for value in rates["ours, 0 workers"])
        self.report.ratio("data_over_student_appetite", over)
        rows = [
            {"who": name, "images a second": rate, "times the student": rate.median / appetite.median}
            for name, rate in (rates | {"the student, plain loop": appetite}).items()
        ]
        self.report.section("d. augmented batches", rows, note="3x32x32, random crop and flip")

    def recording(self) -> None:
        """Filling a store ahead of time, over a loop of the teachers in inference mode."""
        count = self.counts[-1]
        networks = teachers(count)
        batches = [batch.input for batch in self.data.train_dataloader()]

        def inference() -> float:
            with stopwatch() as seconds, torch.inference_mode():
                for images in batches:
                    for network in networks:
                        network(images)
            return seconds() / len(batches)

        def recorded() -> float:
            module = METHODS["kd"](student(), self.stores.fresh(networks))
            return record(quiet_trainer(), module, self.data).seconds / len(batches)

        measured = take_turns({"teachers alone": inference, "record": recorded}, rounds=max(self.rounds // 2, 1))
        over = ratio(measured["record"], measured["teachers alone"])
        self.report.ratio("record_over_inference", over)
        rows = [
            {
                "what": name,
                "ms a batch": _milliseconds(values),
                "over teachers alone": ratio(values, measured["teachers alone"]),
            }
            for name, values in measured.items()
        ]
        self.report.section(f"e. record, {count} teachers, start and writing included", rows)

    def reads(self, *, samples: int) -> None:
        """What a top-10 store of 1000 classes costs to read and to keep."""
        with tempfile.TemporaryDirectory() as folder:
            found = growth.reads(Path(folder), samples=samples, classes=1000, top_k=10, rounds=3)
        self.report.ratio("bytes_per_sample_view_top10_of_1000", Figure.of([found["bytes"]]))
        self.report.section(
            "f. a store of the 10 largest of 1000 probabilities", [{"what": "on disk and read", **found}]
        )

    def wall_clock(self, *, epochs: int, seeds: Sequence[int], counts: Sequence[int | None]) -> None:
        """Accuracy by number of views, and the time until a student is as good as one alone."""
        with tempfile.TemporaryDirectory() as folder:
            found = views.compare(Path(folder), views=counts, seeds=seeds, epochs=epochs)
        rows = found.pop("rows")
        note = ", ".join(f"{name} {_shown(value)}" for name, value in found.items())
        note = f"KD, stores filled while training; {note}; more images: python -m benchmarks.views"
        self.report.section("g. how many views", rows, note=note)

    def growth(self, *, counts: tuple[int, ...], numbers: tuple[int, ...]) -> None:
        """Seconds of an epoch by number of samples and of teachers."""
        with tempfile.TemporaryDirectory() as folder:
            rows = growth.epochs(Path(folder), counts=counts, teachers=numbers, rounds=max(self.rounds // 2, 1))
        self.report.section("h. seconds of an epoch, tiny networks", rows)

    def memory(self) -> None:
        """The most memory of a process that does one contestant's work."""
        # The child finds full stores; filling them is no part of what is measured.
        count = self.counts[-1]
        for method in WITH_PEERS:
            self.stores.filled(method, count)
        rows = []
        for name in MEMORY:
            command = [
                sys.executable,
                "-m",
                "benchmarks.throughput",
                "--peak",
                name,
                "--stores",
                str(self.stores.folder),
            ]
            command += [
                "--images",
                str(self.data.count),
                "--batch-size",
                str(self.batch_size),
                "--teachers",
                str(count),
            ]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603  (its own name)
            rows.append({"contestant": name, "peak MiB": int(output.split()[-1]) / 2**20})
        self.report.section("i. memory, the whole process", rows, note=f"{count} teachers")

    def peak(self, name: str) -> int:
        """Bytes, in this process, of one of `MEMORY`."""
        kind, _, method = name.partition(" ")
        count = self.counts[-1]
        if kind == "plain":
            self.bare()()
        elif kind == "supervised":
            trained(self.supervised(), self.data)()
        elif kind == "stored":
            trained(self.stores.reading(method, count), self.data)()
        else:
            trained(METHODS[method](student(), teachers(count)), self.data)()
        return peak_memory()


METHOD_NAMES = {
    "kd": "KDModule",
    "meal_v2": "MEALV2Module",
    "feed": "FEEDModule",
    "extracurricular": "ExtracurricularModule",
}
# What the peers can do, too.
WITH_PEERS = ("kd", "meal_v2", "feed")
MEMORY = ("plain", "supervised", *(f"{how} {method}" for method in WITH_PEERS for how in ("stored", "online")))


def _stored(method: str, count: int) -> str:
    return f"{METHOD_NAMES[method]}, store of {count}"


def _companions(method: str, count: int) -> dict[str, Any]:
    """What learns beside the student."""
    if method == "meal_v2":
        return {"discriminator": Discriminator(CLASSES)}
    if method == "feed":
        return {"translators": nn.ModuleList(Translator(_FEATURES, _FEATURES) for _ in range(count))}
    return {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="everything once and tiny, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--only", nargs="*", help="names of sections")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--stores", help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--teachers", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    _quiet_down()
    small = given.small
    counts = (given.teachers,) if given.teachers else (1, 2) if small else (1, 3, 5)
    batch_size = given.batch_size or (4 if small else BATCH_SIZE)
    images = given.images or (3 if small else 16) * batch_size
    report = Report(given.output)
    benchmark = Throughput(report, rounds=1 if small else 6, images=images, batch_size=batch_size, counts=counts)
    if given.peak:
        benchmark.stores.folder = Path(given.stores)
        print(benchmark.peak(given.peak))
        return
    begin = time.perf_counter()
    sections: dict[str, Callable[[], None]] = {
        "steps": benchmark.steps,
        "features": benchmark.features,
        "online": benchmark.online,
        "data_path": benchmark.data_path,
        "recording": benchmark.recording,
        "reads": lambda: benchmark.reads(samples=2_000 if small else 50_000),
        "growth": lambda: benchmark.growth(
            counts=(600, 700) if small else (1_000, 4_000, 16_000, 60_000),
            numbers=(1, 2) if small else (1, 2, 4, 8),
        ),
        "wall_clock": lambda: benchmark.wall_clock(
            epochs=2 if small else 30,
            seeds=(0,) if small else (0, 1, 2, 3, 4),
            counts=(1, None) if small else (1, 2, 4, 8, 16, None),
        ),
        "memory": benchmark.memory,
    }
    for name, section in sections.items():
        if not given.only or name in given.only:
            section()
    report.content["seconds"] = round(time.perf_counter() - begin)
    report.write()
    ratios = [
        {"ratio": name, "median": value, "quartiles": str(report.content["spread"][name])}
        for name, value in report.content["ratios"].items()
    ]
    if ratios:
        report.section(
            "ratios", ratios, note=f"{report.content['seconds']} s in all, {torch.get_num_threads()} threads"
        )
    print(f"Written: {report.path}")


def _quiet_down() -> None:
    """Lightning's advice is not for a benchmark."""
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
