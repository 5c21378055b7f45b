"""Targets of -100 count nowhere: in no term, mean, metric, figure or report, in one process as in two."""

import copy
import math

import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import (
    Batch,
    CompressionBaseline,
    EmpiricalSampler,
    ExtracurricularModule,
    FEEDModule,
    FixedDiscriminator,
    GeneratorModule,
    KDModule,
    LogitTerm,
    MEALV2Module,
    MovingAverage,
    ParaphraserModule,
    PastModel,
    SelfKDModule,
    StoredPast,
    SupervisedModule,
    TeacherEnsemble,
)
from distill_lightning.callbacks import ConfidenceFigure, TeacherReport
from distill_lightning.testing import TinyNet, tiny_trainer
from distill_lightning.testing.processes import LeaveTheGroup, process_strategy

CLASSES, SAMPLES = 3, 24
IGNORED = [0, 1, 2, 4, 5, 6, 7, 13, 22, *range(16, 22)]
"""Seven, one and seven of the three batches of eight."""
SECOND_HALVES = [row for row in range(SAMPLES) if row % 8 > 3]
"""All that the second of two processes gets."""


def still(parameters):
    """The weights stay, so that means over an epoch can be told from outside."""
    return torch.optim.SGD(parameters, lr=0.0)


def nets(count, seed=0):
    """GroupNorm, because BatchNorm looks at what does not count, too."""
    torch.manual_seed(seed)
    return [TinyNet(norm="group") for _ in range(count)]


def supervised():
    return SupervisedModule(*nets(1), num_classes=CLASSES, optimizer=still)


def kd():
    student, *teachers = nets(3)
    ensemble = TeacherEnsemble(teachers, weights=[1, 3])
    return KDModule(student, ensemble, num_classes=CLASSES, temperature=2.0, optimizer=still)


def kd_without_labels():
    student, *teachers = nets(3)
    return KDModule(student, teachers, num_classes=CLASSES, hard_label_weight=0.0, optimizer=still)


def feed():
    student, *teachers = nets(3)
    return FEEDModule(
        student, teachers, num_classes=CLASSES, student_layer="features", logit_term=LogitTerm(), optimizer=still,
        input_shape=(1, 8, 8),
    )  # fmt: skip


def meal():
    student, *teachers = nets(3)
    return MEALV2Module(
        student, teachers, num_classes=CLASSES, discriminator=FixedDiscriminator(), hard_label_weight=0.5,
        optimizer=still,
    )  # fmt: skip


def xcl():
    student, *teachers = nets(3)
    return ExtracurricularModule(
        student, teachers, num_classes=CLASSES, samplers=[EmpiricalSampler()], label_weight=0.5, optimizer=still
    )


def self_kd(past):
    return SelfKDModule(*nets(1), num_classes=CLASSES, past=past, alpha_schedule="constant", optimizer=still)


def baseline():
    student, *teachers = nets(3)
    return CompressionBaseline(student, num_classes=CLASSES, teacher=teachers, optimizer=still)


METHODS = {
    "supervised": supervised,
    "kd": kd,
    "kd without labels": kd_without_labels,
    "feed": feed,
    "meal": meal,
    "xcl": xcl,
    "stored past": lambda: self_kd(StoredPast(num_samples=SAMPLES)),
    "past model": lambda: self_kd(PastModel()),
    "moving average": lambda: self_kd(MovingAverage()),
    "baseline": baseline,
}


class Samples(torch.utils.data.Dataset):
    """Images with an index."""

    def __init__(self, rows, ignored=()):
        self.rows = list(rows)
        self.images = torch.rand(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        self.labels = torch.arange(SAMPLES) % CLASSES
        self.labels[list(ignored)] = -100

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        row = self.rows[number]
        return {"input": self.images[row], "target": self.labels[row], "index": row}


class Data(pl.LightningDataModule):
    """Batches of eight, of which each of several processes gets its share."""

    def __init__(self, ignored=IGNORED):
        super().__init__()
        self.ignored = ignored

    def train_dataloader(self):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        rows = [row for row in range(SAMPLES) if row % 8 // (8 // world) == rank]
        return DataLoader(Samples(rows, self.ignored), batch_size=8 // world)

    val_dataloader = train_dataloader


def fitted(module, data, **options):
    trainer = tiny_trainer(use_distributed_sampler=False, num_sanity_val_steps=0, **options)
    trainer.fit(module, datamodule=data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def per_sample(module):
    """Loss terms of each sample that counts alone, which the labels and nothing else tell apart."""
    data = Samples(range(SAMPLES))
    rows = [row for row in range(SAMPLES) if row not in IGNORED]
    found = {}
    for row in rows:
        batch = Batch(data.images[row][None], data.labels[row][None], torch.tensor([row]))
        with torch.no_grad():
            for name, value in module.terms(batch).items():
                found.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(rows) for name, values in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_means_of_an_epoch_are_over_the_samples_that_count(method):
    """Each term's is the plain mean of what the samples have alone; a batch of which one counts weighs as one."""
    module = METHODS[method]()
    # A past has no row yet, and two networks of the past predict the same in every epoch: the weights stay.
    logged = fitted(module, Data(), max_epochs=1)
    if method in ("stored past", "past model", "moving average"):
        expected = {"self_kd": naive_cross_entropy(module)}
    else:
        expected = per_sample(module)
    for name, value in expected.items():
        assert logged[f"train/{name}"] == pytest.approx(value, rel=1e-4), name


def naive_cross_entropy(module):
    data, total, count = Samples(range(SAMPLES)), 0.0, 0
    for row in range(SAMPLES):
        if row not in IGNORED:
            logits = module.student(data.images[row][None])[0].tolist()
            total += math.log(sum(map(math.exp, logits))) - logits[data.labels[row]]
            count += 1
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_terms_and_gradients_are_those_without_the_samples(method):
    """In the second epoch, when there is a past."""
    ends = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1:
                batch = Batch.of(batch)
                keep = batch.target != -100
                alone = Batch(batch.input[keep], batch.target[keep], batch.index[keep])
                ends.append([evaluated(pl_module, each) for each in (batch, alone)])

    fitted(METHODS[method](), Data(ignored=[1, 2, 4, 9, 22]), max_epochs=2, callbacks=[Look()])
    assert len(ends) == 3
    for (terms, gradients), (alone, alone_gradients) in ends:
        assert terms == pytest.approx(alone, rel=1e-4, abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, alone_gradients[name], rtol=1e-3, atol=1e-6)


def evaluated(module, batch):
    module.zero_grad()
    terms, weights = module.terms(batch), module.weights()
    sum(weights[name] * term for name, term in terms.items()).backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {name: float(term) for name, term in terms.items()}, gradients


@pytest.mark.filterwarnings("ignore:.*no sample of .* batch 0 counts")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "ignored"),
    [
        *((method, IGNORED) for method in METHODS),
        *((method, SECOND_HALVES) for method in ("kd", "past model")),
        *((method, range(SAMPLES)) for method in ("kd", "past model")),
    ],
)
def test_two_processes_log_what_one_logs(method, ignored):
    """Also where next to nothing counts in one of them, nothing in one, or nothing anywhere."""
    together = METHODS[method]()
    alone = copy.deepcopy(together)
    single = fitted(alone, Data(ignored))
    double = fitted(together, Data(ignored), devices=2, strategy=process_strategy(), callbacks=[LeaveTheGroup()])
    for name, value in single.items():
        if name.endswith("_share") or (name in ("train/agree_past", "train/discriminator_dead")):
            continue  # ratios of their own
        assert double[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name
    if len(ignored) == SAMPLES:
        assert double["train/loss"] == 0


# Metrics, figures and reports


def softmax(row):
    exps = [math.exp(value) for value in row]
    return [value / sum(exps) for value in exps]


def naive_metrics(student, teachers, weights, images, labels):
    """Sums over what counts, position by position."""
    count = hits = nll = same = divergence = 0
    confidences = []
    for image, label in zip(images, labels, strict=True):
        for place, target in enumerate(label.reshape(-1).tolist()):
            if target == -100:
                continue
            rows = [network(image[None]).reshape(-1, CLASSES)[place].tolist() for network in (student, *teachers)]
            p, *others = [softmax(row) for row in rows]
            q = [sum(w * other[k] for w, other in zip(weights, others, strict=True)) for k in range(CLASSES)]
            count += 1
            hits += p.index(max(p)) == target
            nll -= math.log(p[target])
            same += p.index(max(p)) == q.index(max(q))
            divergence += sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
            confidences.append(max(p))
    found = {"accuracy": hits, "nll": nll, "agreement": same, "teacher_kl": divergence}
    return count, {name: value / count for name, value in found.items()}, confidences


class Kept(ConfidenceFigure):
    title = "kept"

    def draw(self, stage, confidence, correct):
        self.drawn = confidence, correct
        return Figure(figsize=(1, 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* little better than guessing:UserWarning")
def test_metrics_figures_and_reports_are_of_what_counts():
    module, kept, report = kd(), Kept(), TeacherReport()
    logged = fitted(module, Data(), callbacks=[kept, report])
    data = Samples(range(SAMPLES), IGNORED)
    with torch.no_grad():
        count, expected, confidences = naive_metrics(
            module.student.eval(), list(module.teachers), [0.25, 0.75], data.images, data.labels
        )
        for row, (networks, weights) in zip(
            report.rows,
            [([module.teachers[0]], [1]), ([module.teachers[1]], [1]), (list(module.teachers), [0.25, 0.75])],
            strict=True,
        ):
            # A teacher's own numbers: as if it were the student, or of the mixture's log-probabilities.
            mixed = Mixed(networks, weights)
            _, own, _ = naive_metrics(mixed, networks, weights, data.images, data.labels)
            assert row["accuracy"] == pytest.approx(own["accuracy"])
            assert row["nll"] == pytest.approx(own["nll"], rel=1e-4)
    assert count == SAMPLES - len(IGNORED)
    for name, value in expected.items():
        assert logged[f"val/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert kept.drawn[0].tolist() == pytest.approx(confidences, rel=1e-5)
    assert float(kept.drawn[1].float().mean()) == pytest.approx(expected["accuracy"])


class Mixed(nn.Module):
    def __init__(self, networks, weights):
        super().__init__()
        self.networks, self.weights = networks, weights

    def forward(self, images):
        parts = [w * network(images).softmax(-1) for w, network in zip(self.weights, self.networks, strict=True)]
        return sum(parts).log()


# Positions


class Rows(nn.Module):
    """A class for each row of an image, ``(N, 8, K)``."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images):
        return self.head(images[:, 0])


def of_positions(kind):
    torch.manual_seed(0)
    student, *teachers = [Rows() for _ in range(3)]
    if kind == "supervised":
        return SupervisedModule(student, num_classes=CLASSES, optimizer=still)
    ensemble = TeacherEnsemble(teachers, weights=[1, 3])
    if kind == "kd":
        return KDModule(student, ensemble, num_classes=CLASSES, temperature=1.0, optimizer=still)
    return CompressionBaseline(student, num_classes=CLASSES, teacher=ensemble, temperature=1.0, optimizer=still)


class Positions(Data):
    """Labels of rows: none, some or all of them known."""

    def train_dataloader(self):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        rows = [row for row in range(SAMPLES) if row % 8 // (8 // world) == rank]
        images, labels = self.all()
        return DataLoader(TensorDataset(images[rows], labels[rows]), batch_size=8 // world)

    val_dataloader = train_dataloader

    @staticmethod
    def all():
        generator = torch.Generator().manual_seed(2)
        labels = torch.randint(0, CLASSES, (SAMPLES, 8), generator=generator)
        # The first batch has no label that is unknown, the second few, the third many.
        labels[8:16, 5:] = -100
        labels[16:, 1:] = -100
        labels[18:, :] = -100
        return torch.randn(SAMPLES, 1, 8, 8, generator=generator), labels


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["supervised", "kd", "baseline"])
@pytest.mark.parametrize("processes", [1, 2])
def test_positions_are_counted_one_by_one(kind, processes):
    module = of_positions(kind)
    several = {"devices": 2, "strategy": process_strategy(), "callbacks": [LeaveTheGroup()]}
    logged = fitted(module, Positions(), **(several if processes == 2 else {}))
    networks = list(module.teachers) if kind != "supervised" else [module.student]
    with torch.no_grad():
        count, expected, _ = naive_metrics(
            module.student, networks, [0.25, 0.75] if kind != "supervised" else [1], *Positions.all()
        )
    assert count == 64 + 40 + 2
    if kind == "supervised":
        expected = {"accuracy": expected["accuracy"], "nll": expected["nll"]}
    else:
        assert logged["train/kd"] == pytest.approx(expected["teacher_kl"], rel=1e-4)
    assert logged["train/ce"] == pytest.approx(expected["nll"], rel=1e-4)
    for name, value in expected.items():
        assert logged[f"val/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6), name


# What reads no labels


@pytest.mark.slow
def test_paraphrasers_and_generators_average_over_what_counts():
    data = Samples(range(SAMPLES), IGNORED)
    module = ParaphraserModule(nets(2), layers="features", input_shape=(1, 8, 8), optimizer=still)
    logged = fitted(module, Data())
    kept = [row for row in range(SAMPLES) if row not in IGNORED]
    with torch.no_grad():
        for number, (made, real) in enumerate(module._pairs(data.images[kept])):
            expected = float((made - real).abs().mean())
            assert logged[f"train/reconstruction_{number}"] == pytest.approx(expected, rel=1e-4)
            assert logged[f"val/reconstruction_{number}"] == pytest.approx(expected, rel=1e-4)
    assert logged["val/loss"] == pytest.approx(logged["train/loss"], rel=1e-4)
    generator = GeneratorModule(input_shape=(1, 8, 8), output_range=(0.0, 1.0), latent_dim=2, width=2, optimizer=still)
    logged = fitted(generator, Data())
    with torch.no_grad():
        terms = []
        for row in kept:
            mean, log_var = generator.encoder(data.images[row][None])[0].double().chunk(2)
            terms.append(float((log_var.exp() + mean.square() - 1 - log_var).sum() / 2))
    assert logged["train/kl"] == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert logged["val/kl"] == pytest.approx(logged["train/kl"], rel=1e-4)
