"""The throughput benchmark measures what it says it measures; how fast anything is decides no test."""

import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distill_lightning import SupervisedModule
from distill_lightning.testing import TinyDataModule, TinyNet

pytest.importorskip("pytorchcv")

from benchmarks import contestants, growth, throughput, timing, views

RESULT = Path(throughput.__file__).parent / "results/throughput.json"
RATIOS = {
    "trainer_over_bare", "self_kd_stored_over_supervised", "kd_store_over_supervised_5_teachers",
    "meal_v2_store_over_supervised_5_teachers", "kd_store_fast_over_bare", "feed_store_over_floor_5_teachers",
    "record_over_inference", "bytes_per_sample_view_top10_of_1000", "peer_online_over_feed_store_5_teachers",
    "peer_online_over_meal_v2_store_5_teachers", "data_over_student_appetite",
}  # fmt: skip


def test_a_figure_is_the_median_and_the_quartiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert timing.Figure.of(values) == (3.0, 2.0, 4.0)
    assert timing.Figure.of([7.0]) == (7.0, 7.0, 7.0)
    many = [float((7 * number) % 101) for number in range(101)]
    assert timing.Figure.of(many).median == statistics.median(many)


def test_contestants_take_turns_forth_and_back_and_the_warm_up_does_not_count():
    order, clock = [], iter(range(100))

    def turn(name):
        return lambda: (order.append(name), float(next(clock)))[1]

    measured = timing.take_turns({name: turn(name) for name in "abc"}, rounds=3, warm_up=1)
    assert "".join(order) == "cba" + "abc" + "cba" + "abc"
    assert measured == {"a": [3.0, 8.0, 9.0], "b": [4.0, 7.0, 10.0], "c": [5.0, 6.0, 11.0]}


def test_a_ratio_is_taken_round_by_round():
    # The machine was twice as slow in the second round, for both.
    assert timing.ratio([1.0, 2.0, 1.1], [2.0, 4.0, 2.0]).median == 0.5


def test_the_first_steps_of_a_fit_are_not_measured(monkeypatch):
    now = [0.0]

    class Slow(SupervisedModule):
        def terms(self, batch):
            # The first two steps take an hour each.
            now[0] += 3600.0 if self.trainer.global_step < 2 else 2.0
            return super().terms(batch)

    monkeypatch.setattr(contestants, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    module = Slow(TinyNet(), num_classes=3)
    # 24 images in batches of 4: 6 steps.
    assert contestants.trained(module, TinyDataModule(batch_size=4))() == 2.0


def test_the_plain_loop_has_the_same_batches_and_as_many_steps():
    data = TinyDataModule(batch_size=4)
    data.setup()
    seen = []
    contestants.looped(lambda images, labels: seen.append((images, labels)), data)()
    assert len(seen) == 6
    expected = list(data.train_dataloader())
    assert all(torch.equal(images, batch.input) for (images, _), batch in zip(seen, expected, strict=True))
    assert all(torch.equal(labels, batch.target) for (_, labels), batch in zip(seen, expected, strict=True))


def test_a_store_of_ten_of_a_thousand_classes_takes_what_its_files_take(tmp_path):
    found = growth.reads(tmp_path, samples=2000, classes=1000, top_k=10, rounds=1)
    files = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert found["bytes"] == files / 2000
    # 10 probabilities and 10 classes of 2 bytes each, a byte that says that they are known, and a header for all.
    assert 41 <= found["bytes"] < 45


def test_the_goal_is_reached_in_the_first_epoch_that_is_as_good():
    curve = [(1.0, 0.5), (2.0, 0.8), (3.0, 0.7), (4.0, 0.9)]
    assert views._seconds_until(0.7, curve) == 2.0
    assert views._seconds_until(0.95, curve) == float("inf")


@pytest.mark.slow
def test_sections_run_and_are_written(tmp_path, capsys):
    path = tmp_path / "throughput.json"
    sections = ["features", "data_path", "recording", "reads", "growth", "wall_clock"]
    throughput.main(["--small", "--output", str(path), "--only", *sections])
    content = json.loads(path.read_text())
    assert len(content["sections"]) == len(sections) + 1
    assert content["ratios"].keys() == content["spread"].keys()
    assert content["machine"]["torch"] == torch.__version__
    assert {"record_over_inference", "data_over_student_appetite"} <= content["ratios"].keys()
    assert all(low <= content["ratios"][name] <= high for name, (low, high) in content["spread"].items())
    assert "Written: " in capsys.readouterr().out


def test_the_committed_result_has_every_ratio_with_its_spread():
    content = json.loads(RESULT.read_text())
    assert content["ratios"].keys() >= RATIOS
    assert content["ratios"].keys() == content["spread"].keys()
    assert all(low <= content["ratios"][name] <= high for name, (low, high) in content["spread"].items())
    assert {"python", "torch", "pytorch-lightning", "cpu", "threads"} <= content["machine"].keys()


def test_the_readme_quotes_the_committed_result():
    content = json.loads(RESULT.read_text())
    readme = (RESULT.parents[2] / "README.md").read_text()
    for name in RATIOS - {"data_over_student_appetite", "bytes_per_sample_view_top10_of_1000"}:
        low, high = content["spread"][name]
        assert f"| {content['ratios'][name]:.2f} ({low:.2f} to {high:.2f}) |" in readme, name
    for name in ("data_over_student_appetite", "bytes_per_sample_view_top10_of_1000"):
        assert f"| {content['ratios'][name]:.0f} |" in readme, name
    (section,) = [rows for name, rows in content["sections"].items() if name.startswith("g.")]
    for row in section["rows"]:
        assert f"{row['test_accuracy']:.1f} ± {row['sd']:.1f}" in readme
