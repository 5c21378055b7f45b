"""The report's numbers and claims follow from its stages; the tests recompute them by hand."""

import csv
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill_lightning import InputError
from distill_lightning.compression.costs.macs import DEFINITION
from distill_lightning.compression.report.claims import claim_of
from distill_lightning.compression.report.report import Report, circumstances
from distill_lightning.compression.report.stage import CONTROL_RANDOM, CONTROL_SCRATCH, LatencyRow, Stage


def row(ratio, low, high, *, batch=32, runtime="torch", baseline=None):
    times = [2.0] * 5 + [2.1], [2 * ratio] * 5 + [2.1 * ratio]
    return LatencyRow(
        batch, runtime, baseline or runtime, 2.0, 2 * ratio, ratio, low, high, ratio, low, high, "-", *times
    )


def stage(name="final", kind="after", *, accuracy=0.9, size=250, **options):
    given = {
        "parameters": 1000, "nonzero": 900, "macs": 5000, "effective_macs": 4500,
        "nbytes": {"artefact": size, "state_dict": size + 10}, **options,
    }  # fmt: skip
    return Stage(name, kind, {"accuracy": accuracy, "nll": 1 - accuracy}, **given)


def dense(accuracy=0.95, **options):
    return stage("dense", "dense", accuracy=accuracy, size=1000, nonzero=1000, effective_macs=5000, **options)


# claims


def test_a_saving_of_bytes_and_time_is_claimed_with_its_interval():
    fast = stage(latency=[row(0.48, 0.46, 0.50)])
    assert claim_of(dense(), fast) == "0.25 of the artefact; 0.48 [0.46, 0.50] of the time at batch 32"
    assert claim_of(dense(), dense()) == "the baseline"


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.1), (0.9, 1.0), (1.0, 1.1), (0.97, 0.985), (1.015, 1.03)])
def test_an_interval_that_holds_1_or_comes_as_near_as_equal_networks_is_no_speed_up(low, high):
    claim = claim_of(dense(), stage(latency=[row(0.97, low, high)]))
    expected = f"no measured speed-up at batch 32 (0.97 [{low:.2f}, {high:.2f}])"
    assert claim == f"storage only: 0.25 of the artefact; {expected}"


def test_every_batch_size_is_spoken_of_and_slower_is_called_slower():
    rows = [row(1.3, 1.2, 1.4, batch=1), row(0.5, 0.4, 0.6)]
    claim = claim_of(dense(), stage(latency=rows))
    assert claim == (
        "0.25 of the artefact; slower at batch 1: 1.30 [1.20, 1.40]; 0.50 [0.40, 0.60] of the time at batch 32"
    )
    assert claim_of(dense(), stage(latency=rows[:1])).startswith("storage only: 0.25 of the artefact; slower")
    # No saving of any kind: nothing of storage.
    grown = claim_of(dense(), stage(size=1500, latency=rows[:1]))
    assert grown == "no smaller (1.50 of the artefact); slower at batch 1: 1.30 [1.20, 1.40]"


def test_few_bits_save_storage_only_even_where_the_network_got_faster():
    slow = claim_of(dense(), stage(size=63, weight_bits=2, latency=[row(1.0, 0.9, 1.1)]))
    assert slow.startswith("0.063 of the artefact; no measured speed-up")
    assert slow.endswith("; no kernel here uses 2-bit weights: storage only")
    fast = claim_of(dense(), stage(size=63, weight_bits=2, latency=[row(0.5, 0.4, 0.6)]))
    assert fast.endswith("0.50 [0.40, 0.60] of the time at batch 32; no kernel here uses 2-bit weights: they save "
                         "storage only")  # fmt: skip
    assert "kernel" not in claim_of(dense(), stage(weight_bits=8, latency=[row(0.5, 0.4, 0.6)]))


def test_a_runtime_is_compared_with_itself_and_named():
    before = dense()
    before.nbytes["onnx"] = 2000
    rows = [
        row(1.0, 0.9, 1.1), row(0.8, 0.7, 0.9, runtime="onnxruntime"),
        row(0.1, 0.1, 0.1, runtime="onnxruntime", baseline="torch"),
        row(0.3, 0.2, 0.4, runtime="onnxruntime int8", baseline="onnxruntime"),
        row(0.1, 0.1, 0.1, runtime="onnxruntime int8", baseline="torch"),
    ]  # fmt: skip
    after = stage(latency=rows, nbytes={"artefact": 250, "onnx": 2000, "onnx_int8": 600})
    claim = claim_of(before, after)
    assert claim == (
        "0.25 of the artefact; no measured speed-up at batch 32 (1.00 [0.90, 1.10]); 0.80 [0.70, 0.90] of the "
        "time at batch 32 in ONNX Runtime; int8: 0.30 of the ONNX file; 0.30 [0.20, 0.40] of the time at batch 32 in "
        "ONNX Runtime int8"
    )
    report = Report({0: [before, after]})
    assert column(report, "time, batch 32")["final"] == (
        "1.00 [0.90, 1.10], ONNX Runtime 0.80 [0.70, 0.90], ONNX Runtime int8 0.30 [0.20, 0.40]"
    )
    assert [line[2:4] for line in report.latency_rows()[1:]] == [
        ["torch", "torch"], ["onnxruntime", "onnxruntime"], ["onnxruntime", "torch"],
        ["onnxruntime int8", "onnxruntime"], ["onnxruntime int8", "torch"],
    ]  # fmt: skip
    (line,) = (line for line in report.lines() if line["stage"] == "final")
    assert line["onnxruntime to onnxruntime, batch 32: ratio"] == 0.8
    assert line["onnxruntime int8 to onnxruntime, batch 32: ratio"] == 0.3
    labels = report.figures()["latency.png"].axes[0].get_xticklabels()
    assert [label.get_text().split(",")[0] for label in labels] == ["PyTorch", "ONNX Runtime", "ONNX Runtime int8"]


def test_what_was_not_measured_is_said_with_its_reason():
    missing = {"artefact": "no codec\nfor it", "latency": "not asked for"}
    bare = stage(nbytes={}, missing=missing)
    assert claim_of(dense(), bare) == "file not measured: no codec for it; time not measured: not asked for"
    by_state_dict = stage(nbytes={"state_dict": 505}, missing=missing)
    assert claim_of(dense(), by_state_dict).startswith("0.50 of the state dict; time not measured")


# the table


def three_seeds():
    accuracies = {0: (0.90, 0.80), 1: (0.94, 0.90), 2: (0.98, 0.88)}
    return {
        seed: [
            stage(CONTROL_SCRATCH, "control", accuracy=after - 0.1),
            dense(before),
            stage(
                "1 PruneWeights, before fine-tuning",
                "before",
                accuracy=after - 0.2,
                missing={"latency": "see 1 PruneWeights"},
            ),
            stage("1 PruneWeights", accuracy=after, size=250 + 5 * seed, latency=[row(0.5, 0.4, 0.6)]),
            stage(accuracy=after, latency=[row(1.0, 0.9, 1.1), row(0.5, 0.4, 0.6, batch=1)]),
        ]
        for seed, (before, after) in accuracies.items()
    }


def column(report, title):
    header, *body = report.rows()
    return {line[0]: line[header.index(title)] for line in body}


def test_rows_are_dense_steps_final_and_controls_and_those_not_run_say_so():
    report = Report(three_seeds())
    names = [line[0] for line in report.rows()[1:]]
    assert names == [
        "dense",
        "1 PruneWeights, before fine-tuning",
        "1 PruneWeights",
        "final",
        CONTROL_SCRATCH,
        CONTROL_RANDOM,
    ]
    assert report.rows()[-1][1] == report.rows()[-1][-1] == "not run"
    assert report.claim(CONTROL_RANDOM) == "not run"
    assert all(len(line) == len(report.header()) for line in report.rows())


def test_scores_are_means_over_seeds_and_differences_are_paired():
    report = Report(three_seeds())
    scores = column(report, "accuracy % (higher is better)")
    assert scores["dense"] == "94.00 ± 4.00 (n=3)"
    assert scores["1 PruneWeights"] == f"86.00 ± {100 * statistics.stdev([0.8, 0.9, 0.88]):.2f} (n=3)"
    gaps = [0.8 - 0.9, 0.9 - 0.94, 0.88 - 0.98]
    expected = f"{100 * statistics.fmean(gaps):+.2f} ± {100 * statistics.stdev(gaps):.2f} (n=3)"
    assert column(report, "to dense")["1 PruneWeights"] == expected
    assert column(report, "to dense")["dense"] == ""
    assert report.differences("1 PruneWeights") == pytest.approx(gaps)
    assert report.scores("final", "nll") == pytest.approx([0.2, 0.1, 0.12])


def test_sizes_are_the_first_seeds_and_a_note_tells_where_others_differ():
    report = Report(three_seeds())
    assert column(report, "bytes")["1 PruneWeights"] == "250 (0.25)"
    assert column(report, "parameters")["dense"] == "1,000 (1.00)"
    assert column(report, "not zero")["final"] == "900 (0.90)"
    differing = "1 PruneWeights: state dict bytes from 260 to 270, artefact bytes from 250 to 260 over the seeds"
    assert differing in report.notes()
    assert not [note for note in report.notes() if note.startswith("final")]


def test_times_stand_in_a_column_for_each_batch_size_with_a_reason_where_there_is_none():
    report = Report(three_seeds())
    assert report.batch_sizes() == [1, 32]
    times = column(report, "time, batch 32")
    assert times["1 PruneWeights"] == "0.50 [0.40, 0.60]"
    assert times["dense"] == "1"
    assert times["1 PruneWeights, before fine-tuning"] == "see 1 PruneWeights"
    assert column(report, "time, batch 1")["1 PruneWeights"] == "not measured"
    assert column(report, "claim")["final"].startswith("0.25 of the artefact; no measured speed-up at batch 32")


def test_the_terminals_table_has_ratios_and_the_number_of_seeds():
    stages = three_seeds()
    final = next(place for place, stage in enumerate(stages[0]) if stage.name == "final")
    onnx = replace(row(0.3, 0.2, 0.4), runtime="onnxruntime", baseline="onnxruntime")
    int8 = replace(row(0.2, 0.1, 0.3), runtime="onnxruntime int8", baseline="onnxruntime")
    stages[0][final] = replace(stages[0][final], latency=[*stages[0][final].latency, onnx, int8])
    header, *body = Report(stages).brief_rows()
    assert header[1] == "accuracy %"
    assert Report(stages).caption().startswith("accuracy: mean ± standard deviation of 3 seeds, higher is better")
    assert header[-1] == "time, batch 32"
    told = {line[0]: dict(zip(header, line, strict=True)) for line in body}
    assert "(n=3)" in Report(stages).rows()[1][1]
    assert not [line for line in body if "(n=" in line[1] + line[2]]
    assert [told["dense"][name] for name in ("parameters", "MACs", "bytes")] == ["1,000", "5,000", "1,000"]
    assert told["1 PruneWeights"]["bytes"] == "250 (0.25)"
    assert told["final"]["not zero"] == "0.90"
    assert told["final"]["time, batch 32"].endswith("\nONNX 0.30 [0.20, 0.40]\nONNX int8 0.20 [0.10, 0.30]")
    assert told["1 PruneWeights, before fine-tuning"]["time, batch 32"] == ""
    assert told["control: random criterion"]["MACs"] == ""
    narrow, *lines = Report(stages).brief_rows(narrow=True)
    assert narrow == [name for name in header if name not in ("to dense", "epochs")]
    assert [line[-1] for line in lines if line[0] == "final"] == ["1.00\nONNX\n0.30\nONNX\nint8\n0.20"]


def test_a_seed_that_lacks_a_row_or_has_no_finite_score_does_not_hide():
    stages = three_seeds()
    stages[1] = stages[1][:-1]
    stages[2][3].scores["accuracy"] = math.nan
    report = Report(stages)
    scores = column(report, "accuracy % (higher is better)")
    assert scores["final"].endswith("(n=2)")
    assert scores["1 PruneWeights"] == "not finite in 1 of 3"
    assert "final: 2 of 3 seeds" in report.notes()
    assert report.differences("final") == pytest.approx([-0.1, -0.1])


def test_one_seed_has_no_deviation_and_another_metric_no_percent():
    report = Report(
        {7: [dense(), stage(missing={"artefact": "a | b"}, nbytes={})]}, metric="nll", higher_is_better=False
    )
    scores = column(report, "nll (lower is better)")
    assert scores["dense"] == "0.050"
    assert column(report, "to dense")["final"] == "+0.050"
    assert column(report, "bytes")["final"] == "a | b"
    # A bar in a reason makes no further column.
    lines = [line for line in report.markdown().splitlines() if line.startswith("| final |")]
    assert "a &#124; b" in lines[0]
    assert lines[0].count("|") == len(report.header()) + 1


def with_int8():
    """Stages of a dense and a final network, each with an int8 file that was scored."""
    before, after = dense(), stage(latency=[row(0.5, 0.4, 0.6), row(0.8, 0.7, 0.9, runtime="onnxruntime")])
    for one, size in ((before, 2000), (after, 500)):
        one.nbytes.update(onnx=size, onnx_int8=size // 4)
        one.differences.update(onnx=1e-6, onnx_int8=0.125)
    after.latency.append(row(0.3, 0.2, 0.4, runtime="onnxruntime int8", baseline="onnxruntime"))
    return [
        part
        for one, accuracy in ((before, 0.94), (after, 0.85))
        for part in (one.without_int8(), one.in_int8({"accuracy": accuracy, "nll": 0.3}))
    ]


def test_an_int8_file_has_a_row_of_its_own_beside_the_network_it_was_made_of(tmp_path):
    report = Report({0: with_int8()})
    assert report.names[:4] == ["dense", "dense, int8 ONNX", "final", "final, int8 ONNX"]
    assert column(report, "accuracy % (higher is better)")["final, int8 ONNX"] == "85.00"
    assert column(report, "to dense")["final, int8 ONNX"] == "-10.00"
    assert column(report, "bytes")["final, int8 ONNX"] == "125 (0.062), ONNX int8"
    assert column(report, "time, batch 32")["final, int8 ONNX"] == "ONNX Runtime int8 0.30 [0.20, 0.40]"
    assert "int8" not in column(report, "time, batch 32")["final"] + report.claim("final")
    assert report.claim("final, int8 ONNX") == (
        "int8: 0.062 of the ONNX file; 0.30 [0.20, 0.40] of the time at batch 32 in ONNX Runtime int8"
    )
    files = {line[0]: dict(zip(report.file_rows()[0], line, strict=True)) for line in report.file_rows()[1:]}
    assert files["final"]["ONNX int8"] == "see final, int8 ONNX"
    assert files["final, int8 ONNX"]["ONNX int8"] == "125 (0.062)"
    assert files["final, int8 ONNX"]["artefact"] == ""
    # The figures say what dense is, and show the int8 files where they are of the same kind.
    figures = report.figures()
    panels = {
        axes.get_xlabel(): {bar.get_label(): bar.lines[0].get_xdata()[0] for bar in axes.containers}
        for axes in figures["pareto.png"].axes
    }
    assert panels["bytes of the artefact"] == {"dense (float)": 1000, "final": 250}
    assert panels["bytes of the ONNX file"] == {
        "dense (float)": 2000, "dense, int8 ONNX": 500, "final": 500, "final, int8 ONNX": 125,
    }  # fmt: skip
    latency = figures["latency.png"].axes[0]
    assert [text.get_text() for text in latency.get_legend().get_texts()] == ["dense (float)", "compressed"]
    assert len(latency.get_xticklabels()) == 3


def test_the_epochs_of_each_row_are_told():
    stages = [
        replace(dense(), epochs=3, earlier=30), replace(stage(), epochs=9, earlier=30),
        replace(stage(CONTROL_SCRATCH, "control"), epochs=39), replace(stage(CONTROL_RANDOM, "control"), earlier=None),
    ]  # fmt: skip
    report = Report({0: stages})
    told = {"dense": "30 + 3", "final": "30 + 9", CONTROL_SCRATCH: "39", CONTROL_RANDOM: "not noted"}
    assert column(report, "epochs") == told
    stages[-1] = replace(stages[-1], epochs=9)
    report = Report({0: stages})
    assert column(report, "epochs") == told | {CONTROL_RANDOM: "? + 9"}
    header, *body = report.brief_rows()
    assert {line[0]: line[header.index("epochs")] for line in body} == told | {CONTROL_RANDOM: "? + 9"}
    assert report.epochs_line() == (
        "epochs: dense 30 + 3; final 30 + 9; control: same size from scratch 39; control: random criterion ? + 9"
    )
    assert [(line["epochs"], line["epochs before"]) for line in report.lines()] == [
        (3, 30),
        (9, 30),
        (39, 0),
        (9, None),
    ]
    assert "?: nobody knows how many" in report.markdown()


def test_a_report_of_an_earlier_version_is_read():
    path = Path(__file__).parents[2] / "benchmarks/results/compression/deep_compression_cnn/report.json"
    told = json.loads(path.read_text())
    stages = {int(seed): [Stage.of_plain(plain) for plain in plains] for seed, plains in told["stages"].items()}
    report = Report(stages)
    kept = (path.parent / "report.md").read_text()
    if not report.tells_epochs:
        assert "epochs" not in report.header()
        assert all(f"| {' | '.join(line)} |" in kept for line in report.rows())
    assert {"pareto.png", "codebook.png", "sparsity.png"} <= set(report.figures())


# the files


@pytest.mark.slow
def test_markdown_csv_and_json_hold_all_of_it(tmp_path):
    stages = three_seeds()
    stages[0][3] = replace(
        stages[0][3], uncounted=["odd.layer"], notes=["two of three layers"], differences={"onnx": 2e-6},
        missing={"onnx_int8": "no kernel"}, nbytes={**stages[0][3].nbytes, "onnx": 800},
    )  # fmt: skip
    stages[0][4].nbytes["onnx_int8"] = 210
    for stage_ in stages[0][1], stages[0][4]:
        stage_.nbytes["onnx"] = 840
    stages[2][3].scores["nll"] = math.inf
    report = Report(stages, about={"command": "compress x.yaml", "date": "2026-11-23", "threads": 1})
    paths = report.write(tmp_path / "new")
    names = ["report.md", "report.csv", "report.json", "figures/pareto.png", "figures/latency.png"]
    assert [str(path.relative_to(tmp_path / "new")) for path in paths] == names
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths[3:])
    text = paths[0].read_text()
    for part in (
        "- command: compress x.yaml", "- date: 2026-11-23", DEFINITION, "1 PruneWeights: two of three layers",
        "1 PruneWeights: MACs leave out odd.layer", "1 PruneWeights: onnx_int8 not measured: no kernel", "ONNX 2.0e-06",
        "seeds 0, 1, 2", "| 840 (1.00) | 210 (0.25) |", "## Files", "## Times", "## Scores", "800",
    ):  # fmt: skip
        assert part in text
    with paths[1].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 15
    first = lines[3]
    assert (first["seed"], first["stage"], first["score accuracy"]) == ("0", "1 PruneWeights", "0.8")
    assert (first["bytes artefact"], first["bytes onnx"], lines[8]["bytes onnx"]) == ("250", "800", "")
    assert first["torch to torch, batch 32: ratio"] == "0.5"
    assert first["claim"] == claim_of(stages[0][1], stages[0][3])
    assert list(first)[-2:] == ["claim", "missing"]
    content = json.loads(paths[2].read_text())
    assert content["macs"] == DEFINITION
    assert content["claims"]["1 PruneWeights"] == report.claim("1 PruneWeights")
    found = {seed: [Stage.of_plain(entry) for entry in entries] for seed, entries in content["stages"].items()}
    assert found["0"] == stages[0]
    # JSON has no infinity.
    assert found["2"][3].scores["nll"] == "inf"


def test_the_figure_shows_scores_against_bytes_macs_and_milliseconds():
    stages = three_seeds()
    # The machine was three times as slow in this stage, for both.
    stages[0][3] = replace(stages[0][3], latency=[replace(row(0.5, 0.4, 0.6), dense_ms=6.0, compressed_ms=3.0)])
    figures = Report(stages).figures()
    panels = {
        axes.get_xlabel(): {bar.get_label(): bar.lines[0].get_xdata()[0] for bar in axes.containers}
        for axes in figures["pareto.png"].axes
    }
    assert list(panels) == ["bytes of the artefact", "MACs of a sample", "ms, batch of 32"]
    assert panels["bytes of the artefact"]["1 PruneWeights"] == 250
    assert panels["MACs of a sample"]["dense (float)"] == 5000
    # Median of 2 and 6 ms.
    assert panels["ms, batch of 32"] == pytest.approx({"dense (float)": 4, "1 PruneWeights": 2, "final": 4})
    assert len(figures["latency.png"].axes[0].get_xticklabels()) == 2
    untimed = Report({0: [dense(), stage(nbytes={"state_dict": 5})]}).figures()
    assert list(untimed) == ["pareto.png"]
    assert untimed["pareto.png"].axes[0].get_xlabel() == "bytes of the state dict"


def test_the_machine_is_described_without_a_date():
    about = circumstances()
    assert about["torch"] == torch.__version__
    assert about["threads"] == torch.get_num_threads()
    assert about["quantized engine"] == torch.backends.quantized.engine
    assert about["cpu"]
    assert "date" not in about


def test_stages_that_make_no_report_are_refused():
    with pytest.raises(InputError, match="at least one seed"):
        Report({})
    with pytest.raises(InputError, match="seed 3 has no stage 'dense'"):
        Report({3: [stage()]})
    with pytest.raises(InputError, match="seed 3 has two stages 'final'"):
        Report({3: [dense(), stage(), stage()]})
    with pytest.raises(InputError, match="stage 'dense' of seed 3 has no score 'perplexity'"):
        Report({3: [dense()]}, metric="perplexity")
