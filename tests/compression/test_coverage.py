"""What the report says of the weights that a step leaves out: which layers, and why."""

import pytest
import torch
from torch import nn

from distill_lightning.compression import (
    Compressor,
    HashShare,
    LearnMask,
    LowRank,
    Movement,
    PruneUnits,
    PruneWeights,
    Quantize,
    Regularise,
    ShareWeights,
)
from distill_lightning.errors import InputError


class Mixed(nn.Module):
    """Layers of several kinds, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6, padding_idx=0)
        self.position = nn.Parameter(torch.randn(5, 6))
        self.first, self.middle, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, tokens):
        hidden = (self.embed(tokens) + self.position).mean(1)
        return self.last(self.middle(self.first(hidden).relu()).relu())


SIZES = {"embed": 60, "position": 30, "first": 96, "middle": 256, "last": 48}
TOKENS = torch.randint(1, 10, (8, 5), generator=torch.Generator().manual_seed(0))
BATCHES = [(TOKENS, torch.arange(8) % 3)]
OWN = "position (a parameter of Mixed, no layer's weight)"


def share(*left):
    return f"{1 - sum(SIZES[name] for name in left) / sum(SIZES.values()):.0%} of Mixed's weights"


def notes(*steps):
    torch.manual_seed(0)
    compressor = Compressor(Mixed(), steps, TOKENS, batches=BATCHES)
    compressor.apply()
    return compressor.piece.notes


@pytest.mark.parametrize(
    ("step", "left", "told"),
    [
        (PruneWeights(amount=0.5), ["position"], OWN),
        (PruneWeights(amount=0.5, exclude=["embed", "last"]), ["position", "embed", "last"],
         f"{OWN}; embed, last (excluded)"),
        (PruneWeights(granularity="2:4"), ["position", "embed", "first"],
         f"{OWN}; embed, first (only layers whose inputs are a multiple of 4 are pruned so)"),
        (PruneWeights(amount=0.5, criterion="obs"), ["position", "embed"],
         f"{OWN}; embed (only Linear and Conv2d layers that run as modules are pruned so)"),
        (ShareWeights(k=4, exclude="Embedding"), ["position", "embed"], f"{OWN}; embed (excluded)"),
        (HashShare(ratio=4), ["position", "embed"],
         f"{OWN}; embed (it is an embedding with a padding row, which would not stay zero)"),
        (LowRank(rank=2, method="svd", exclude="last"), ["position", "last"], f"{OWN}; last (excluded)"),
        (Quantize(exclude="last"), ["position", "last"], f"{OWN}; last (excluded)"),
        (Regularise(penalty="l1", weight=1e-4, finetune_epochs=1), ["position"], OWN),
        (LearnMask(Movement(amount=0.5), finetune_epochs=1), ["position"], OWN),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list | str) else None,
)  # fmt: skip
def test_the_layers_that_are_left_out_are_named_with_the_reason(step, left, told):
    torch.manual_seed(0)
    compressor = Compressor(Mixed(), [step], TOKENS, batches=BATCHES, epochs=step.finetune_epochs)
    compressor.begin_epoch(0, steps_per_epoch=1)
    assert f"{step.title} works on {share(*left)}, not on {told}" in compressor.piece.notes


def test_weights_of_an_earlier_step_are_the_reason():
    told = notes(ShareWeights(k=4, targets="first"), Quantize())
    expected = f"Quantize symmetric 8 bit works on {share('position', 'first')}, not on "
    (note,) = (note for note in told if note.startswith(expected))
    assert "first (shared, quantized or masked already)" in note


def test_channels_that_stay_are_named():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    step = PruneUnits(unit="channel", amount=0.5, exclude="0")
    compressor = Compressor(
        network, [step], torch.rand(2, 1, 8, 8), batches=[(torch.rand(2, 1, 8, 8), torch.arange(2))]
    )
    compressor.apply()
    covered = 8 * 8 * 9 + 8 * 3
    share = covered / (covered + 8 * 9)
    assert f"PruneUnits channel works on {share:.0%} of Sequential's weights, not on 0 (excluded)" in (
        compressor.piece.notes
    )


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.last = nn.Linear(8, 3)

    def forward(self, images):
        hidden = self.second(self.first(images).relu()).cumsum(1)
        return self.last(self.third(hidden).relu().mean((2, 3)))


def test_layers_that_lose_inputs_only_are_named_too():
    torch.manual_seed(0)
    compressor = Compressor(Summed(), [PruneUnits(unit="channel", amount=0.5)], torch.rand(2, 1, 8, 8))
    compressor.apply()
    (note,) = (note for note in compressor.piece.notes if "works on" in note)
    assert note.startswith(
        "PruneUnits channel works on 99% of Summed's weights, only in part on second (its channels stay"
    )


def test_a_refusal_names_some_of_many():
    network = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(20)), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"out 0, 1, 2, 3, 4, 5, 6, 7 and 12 others \(only Linear are factored\)$"):
        Compressor(network, [LowRank(rank=1, method={"Linear": "svd"})], torch.rand(2, 4, 1, 1)).apply()


def test_a_refusal_names_them_too():
    with pytest.raises(InputError) as refused:
        notes(LowRank(rank=2, method={"Embedding": "svd"}))
    assert str(refused.value) == (
        "LowRank would work on only 12% of Mixed's weights: name the layers in targets to do so on purpose; it leaves "
        f"out {OWN}; first, middle, last (only Embedding are factored)"
    )


def test_a_few_weights_that_are_left_out_are_not_rounded_away():
    network = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 1))
    compressor = Compressor(network, [PruneWeights(amount=0.5, exclude="1")], torch.rand(2, 300))
    compressor.apply()
    assert compressor.piece.notes == ["PruneWeights works on 99% of Sequential's weights, not on 1 (excluded)"]
