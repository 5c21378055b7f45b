"""The benchmark of compare measures what it says it measures; how fast anything is decides no test."""

import json
from pathlib import Path

import pytest

from benchmarks import compare

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.exists(), reason="needs the Debian package dataset-fashion-mnist")
def test_sections_run_and_keep_what_others_have_measured(tmp_path, capsys):
    path = tmp_path / "compare.json"
    path.write_text(json.dumps({"ratios": {"other": 1.5}, "spread": {"other": [1.4, 1.6]}, "sections": {"other": {}}}))
    compare.main(["--small", "--clock", "cpu", "--output", str(path), "--only", "epochs", "filling"])
    content = json.loads(path.read_text())
    ratios = {f"{row}_reading_over_floor" for row in ("kd", "meal_v2", "feed")}
    ratios |= {"filling_over_running_outputs", "filling_over_running_outputs_and_features", "other"}
    assert content["ratios"].keys() == content["spread"].keys() == ratios
    section = content["sections"]["an epoch of rows that read the store"]
    assert "features float16" in section["note"]
    assert section["clock"] == "cpu"
    assert section["machine"]["threads"] == 1
    assert "Written: " in capsys.readouterr().out


def test_a_ratio_that_is_told_after_its_section_is_written(tmp_path, monkeypatch):
    def section(bench):
        bench.section("a table", [{"row": "x"}])
        bench.ratio("x_over_y", compare.Figure.of([2.0]))

    monkeypatch.setattr(compare, "SECTIONS", {"table": section})
    compare.main(["--output", str(tmp_path / "compare.json"), "--only", "table"])
    assert json.loads((tmp_path / "compare.json").read_text())["ratios"] == {"x_over_y": 2.0}
