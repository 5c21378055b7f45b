"""Many runs at once, calls that share a folder, and what goes wrong meanwhile: the table is always the same."""

import dataclasses
import io
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from compare_files import compare, lines_of, numbers_of, write_config
from rich.console import Console

from distill_lightning import InputError, KDModule, SupervisedModule
from distill_lightning.cli import main
from distill_lightning.studies.compare import attempt, command, pool, workers
from distill_lightning.studies.compare.config import parse_config
from distill_lightning.studies.compare.pool import Finished, make_all
from distill_lightning.studies.compare.pools import with_threads
from distill_lightning.studies.compare.runs import Run
from distill_lightning.studies.compare.sharing import chosen, refuse_others

CONFIG = {
    "data": {
        "class_path": "DigitsDataModule",
        "init_args": {"subset": 64, "val_size": 50, "test_size": 100, "image_size": 8},
    },
    "teachers": {"network": {"class_path": "SmallResNet", "init_args": {"width": 4}}, "number": 2, "epochs": 4},
    "student": {"class_path": "SmallResNet", "init_args": {"width": 2}},
    "methods": {
        "kd": {"class_path": "KDModule", "teachers": 1},
        "ft": {
            "class_path": "FEEDModule",
            "init_args": {"student_layer": "stage3", "beta": 20.0},
            "paraphrasers": {"epochs": 1, "init_args": {"rate": 0.25}},
        },
        "ban": {"class_path": "KDModule", "teachers": "kd"},
    },
    "epochs": 4,
    "seeds": [0, 1],
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
    "accelerator": "cpu",
    "threads_per_run": 1,
}  # fmt: skip
NAMES = {f"{name}, seed {seed}" for name in ("alone", "kd", "ft", "ban") for seed in (0, 1)} | {
    "teacher_1",
    "teacher_2",
}


written = partial(write_config, CONFIG)


def made(shown):
    """The runs of which a call has told that they have ended."""
    return {line.partition(":")[0] for line in shown.splitlines()} & NAMES


def left_over(output):
    """What only those leave that were killed."""
    return [path for path in output.rglob("*") if path.name.startswith("partial") or path.name == "claim.json"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The table of one run after the other."""
    folder = tmp_path_factory.mktemp("undisturbed")
    compare(written(folder), folder / "out")
    return numbers_of(folder / "out")


@pytest.fixture
def forking(monkeypatch, start_method):
    """Workers begin with what the test has imported."""
    monkeypatch.setattr(workers, "_START_METHOD", start_method)


class FakePool:
    """Makes runs at once, in the order of its script."""

    waits_for_others = False

    def __init__(self, capacity, outcomes=()):
        self.capacity, self.outcomes = capacity, dict(outcomes)
        self.began, self.most, self.is_closed = [], 0, False
        self._at_work = []

    def submit(self, run):
        assert all(other.is_finished for other in run.depends_on)
        self.began.append(run.name)
        self._at_work.append(run)
        self.most = max(self.most, len(self._at_work))

    def wait(self, on_epoch):
        run = self._at_work.pop()
        outcome = next(iter(self.outcomes.get(run.name, [])), {})
        self.outcomes[run.name] = self.outcomes.get(run.name, [])[1:]
        if not outcome:
            finish(run)
        return [Finished(run, **outcome)]

    def close(self):
        self.is_closed = True


def finish(run):
    run.folder.mkdir(exist_ok=True)
    run.result_file.write_text(json.dumps({"parameters": 1, "selected_epoch": 1, "history": [], "made": ""}))


def planned(folder):
    """a; b and c learn from it; d learns from both; e from nobody."""

    def run(name, *teachers):
        return Run(None, name, 0, 0, 1, folder / name, teachers)

    a, e = run("a"), run("e")
    b, c = run("b", a), run("c", a)
    return [a, b, c, run("d", b, c), e]


def make(runs, pool, folder):
    shown = io.StringIO()
    experiment = SimpleNamespace(config=SimpleNamespace(output=str(folder)), student=lambda: torch.nn.Linear(1, 1))
    make_all(experiment, runs, pool, Console(file=shown, width=160))
    assert pool.is_closed
    return shown.getvalue()


@pytest.mark.parametrize(("capacity", "order"), [(1, "abcde"), (2, "aebcd"), (9, "aebcd")])
def test_runs_begin_in_their_order_once_those_are_finished_that_they_depend_on(tmp_path, capacity, order):
    runs = planned(tmp_path)
    fake = FakePool(capacity)
    shown = make(runs, fake, tmp_path)
    assert "".join(fake.began) == order
    assert fake.most == min(capacity, 2)
    assert "5/5 epochs" in shown
    fake = FakePool(capacity)
    make(runs, fake, tmp_path)
    assert fake.began == []


def test_a_lost_worker_is_one_line_and_its_run_is_tried_again_so_many_times(tmp_path):
    lost = {"error": "its process was killed by SIGKILL"}
    fake = FakePool(1, {"a": [lost], "e": [lost, lost, lost]})
    shown = make(planned(tmp_path), fake, tmp_path)
    assert "".join(fake.began) == "aabcdeee"
    assert "a: its process was killed by SIGKILL; it is tried again\n" in shown
    assert "e: its process was killed by SIGKILL, 3 times: given up\n" in shown
    result = planned(tmp_path)[-1].result()
    assert result.without_scores == result.failed == "its process was killed by SIGKILL, 3 times"


def test_a_run_that_another_call_makes_is_waited_for_while_others_are_made(tmp_path, monkeypatch):
    fake = FakePool(1, {"a": [{"elsewhere": "process 7 on far"}]})
    runs = planned(tmp_path)

    def elapse(seconds):
        # The other call ends; there was nothing else to do.
        assert fake.began == ["a", "e"]
        finish(runs[0])

    monkeypatch.setattr(pool, "time", SimpleNamespace(sleep=elapse, monotonic=time.monotonic))
    monkeypatch.setattr(pool, "_PAUSE", 600)
    shown = make(runs, fake, tmp_path)
    assert fake.began == ["a", "e", "b", "c", "d"]
    assert "a: done" not in shown


def test_who_makes_a_run_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_PAUSE", 0)
    fake = FakePool(1, {"a": [{"elsewhere": "process 7 on far"}] * 3})
    shown = make(planned(tmp_path), fake, tmp_path)
    assert fake.began.count("a") == 4
    assert shown.count("a is made elsewhere (process 7 on far); this call waits for it\n") == 1


def test_only_some_rows_and_seeds_and_what_they_depend_on(tmp_path):
    runs = planned(tmp_path)

    def names(**options):
        return "".join(run.name for run in chosen(runs, SimpleNamespace(**options)))

    assert names(only=None) == "abcde"
    assert names(only=["c"], only_seeds=None, seeds=[0]) == "ac"
    assert names(only=["d", "a"], only_seeds=None, seeds=[0]) == "abcd"
    with pytest.raises(InputError, match="only: there is no row 'f'; these can be made: a, b, c, d, e"):
        names(only=["f"], only_seeds=None, seeds=[0])


def test_beside_only_the_seeds_are_some_of_the_files(tmp_path):
    path = written(tmp_path)
    ways = (["--only", "[kd]", "--seeds", "[1]"], ["--only=[kd]", "--seeds=[1]"])
    # As jobs of an array write them.
    ways += (["--only", "kd", "--seeds", "1"], ["--only=kd", "--seeds=1"])
    for way in ways:
        config = parse_config([path, *way])
        assert (config.seeds, config.only_seeds, config.only) == ([0, 1], [1], ["kd"])
        assert config.as_plain() == parse_config([path]).as_plain()
    assert parse_config([path, "--seeds", "[1]"]).seeds == [1]
    with pytest.raises(InputError, match=r"seeds: \[7\] are none of the comparison's, \[0, 1\]"):
        parse_config([path, "--only", "[kd]", "--seeds", "[7]"])


def test_the_number_of_threads_stays_that_of_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("distill_lightning.studies.compare.pools._usable_cores", lambda: 8)
    config = parse_config([written(tmp_path, lambda config: config.pop("threads_per_run"))])

    def threads(known, **changes):
        return with_threads(dataclasses.replace(config, **changes), tmp_path / known).threads_per_run

    (tmp_path / "two.yaml").write_text("threads_per_run: 2")
    (tmp_path / "none.yaml").write_text("seeds: [0]")
    assert [threads("new.yaml", workers=number) for number in (1, 2, 3, 16)] == [torch.get_num_threads(), 4, 2, 1]
    assert [threads("two.yaml", workers=number) for number in (1, 2, 3)] == [2, 2, 2]
    # They were made with PyTorch's own number.
    assert threads("none.yaml", workers=2) is None
    assert threads("two.yaml", workers=2, anew=True) == 4
    assert threads("two.yaml", workers=2, threads_per_run=3) == 3


@pytest.mark.slow
def test_two_workers_make_the_same_table_as_one_process(undisturbed, tmp_path):
    """From the command line: processes that share nothing with the first."""
    config = written(tmp_path)
    given = ["compare", config, "--output", str(tmp_path / "out"), "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "distill_lightning", *given], capture_output=True, text=True, check=True
    )
    assert made(done.stdout) == NAMES
    assert done.stderr == ""
    assert numbers_of(tmp_path / "out") == undisturbed
    results = [json.loads(path.read_text()) for path in (tmp_path / "out/runs").rglob("result.json")]
    assert any(result["shared"] for result in results)
    assert all("1 threads" in result["made"] for result in results)
    assert yaml.safe_load((tmp_path / "out/compare.yaml").read_text())["threads_per_run"] == 1
    assert not left_over(tmp_path / "out")


def call(config, output, queue, *arguments):
    os.setsid()
    queue.put(compare(config, output, *arguments))


def at_work(output):
    """The numbers of the processes that make runs."""
    found = []
    for path in output.glob("runs/**/claim.json"):
        try:
            found.append(json.loads(path.read_text())["process"])
        except (ValueError, FileNotFoundError):
            continue
    return [number for number in found if Path(f"/proc/{number}").exists()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_killed_ten_times_with_two_workers_it_ends_with_the_undisturbed_table(
    undisturbed, tmp_path, forking, start_method
):
    context, moments = multiprocessing.get_context(start_method), random.Random(0)
    output, queue = tmp_path / "out", context.Queue()
    process, kills = None, 0
    while kills < 10:
        if process is None:
            process = context.Process(target=call, args=(written(tmp_path), output, queue, "--workers", "2"))
            process.start()
        deadline = time.monotonic() + 120
        while not (numbers := at_work(output)):
            assert process.is_alive(), "it ended before it was killed ten times"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.3))
        # All of it, as when the power fails, or one worker, as when memory runs out.
        if moments.random() < 0.5:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            process = None
        else:
            try:
                os.kill(moments.choice(numbers), signal.SIGKILL)
            except ProcessLookupError:
                # It has ended by itself meanwhile: another moment.
                continue
        kills += 1
    if process is not None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    compare(written(tmp_path), output, "--workers", "2")
    assert numbers_of(output) == undisturbed
    assert not left_over(output)


@pytest.mark.slow
def test_two_calls_at_once_share_the_work(undisturbed, tmp_path, start_method):
    context = multiprocessing.get_context(start_method)
    queues = [context.Queue() for _ in range(2)]
    config = written(tmp_path)
    calls = [context.Process(target=call, args=(config, tmp_path / "out", queue)) for queue in queues]
    for process in calls:
        process.start()
    first, second = (made(queue.get(timeout=300)) for queue in queues)
    for process in calls:
        process.join()
        assert process.exitcode == 0
    assert first | second == NAMES
    assert not first & second
    assert first
    assert second
    assert numbers_of(tmp_path / "out") == undisturbed
    assert not left_over(tmp_path / "out")


@pytest.mark.slow
def test_ctrl_c_ends_all_workers_and_the_same_command_goes_on(undisturbed, tmp_path, forking, monkeypatch):
    config, output = written(tmp_path), tmp_path / "out"
    settle, stopped = pool._Schedule._settle, []

    def interrupted(self, finished):
        settle(self, finished)
        if len(stopped) == 2:
            stopped.extend(worker.process for worker in self.pool._places)
            raise KeyboardInterrupt
        stopped.append(finished)

    monkeypatch.setattr(pool._Schedule, "_settle", interrupted)
    shown = io.StringIO()
    given = [config, "--output", str(output), "--workers", "2"]
    with pytest.raises(SystemExit, match="130"):
        command.run(parse_config(given), given, console=Console(file=shown, width=160))
    assert "Interrupted: 3 of 11 runs are finished and kept in" in shown.getvalue()
    assert [process.is_alive() for process in stopped[2:]] == [False, False]
    assert not left_over(output)
    monkeypatch.undo()
    shown = compare(config, output)
    # The store is no name of the table's, and may have been the third that had ended.
    assert len(made(shown)) + ("store: " in shown) == 8
    assert numbers_of(output) == undisturbed


@pytest.mark.slow
def test_an_array_of_jobs_makes_the_table_bit_by_bit(undisturbed, tmp_path):
    config, output = written(tmp_path), tmp_path / "out"
    shown = compare(config, output, "--only", "[kd]", "--seeds", "[1]")
    assert made(shown) == {"teacher_1", "kd, seed 1"}
    assert "8 of 11 runs are left for other calls; the last one writes the report." in shown
    assert not (output / "results.csv").exists()
    assert made(compare(config, output, "--only", "[teacher_2]")) == {"teacher_2"}
    assert made(compare(config, output, "--only", "[ban]", "--seeds=[1]")) == {"ban, seed 1"}
    assert len(made(compare(config, output, "--only", "[ban, alone, ft]"))) == 6
    assert numbers_of(output) == undisturbed


class Failing(KDModule):
    """Fails in the second epoch of one seed."""

    fails = True

    def terms(self, batch):
        if self.fails and self.current_epoch == 1 and self.trainer.datamodule.order_seed == 1:
            raise RuntimeError("no such luck")
        return super().terms(batch)


@pytest.mark.slow
def test_a_run_that_fails_is_a_row_that_says_so_and_is_tried_again_if_asked_to(tmp_path, monkeypatch):
    def failing(config):
        config["methods"] = {
            "broken": {"class_path": f"{__name__}.Failing"},
            "after": {"class_path": "KDModule", "teachers": "broken"},
        }

    config, output = written(tmp_path, failing), tmp_path / "out"
    shown = compare(config, output)
    why = "broken, seed 1: RuntimeError: no such luck, in epoch 2 (error.txt in its folder tells more)"
    for text in (shown, (output / "results.md").read_text()):
        assert why in " ".join(text.split())
        assert "after, seed 1: broken, seed 1, from which it learns, has failed" in text
    assert 'raise RuntimeError("no such luck")' in (output / "runs/broken/seed_1/error.txt").read_text()
    lines = lines_of(output / "results.csv")
    assert {(line["method"], line["seed"]) for line in lines if line["test_accuracy"] == "nan"} == {
        ("broken", "1"), ("after", "1"),
    }  # fmt: skip
    monkeypatch.setattr(attempt, "execute", lambda *_: pytest.fail("made again"))
    compare(config, output)
    monkeypatch.undo()
    monkeypatch.setattr(Failing, "fails", False)
    shown = compare(config, output, "--retry")
    assert made(shown.replace("broken", "kd").replace("after", "ban")) == {"kd, seed 1", "ban, seed 1"}
    assert "nan" not in (output / "results.csv").read_text()
    assert not (output / "runs/broken/seed_1/error.txt").exists()


class FailingTeachers(SupervisedModule):
    """Fails for the larger networks, in the second epoch: what fails in its first step is refused before."""

    def terms(self, batch):
        if self.current_epoch and sum(value.numel() for value in self.student.parameters()) > 3000:
            raise RuntimeError("too large")
        return super().terms(batch)


@pytest.mark.slow
def test_the_rows_of_a_teacher_that_fails_say_so(tmp_path):
    def failing(config):
        config["supervised"] = {"class_path": f"{__name__}.FailingTeachers"}
        config.update(seeds=[0], epochs=2)

    compare(written(tmp_path, failing), tmp_path / "out")
    text = (tmp_path / "out/results.md").read_text()
    for line in (
        "teacher_1: RuntimeError: too large, in epoch 2",
        "kd, seed 0: teacher_1, from which it learns, has failed",
        "ban, seed 0: kd, seed 0, from which it learns, has failed",
    ):
        assert line in text
    alone = next(row for row in numbers_of(tmp_path / "out") if row["method"] == "alone")
    assert 0 <= float(alone["test_accuracy"]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--workers", "2"]])
def test_a_full_disk_is_one_line_and_the_next_call_goes_on(undisturbed, tmp_path, capsys, forking, arguments):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can make a small disk")
    try:
        given = ["compare", written(tmp_path), "--output", str(disk / "out"), *arguments]
        assert main(given) == 2
        error = capsys.readouterr().err
        assert re.search("the disk( of the store .*)? is full", error)
        assert "make room and call again" in error
        assert error.count("\n") == 1
        assert (disk / "out/runs/teacher_1/result.json").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert main(given) == 0
        assert numbers_of(disk / "out") == undisturbed
        assert "teacher_1:" not in capsys.readouterr().out
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("option", ["--anew", "--retry"])
def test_what_removes_results_is_refused_while_others_are_at_work(tmp_path, option):
    with pytest.raises(InputError, match=f"{option}: another call is at work in {tmp_path}: wait until it has ended"):
        refuse_others(option, SimpleNamespace(is_alone=False, folder=tmp_path))
    refuse_others(option, SimpleNamespace(is_alone=True, folder=tmp_path))
