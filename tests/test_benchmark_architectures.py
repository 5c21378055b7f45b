"""The script behind benchmarks/results/architectures.json, in small, and what it has written in full."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("torch_pruning")
pytest.importorskip("transformers")

from benchmarks import architectures, networks, pruned


class Tiny(nn.Module):
    def __init__(self, broken=""):
        super().__init__()
        self.one, self.two, self.broken = nn.Conv2d(3, 4, 1), nn.Conv2d(4, networks.CLASSES, 1), broken

    def forward(self, images):
        while self.broken == "hang":
            images = images + 1
        hidden = self.one(images)
        return self.two(hidden.softmax(1) if self.broken == "refuse" else hidden).mean((2, 3))


@pytest.mark.slow
def test_a_small_run_tells_how_each_network_ends_and_runs_only_what_it_has_to(tmp_path, monkeypatch, capsys):
    built = {name: (Tiny(name).eval(), (torch.randn(1, 3, 2, 2),)) for name in ("", "refuse", "hang")}
    monkeypatch.setattr(architectures, "SMALL", [*built, "missing"])
    monkeypatch.setattr(pruned, "build", built.__getitem__)
    given = ["--small", "--limit", "1", "--output", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    content = architectures.main(given)
    assert json.loads((tmp_path / "out/architectures.json").read_text()) == content
    ends = {name: [found[library]["status"] for library in architectures.LIBRARIES] for name, found in
            content["results"].items()}  # fmt: skip
    assert ends == {
        "": ["works", "works"], "refuse": ["refused", "silent change"], "missing": ["crashed", "crashed"],
        "hang": ["over the limit", "over the limit"],
    }  # fmt: skip
    # Of 4 channels 2 are left: 2 * 4 weights with biases before, and 2 * 13 after beside 13 biases.
    assert content["results"][""]["ours"]["parameters"] == (2 * 4 + 2 * 13 + 13) / (4 * 4 + 4 * 13 + 13)
    assert content["results"][""]["ours"]["macs"] == 0.5
    page = (tmp_path / "out/architectures.md").read_text()
    assert "- refuse: Tiny has no channels that can be removed" in page
    for line in (
        "| works | 1 | 1 |",
        "| silent change | 0 | 1 |",
        "| works, and the other does not even run | 0 | 0 |",
        "leaves over a point more parameters, of 1 where ours works and Torch-Pruning runs | 0 | 0 |",
        "## What Torch-Pruning does and ours does not\n\n- refuse: silent change, 0.58 of the parameters left\n",
        "- command: python -m benchmarks.architectures --limit 1 --small\n",
    ):
        assert line in page
    monkeypatch.setattr(architectures, "measure", lambda *_, **__: {"status": "measured again"})
    again = architectures.main([*given, "--again", "refused"])["results"]
    assert again["refuse"]["ours"]["status"] == "measured again"
    assert again["missing"] == content["results"]["missing"]


def test_where_ours_leaves_more_is_told():
    def row(parameters, status="works"):
        return {"status": status, "parameters": parameters, "macs": 0.5, "seconds": 1}

    results = {
        "timm a": {"ours": row(0.5), "torch_pruning": row(0.25, "silent change")},
        "timm b": {"ours": row(0.5), "torch_pruning": row(0.495)},
        "timm c": {"ours": row(0.5), "torch_pruning": {"status": "crashed", "why": "of what it says " * 99}},
        "transformers d": {"ours": row(0.2), "torch_pruning": row(0.4)},
    }
    page = architectures.markdown({"about": {}, "results": results})
    assert "more of the parameters\n\n- timm a: 0.50, Torch-Pruning 0.25\n\n##" in page
    assert "of 3 where ours works and Torch-Pruning runs | 1 | 1 |" in page
    assert "| works, of the 3 of torchvision and timm | 3 | 1 |" in page
    assert "| works, and the other does not even run | 1 | 0 |" in page
    assert " ...\n" in page


def test_masked_and_removed_are_compared_by_the_largest_output():
    one, other = Tiny(), Tiny()
    other.load_state_dict(one.state_dict())
    inputs = (torch.randn(1, 3, 2, 2),)
    assert pruned._difference(one, other, inputs) == 0
    with torch.no_grad():
        other.two.bias[3] += 0.5
        largest = one(*inputs).abs().max()
    assert pruned._difference(one, other, inputs) == pytest.approx(0.5 / largest.item(), rel=1e-4)
    other.two = nn.Conv2d(4, 5, 1)
    assert pruned._difference(one, other, inputs) == float("inf")


def test_the_names_are_built_from_no_weights():
    assert len([name for name in networks.NAMES if not name.startswith("transformers")]) == 118
    assert len(set(networks.NAMES)) == len(networks.NAMES)
    network, inputs = networks.build("transformers bert")
    assert network(*inputs).logits.shape == (2, networks.CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_0"])
def test_both_leave_as_much_of_what_both_know_whole(name):
    ours, theirs = pruned.prune(f"torchvision {name}"), pruned.prune_with_torch_pruning(f"torchvision {name}")
    assert ours["status"] == theirs["status"] == "works"
    assert ours["parameters"] == theirs["parameters"] < 0.27
    assert ours["macs"] == theirs["macs"] < 0.32
