"""The script behind benchmarks/results/compression/table.json, in small, and what it has written in full."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks import compression_table as table

RESULT = Path(table.__file__).parent / "results/compression/table.json"
NAMES = [condition.name for condition in table.conditions()]


def condition(name):
    return table.conditions()[NAMES.index(name)]


@pytest.fixture
def threads():
    """The script sets them for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small(tmp_path, *arguments):
    folders = ["--output", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    return table.main(["--small", "--seeds", "0", *folders, *arguments])


def zeros(network):
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def test_a_small_run_writes_its_rows_and_does_none_twice(tmp_path, threads, capsys):
    arguments = ["--networks", "lstm", "--only", "80% magnitude", "--only", "80% random"]
    content = small(tmp_path, *arguments)
    assert list(content["results"]["lstm"]) == ["dense", "80% magnitude", "80% random"]
    (dense,), (pruned,), _ = content["results"]["lstm"].values()
    assert dense["stored"] == dense["nonzero"] == pruned["stored"] == 41_674
    weights = 4 * 96 * (8 + 96) + 10 * 96
    assert pruned["nonzero"] == 41_674 - round(0.8 * weights)
    gate = content["gates"][0]
    assert (gate["network"], gate["limit"], len(content["gates"])) == ("lstm", 12, 1)
    assert gate["holds"] == (gate["found"] >= 12)
    page = (tmp_path / "out/table.md").read_text()
    assert "| 80% magnitude |" in page
    assert json.loads((tmp_path / "out/table.json").read_text()) == content
    # What is there is taken as it is; what was made with other settings is made again.
    path = tmp_path / "runs/lstm/80__magnitude-0.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"accuracy": 12.5}))
    capsys.readouterr()
    assert small(tmp_path, *arguments)["results"]["lstm"]["80% magnitude"][0]["accuracy"] == 12.5
    path.write_text(json.dumps(known | {"accuracy": 12.5, "settings": known["settings"] | {"dense_epochs": 3}}))
    again = small(tmp_path, *arguments)["results"]["lstm"]["80% magnitude"][0]
    assert again["accuracy"] == known["accuracy"]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lstm 0")]
    assert len(told) == 1


def test_the_test_images_are_540_that_nothing_is_trained_on():
    data = table.data_of(0, None)
    assert (len(data.train[1]), len(data.test[1])) == (1257, 540)
    assert data.train[0].shape[1:] == (1, 8, 8)
    assert data.train[0].mean() == pytest.approx(0, abs=1e-5)
    seen = {tuple(image.flatten().tolist()) for image in data.train[0]}
    assert not any(tuple(image.flatten().tolist()) in seen for image in data.test[0])
    assert not torch.equal(data.test[1], table.data_of(1, None).test[1])


def test_training_is_adam_under_a_cosine_over_whole_batches():
    data = table.data_of(0, 96)
    network = table.new_network("cnn", 3)
    expected = table.new_network("cnn", 3)
    table.train(network, data, epochs=range(2), rate=1e-3, batch_size=40, seed=5)
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(5)
    step = 0
    for _ in range(2):
        order = torch.randperm(96, generator=generator)
        for index in (order[:40], order[40:80]):
            rate = 1e-3 * (1 + torch.cos(torch.tensor(torch.pi * step / 4))) / 2
            optimizer.param_groups[0]["lr"] = float(rate)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(expected(data.train[0][index]), data.train[1][index])
            loss.backward()
            optimizer.step()
            step += 1
    for found, wanted in zip(network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["95% lottery ticket", "95% ticket's mask, new weights", "95% random mask, first weights"]
)
def test_tickets_begin_with_the_weights_that_they_are_named_after(name, monkeypatch):
    first, dense = table.new_network("lstm", 0), table.dense_network("lstm", 0, table.SMALL)
    kept = {}
    step = torch.optim.Adam.step

    def spying(self, *arguments, **options):
        if not kept:
            kept.update({number: p.detach().clone() for number, p in enumerate(self.param_groups[0]["params"])})
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", spying)
    network = table.compressed(condition(name), "lstm", dense, seed=0, settings=table.SMALL)
    assert zeros(network) == pytest.approx(0.95, abs=1e-4)
    weight, begun, began = dense.lstm.weight_hh_l0, kept[1], first.lstm.weight_hh_l0
    mask = begun != 0
    assert torch.equal(begun[mask], began[mask]) == (name != "95% ticket's mask, new weights")
    # Large weights of the dense network, or any.
    large = weight[mask].abs().mean() > 1.5 * weight.abs().mean()
    assert bool(large) == (name != "95% random mask, first weights")


def test_the_dense_network_stays_as_it_is_and_teaches_where_it_is_said():
    dense = table.dense_network("transformer", 0, table.SMALL)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    alone, taught = (
        table.compressed(condition(name), "transformer", dense, seed=0, settings=table.SMALL)
        for name in ("90% magnitude", "90% magnitude, taught by dense")
    )
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert not torch.equal(alone.head.weight, taught.head.weight)
    assert zeros(alone) == pytest.approx(zeros(taught)) == pytest.approx(0.9, abs=1e-3)


def test_remarks_are_of_beliefs_that_the_figures_deny():
    figures = {"cnn": {"80% movement": [1.0, 5.0], "80% magnitude": [2.0, 3.0], "90% movement": [2.0, 2.0]}}
    (told,) = table.remarks(figures)
    assert "does not hold with every seed here, cnn: 80% movement +0.5 points" in told
    assert "1 of 2 seeds" in told
    figures["cnn"]["90% magnitude"] = [1.0, 1.0]
    assert len(table.remarks(figures)) == 1
    figures["cnn"]["90% magnitude"] = [2.0, 2.5]
    assert 'movement beats magnitude" does not hold here, cnn: 90% movement -0.2 points' in table.remarks(figures)[1]


@pytest.mark.slow
def test_every_condition_runs(tmp_path, threads):
    results = small(tmp_path)["results"]
    assert set(results["cnn"]) == {"dense", *NAMES}
    of_all = {one.name for one in table.conditions() if len(one.networks) == 3}
    assert set(results["lstm"]) == set(results["transformer"]) == {"dense", *of_all}
    assert len(of_all) < len(NAMES)
    halves = results["cnn"]["channels -50% magnitude"][0]
    assert halves["stored"] == sum(p.numel() for p in table.SmallCNN(10, width=12).parameters())
    for rows in results.values():
        for share in (50, 25, 10):
            for what in ("SVD", "SVD of inner layers"):
                (factored,), (dense,) = rows[f"{what} to {share}% of parameters, not tuned"], rows["dense"]
                assert 0.85 * share < 100 * factored["stored"] / dense["stored"] <= share


def test_the_committed_table_is_whole_and_its_limits_are_those_of_the_script():
    content = json.loads(RESULT.read_text())
    results = content["results"]
    assert {row["seed"] for rows in results.values() for runs in rows.values() for row in runs} == {0, 1, 2}
    assert set(results["cnn"]) == {"dense", *NAMES}
    assert {"cpu", "threads", "torch", "date", "command"} <= content["about"].keys()
    assert len(content["gates"]) == len(table.GATES) == 7
    for gate in content["gates"]:
        better, worse = (
            statistics.fmean(run["accuracy"] for run in results[gate["network"]][gate[side]])
            for side in ("better", "worse")
        )
        assert gate["found"] == pytest.approx(better - worse)
        assert gate["holds"] == (better - worse >= gate["limit"])
    assert RESULT.with_suffix(".md").read_text() == table.markdown(content)
