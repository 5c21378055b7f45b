"""The throughput benchmark's peers compute what the package's modules compute."""

import math
import types

import pytest
import torch
from torch import nn

from benchmarks import peers
from distill_lightning import (
    Batch,
    FEEDModule,
    KDModule,
    MEALV2Module,
    OwnDiscriminator,
    SupervisedModule,
    functional,
)
from distill_lightning.errors import InputError
from distill_lightning.layers import Discriminator, Translator, fingerprint
from distill_lightning.testing import TinyNet

CLASSES = 5
KINDS = [("supervised", 0), ("kd", 1), ("kd", 3), ("meal_v2", 1), ("meal_v2", 3), ("feed", 1), ("feed", 3)]
both_peers = pytest.mark.parametrize("peer", ["plain", "torchdistill"])
every_kind = pytest.mark.parametrize(("kind", "count"), KINDS)


def tiny(seed, *, width):
    torch.manual_seed(seed)
    network = TinyNet(CLASSES, in_channels=3, width=width)
    # Predictions so sharp that temperatures and means matter, and running statistics of its own.
    network.head.weight.data *= 8
    with torch.no_grad():
        network(torch.randn(16, 3, 8, 8))
    return network


def arguments(kind, count):
    """Networks, the same at every call."""
    return {
        "kind": kind,
        "student": tiny(0, width=4),
        "teachers": [tiny(1 + number, width=6) for number in range(count)],
        "translators": [Translator(8, 12) for _ in range(count)],
        "discriminator": Discriminator(CLASSES, kind="fixed"),
        "layer": "features",
    }


def our_module(kind, student, teachers, translators, discriminator, layer=peers.LAYER, classes=CLASSES):
    if kind == "supervised":
        return SupervisedModule(student, num_classes=classes)
    if kind == "kd":
        return KDModule(student, teachers, num_classes=classes, temperature=4.0, hard_label_weight=0.1)
    if kind == "meal_v2":
        own = OwnDiscriminator(discriminator)
        return MEALV2Module(student, teachers, num_classes=classes, discriminator=own)
    module = FEEDModule(student, teachers, num_classes=classes, student_layer=layer, beta=500.0)
    for own, given in zip(module.translators, translators, strict=True):
        own.load_state_dict(given.state_dict())
    return module


def our_loss(module, images, labels):
    terms, weights = module.terms(Batch(images, labels)), module.weights()
    return sum(weights[name] * term for name, term in terms.items())


def learning(kind, student, translators, discriminator):
    """Every weight and every running statistic that a step changes."""
    beside = {"supervised": [], "kd": [], "meal_v2": [discriminator], "feed": translators}[kind]
    return nn.ModuleList([student, *beside])


def batches(count):
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        images = torch.randn(6, 3, 8, 8, generator=generator)
        yield images, torch.randint(CLASSES, (6,), generator=generator)


def loss_of(peer, given):
    if peer == "plain":
        return peers.plain_loss(**given)
    pytest.importorskip("torchdistill")
    return peers.torchdistill_box(**given).forward_process


def step_of(peer, given):
    if peer == "plain":
        return peers.plain_step(**given)
    pytest.importorskip("torchdistill")
    return peers.torchdistill_step(**given)


@pytest.mark.slow
@both_peers
@every_kind
def test_the_first_loss_is_that_of_our_module(peer, kind, count):
    ours, loss = our_module(**arguments(kind, count)), loss_of(peer, arguments(kind, count))
    for images, labels in batches(1):
        torch.testing.assert_close(loss(images, labels), our_loss(ours, images, labels), rtol=1e-5, atol=1e-6)


@both_peers
@pytest.mark.parametrize("kind", ["kd", "meal_v2", "feed"])
@pytest.mark.slow
def test_the_loss_is_that_of_our_module_with_the_networks_of_the_benchmark(peer, kind):
    pytest.importorskip("pytorchcv")
    loss, given = loss_of(peer, peers.networks(kind, 1)), peers.networks(kind, 1)
    ours = our_module(**given, classes=100)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 17, 99, 50])
    torch.testing.assert_close(loss(images, labels), our_loss(ours, images, labels), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@both_peers
@every_kind
def test_steps_change_every_weight_as_our_module_does(peer, kind, count):
    mine, theirs = arguments(kind, count), arguments(kind, count)
    module, step = our_module(**mine), step_of(peer, theirs | {"lr": 0.1})
    # FEEDModule makes its own translators.
    mine["translators"] = getattr(module, "translators", [])
    optimizer = module.configure_optimizers()
    our, their = (
        learning(kind, given["student"], given["translators"], given["discriminator"]) for given in (mine, theirs)
    )
    before = {name: tensor.clone() for name, tensor in their.state_dict().items()}
    # The second step shows the momentum, and whether the first one's gradients are still there.
    for images, labels in batches(2):
        step(images, labels)
        optimizer.zero_grad()
        our_loss(module, images, labels).backward()
        optimizer.step()
    torch.testing.assert_close(dict(their.state_dict()), dict(our.state_dict()), rtol=1e-4, atol=1e-5)
    assert not [name for name, tensor in their.state_dict().items() if torch.equal(tensor, before[name])]


@pytest.mark.slow
@both_peers
@every_kind
def test_teachers_stay_as_they_are_and_the_student_learns(peer, kind, count):
    given = arguments(kind, count)
    given["student"].eval()
    seen = []
    for teacher in given["teachers"]:
        assert teacher.training
        teacher.register_forward_hook(lambda network, *_: seen.append((network.training, torch.is_grad_enabled())))
    before = [fingerprint(teacher) for teacher in given["teachers"]]
    step = step_of(peer, given)
    for images, labels in batches(2):
        step(images, labels)
    assert [fingerprint(teacher) for teacher in given["teachers"]] == before
    assert all(parameter.grad is None for teacher in given["teachers"] for parameter in teacher.parameters())
    # Each teacher once in each step, in eval mode, without a graph.
    assert seen == [(False, False)] * (2 * count)
    assert given["student"].training


@both_peers
def test_the_learning_rate_is_the_one_that_is_given(peer):
    given = arguments("kd", 2) | {"lr": 0.0}
    before = [parameter.clone() for parameter in given["student"].parameters()]
    step = step_of(peer, given)
    for images, labels in batches(1):
        step(images, labels)
    assert all(map(torch.equal, given["student"].parameters(), before))


@pytest.mark.parametrize("kind", ["kd", "meal_v2", "feed"])
def test_the_plain_losses_against_loops(kind):
    loss, given = peers.plain_loss(**arguments(kind, 2)), arguments(kind, 2)
    for teacher in given["teachers"]:
        teacher.eval()
    reference = {"kd": kd_by_loops, "meal_v2": meal_v2_by_loops, "feed": feed_by_loops}[kind]
    for images, labels in batches(1):
        with torch.no_grad():
            assert loss(images, labels).item() == pytest.approx(reference(images, labels, given), rel=1e-4)


def softmax(row, temperature=1.0):
    exponentials = [math.exp((value - max(row)) / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def mean(rows):
    return [sum(values) / len(rows) for values in zip(*rows, strict=True)]


def cross_entropy_by_loops(logits, labels):
    return -sum(math.log(softmax(row)[label]) for row, label in zip(logits, labels.tolist(), strict=True)) / len(logits)


def kd_by_loops(images, labels, given):
    student = given["student"](images).tolist()
    teachers = [teacher(images).tolist() for teacher in given["teachers"]]
    total = 0.1 * cross_entropy_by_loops(student, labels)
    for row, *others in zip(student, *teachers, strict=True):
        probs = mean([softmax(other, 4) for other in others])
        divergence = sum(q * math.log(q / p) for q, p in zip(probs, softmax(row, 4), strict=True))
        total += 0.9 * 16 * divergence / len(student)
    return total


def meal_v2_by_loops(images, labels, given):
    student = given["student"](images).tolist()
    teachers = [teacher(images).tolist() for teacher in given["teachers"]]
    total = 0.0
    for row, *others in zip(student, *teachers, strict=True):
        probs = mean([softmax(other) for other in others])
        total -= sum(q * math.log(p) for q, p in zip(probs, softmax(row), strict=True)) / len(student)
        for shown, target in ((row, (1, 0)), (mean(others), (0, 1))):
            scores = given["discriminator"](torch.tensor([shown]))[0].tolist()
            for score, wanted in zip(scores, target, strict=True):
                right = 1 / (1 + math.exp(-score if wanted else score))
                total -= math.log(right) / (4 * len(student))
    return total


def feed_by_loops(images, labels, given):
    total = cross_entropy_by_loops(given["student"](images).tolist(), labels)
    # BatchNorm in train mode needs the batch as a whole.
    feature = given["student"].features(images)
    for teacher, translator in zip(given["teachers"], given["translators"], strict=True):
        pair = translator(feature).flatten(1).tolist(), teacher.features(images).flatten(1).tolist()
        distances = []
        for ours, theirs in zip(*pair, strict=True):
            norms = math.hypot(*ours), math.hypot(*theirs)
            distances += [abs(a / norms[0] - b / norms[1]) for a, b in zip(ours, theirs, strict=True)]
        total += 500 * sum(distances) / len(distances)
    return total


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5])
def test_the_kd_loss_of_torchdistill_for_one_teacher(alpha):
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    loss = mid_level.KDLoss(".", "output", ".", "output", temperature=4.0, alpha=alpha)
    student, teacher, labels = 3 * torch.randn(6, 5), 3 * torch.randn(6, 5), torch.arange(6) % 5
    theirs = loss({".": {"output": student}}, {".": {"output": teacher}}, labels)
    soft = functional.softened_kl(student, teacher, temperature=4.0)
    if alpha == 0:
        # Without a share for the labels it leaves T² out.
        torch.testing.assert_close(theirs, soft / 16)
    else:
        hard = nn.functional.cross_entropy(student, labels)
        torch.testing.assert_close(theirs, alpha * hard + (1 - alpha) * soft)


@pytest.mark.parametrize("build", [peers.plain_step, peers.torchdistill_box])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "hint"}, "kind must be one of supervised, kd, meal_v2, feed, got 'hint'"),
        ({"kind": "kd", "teachers": []}, "teachers is empty"),
        ({"kind": "feed", "translators": None}, "0 translators for 2 teachers"),
        ({"kind": "meal_v2", "discriminator": None}, "needs a discriminator"),
        ({"kind": "feed", "layer": "stage3"}, "stage3"),
    ],
)
def test_what_cannot_be_used_is_refused(build, change, message):
    with pytest.raises(InputError, match=message) as caught:
        build(**(arguments("kd", 2) | change))
    assert "\n" not in str(caught.value)


def test_a_missing_torchdistill_is_named_with_its_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

    monkeypatch.setattr(peers, "importlib", types.SimpleNamespace(import_module=missing))
    with pytest.raises(InputError, match=r"pip install 'distill-lightning\[bench\]'"):
        peers.torchdistill_step(**arguments("kd", 1))


def test_the_peers_take_turns_and_the_median_is_told(monkeypatch):
    clock, order = [0.0], []

    def step_of_length(name, lengths):
        def step(images, labels):
            order.append(name)
            clock[0] += lengths[order.count(name) - 1]

        return step

    monkeypatch.setattr(peers, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    # The first two rounds warm up.
    steps = {"a": step_of_length("a", [9, 9, 1, 2, 6]), "b": step_of_length("b", [9, 9, 0.5, 0.5, 0.25])}
    medians = peers.milliseconds(steps, torch.zeros(1), torch.zeros(1), repeats=3)
    assert order == list("abbaabbaab")
    assert medians == pytest.approx({"a": 2000.0, "b": 500.0})


@pytest.mark.slow
def test_the_table_has_a_row_for_each_kind_and_number_of_teachers(capsys):
    pytest.importorskip("torchdistill")
    pytest.importorskip("pytorchcv")
    peers.main(["--kinds", "supervised", "feed", "--teachers", "1", "2", "--repeats", "1", "--batch-size", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert f"{torch.get_num_threads()} OMP threads" in lines[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[3:]]
    assert [row[:2] for row in rows] == [["supervised", "0"], ["feed", "1"], ["feed", "2"]]
    assert all(float(cell) > 0 for row in rows for cell in row[2:])
