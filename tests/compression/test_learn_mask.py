"""The step that learns masks: exact amounts in the end, and masks that go on from those of before."""

import copy

import pytest
from test_prune_weights import NETWORKS, OPTIMIZERS, WEIGHTS, build, compressor_of, count, train, zeros

from distill_lightning import InputError
from distill_lightning.compression.steps import L0, LearnMask, Movement, Order, PruneWeights, SoftMovement
from distill_lightning.compression.steps.schedules import Cubic, Iterative, OneShot, Threshold


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_movement_ends_in_plain_masks_of_the_exact_amount(kind, scope):
    network = build(kind)
    step = LearnMask(Movement(0.5, scope=scope), finetune_epochs=2)
    compressor = compressor_of(network, step, kind=kind, epochs=2)
    train(compressor, OPTIMIZERS["sgd"], epochs=2, kind=kind)
    compressor.finish()
    # In the old order, too, by which an optimiser's state finds its parameters again.
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in build(kind).named_parameters()]
    if scope == "layer":
        for path in WEIGHTS[kind]:
            assert zeros(network, [path]) == round(0.5 * count(network, [path]))
    assert zeros(network, WEIGHTS[kind]) == compressor.masks.pruned
    assert compressor.masks.pruned == pytest.approx(0.5 * count(network, WEIGHTS[kind]), abs=1)


def test_movement_goes_on_from_what_was_pruned_before():
    network = build()
    steps = [PruneWeights(amount=0.4, at="start"), LearnMask(Movement(0.6, scope="layer"), finetune_epochs=2)]
    compressor = compressor_of(network, *steps, epochs=2)
    first = {}

    def watch(moment, phase):
        if moment == "after" and phase.number == 1:
            first.update(copy.deepcopy(compressor.masks.kept))

    compressor.watch = watch
    train(compressor, OPTIMIZERS["sgd"], epochs=2)
    compressor.finish()
    for path, kept in compressor.masks.kept.items():
        assert not (kept & ~first[path]).any()
        wanted = max(round(0.6 * kept.numel()), int((~first[path]).sum()))
        assert int((~kept).sum()) == wanted == zeros(network, [path])


def test_soft_movement_prunes_by_its_penalty():
    pruned = []
    for weight in (0.0, 100.0):
        network = build()
        step = LearnMask(SoftMovement(Threshold(0.48), penalty_weight=weight), finetune_epochs=4)
        compressor = compressor_of(network, step, epochs=4)
        train(compressor, OPTIMIZERS["adam"], epochs=4)
        compressor.finish()
        assert zeros(network, WEIGHTS["cnn"]) == compressor.masks.pruned
        pruned.append(compressor.masks.sparsity())
    assert pruned[0] < 0.5
    assert pruned[1] > 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Movement(1.5), "between 0 and 1"),
        (lambda: Movement({}), "between 0 and 1"),
        (lambda: Movement(0.5, scope="all"), "scope must be"),
        (lambda: Movement(0.5, schedule=OneShot()), "a schedule that begins at 0"),
        (lambda: Movement(0.5, schedule=Iterative(3)), "a schedule that begins at 0"),
        (lambda: Movement(0.5, schedule=Cubic(initial=0.1)), "a schedule that begins at 0"),
        (lambda: SoftMovement(penalty_weight=-0.1), "must not be negative"),
        (lambda: L0(-0.1), "must not be negative"),
        (lambda: L0(0.1, per="channel"), "per must be one of weight, row"),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_learned_masks_come_after_structure():
    for rule in (Movement(0.5), SoftMovement(), L0(0.1)):
        assert LearnMask(rule).order is Order.MASKS
