"""How a student is evaluated beside its teachers: the metrics against loops, kept answers, and `observe`."""

import copy
import io
import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassPrecision, MulticlassRecall

from distill_lightning import (
    Batch,
    DistillationModule,
    GeneratorModule,
    KDModule,
    ParaphraserModule,
    SupervisedModule,
    TeacherEnsemble,
)
from distill_lightning.functional import gaussian_nll, join_gaussian, split_gaussian
from distill_lightning.lightning_internals import repeated_rows
from distill_lightning.modules.parts.evaluation import Evaluation
from distill_lightning.teachers import Frozen
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

SHAPE = (1, 8, 8)


def batch_of(index, view=None, seed=0):
    count = len(index)
    inputs = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    views = torch.zeros(count, dtype=torch.long) if view is None else torch.tensor(view)
    return Batch(inputs, torch.arange(count) % 3, torch.tensor(index), views)


def kd(seed=0, **ensemble):
    torch.manual_seed(seed)
    teachers = [TinyNet() for _ in range(2)]
    for teacher in teachers:
        # Sure of themselves, so that averaging probabilities and averaging logits differ.
        nn.init.normal_(teacher.head.weight, std=20.0)
    return KDModule(TinyNet(), TeacherEnsemble(teachers, **ensemble), num_classes=3, input_shape=SHAPE)


def naive_softmax(row):
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def columns(rows):
    return zip(*rows, strict=True)


def naive_prediction(logits, combine, weights):
    """One sample's prediction from its teachers' logits."""
    shares = [weight / sum(weights) for weight in weights]
    if combine == "logits":
        return naive_softmax([sum(w * z for w, z in zip(shares, column, strict=True)) for column in columns(logits)])
    rows = [naive_softmax(row) for row in logits]
    return [sum(w * p for w, p in zip(shares, column, strict=True)) for column in columns(rows)]


@torch.no_grad()
def naive_metrics(module, dataset, combine="probabilities", weights=(1, 1)):
    """Sample after sample."""
    module.eval()
    same, divergence = 0, 0.0
    for number in range(len(dataset)):
        inputs = dataset[number].input[None]
        p = naive_softmax(module.student(inputs)[0].double().tolist())
        logits = [teacher(inputs)[0].double().tolist() for teacher in module.teachers]
        q = naive_prediction(logits, combine, weights)
        same += p.index(max(p)) == q.index(max(q))
        divergence += sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True))
    return {"agreement": same / len(dataset), "teacher_kl": divergence / len(dataset)}


def check(found, prefix, expected):
    for name, value in expected.items():
        assert float(found[f"{prefix}/{name}"]) == pytest.approx(value, rel=1e-4, abs=1e-6), name


def watch(module):
    """A list that grows by the samples which the teachers are asked about outside of training."""
    asked = []

    def note(network, inputs, output):
        if not module.trainer.training:
            asked.append(len(inputs[0]))

    module.teachers[0].register_forward_hook(note)
    return asked


# the answers


def kept_about(batch, stage="val", number=0):
    evaluation = Evaluation()
    prediction = torch.rand(batch.size, 3)
    evaluation._keep(stage, number, batch, prediction)
    return evaluation, prediction


def test_an_answer_is_recalled_for_the_same_views_of_the_same_samples():
    evaluation, prediction = kept_about(batch_of([4, 2, 7]))
    # Equal numbers, not the same tensors; the inputs are not looked at.
    assert evaluation._recalled("val", 0, batch_of([4, 2, 7], seed=1)) is prediction


@pytest.mark.parametrize(
    ("index", "view"),
    [([4, 7, 2], None), ([4, 2], None), ([4, 2, 7, 7], None), ([4, 2, 8], None), ([4, 2, 7], [0, 0, 1]), ([], [])],
)
def test_nothing_is_recalled_for_other_samples_or_views(index, view):
    evaluation, _ = kept_about(batch_of([4, 2, 7]))
    assert evaluation._recalled("val", 0, batch_of(index, view)) is None


def test_nothing_is_recalled_for_another_stage_or_batch_number():
    evaluation, prediction = kept_about(batch_of([4, 2]), number=3)
    assert evaluation._recalled("test", 3, batch_of([4, 2])) is None
    assert evaluation._recalled("val", 2, batch_of([4, 2])) is None
    assert evaluation._recalled("val", 3, batch_of([4, 2])) is prediction


def test_a_later_answer_replaces_the_earlier_one_of_its_place_alone():
    evaluation, _ = kept_about(batch_of([4, 2]))
    first, second = torch.rand(1, 3), torch.rand(2, 3)
    evaluation._keep("test", 0, batch_of([5]), first)
    evaluation._keep("val", 0, batch_of([1, 3]), second)
    assert evaluation._recalled("val", 0, batch_of([4, 2])) is None
    assert evaluation._recalled("val", 0, batch_of([1, 3])) is second
    assert evaluation._recalled("test", 0, batch_of([5])) is first


@pytest.mark.parametrize("moment", ["fit_starts", "fit_ends", "test_starts"])
def test_forgetting_leaves_nothing(moment):
    evaluation, _ = kept_about(batch_of([4, 2]))
    getattr(evaluation, moment)(kd())
    assert evaluation._recalled("val", 0, batch_of([4, 2])) is None


@pytest.mark.parametrize("missing", [{"index": None}, {"view": None}, {"index": None, "view": None}])
def test_a_batch_that_cannot_be_told_is_neither_kept_nor_recalled(missing):
    batch = batch_of([4, 2])
    evaluation, _ = kept_about(batch.replace(**missing))
    assert evaluation._recalled("val", 0, batch) is None
    evaluation, _ = kept_about(batch)
    assert evaluation._recalled("val", 0, batch.replace(**missing)) is None


# the metrics


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["probabilities", "logits"])
@pytest.mark.parametrize("weights", [None, [1, 3]])
def test_agreement_and_divergence_are_those_of_the_loop(combine, weights):
    module = kd(combine=combine, weights=weights)
    # Batches of 8, 8 and 5 samples.
    data = TinyDataModule(val_size=21)
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=data)
    weights = weights or [1, 1]
    expected = naive_metrics(module, data.dataset("val"), combine, weights)
    flipped = "logits" if combine == "probabilities" else "probabilities"
    other = naive_metrics(module, data.dataset("val"), flipped, weights)
    assert abs(expected["teacher_kl"] - other["teacher_kl"]) > 0.01
    check(trainer.callback_metrics, "val", expected)
    tested = trainer.test(module, datamodule=data, verbose=False)[0]
    check(tested, "test", naive_metrics(module, data.dataset("test"), combine, weights))


def test_a_student_that_is_its_teacher_agrees_everywhere():
    module = kd()
    for network in module.teachers:
        network.load_state_dict(module.student.state_dict())
    found = tiny_trainer().validate(module, datamodule=TinyDataModule(), verbose=False)[0]
    assert found["val/agreement"] == 1
    assert abs(found["val/teacher_kl"]) < 1e-6


def test_without_teachers_there_is_nothing_to_agree_with():
    trainer = tiny_trainer()
    trainer.fit(SupervisedModule(TinyNet(), num_classes=3), datamodule=TinyDataModule())
    assert "val/nll" in trainer.callback_metrics
    assert not [name for name in trainer.callback_metrics if "agreement" in name or "teacher" in name]


class GaussianFollower(DistillationModule):
    """A regression with a teacher, as a user would write it."""

    def __init__(self, student, teacher):
        super().__init__(student, num_targets=2)
        self.teacher = Frozen([teacher])

    def terms(self, batch):
        return {"nll": gaussian_nll(*split_gaussian(self.student(batch.input)), batch.target)}

    def weights(self):
        return {"nll": 1.0}

    def teacher_prediction(self, batch):
        return join_gaussian(*split_gaussian(self.teacher[0](batch.input)))


@pytest.mark.slow
def test_a_regressions_divergence_is_that_of_the_loop():
    torch.manual_seed(0)
    teacher = TinyNet(None, num_targets=2)
    nn.init.normal_(teacher.head.weight)
    module, data = GaussianFollower(TinyNet(None, num_targets=2), teacher), TinyDataModule(num_targets=2, val_size=21)
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=data)
    module.eval()
    total, dataset = 0.0, data.dataset("val")
    for number in range(21):
        with torch.no_grad():
            q, p = (net(dataset[number].input[None])[0].double().tolist() for net in (teacher, module.student))
        for m_t, s_t, m_s, s_s in zip(q[:2], q[2:], p[:2], p[2:], strict=True):
            total += 0.5 * (s_s - s_t + math.exp(s_t - s_s) + (m_t - m_s) ** 2 / math.exp(s_s) - 1)
    check(trainer.callback_metrics, "val", {"teacher_kl": total / 21})
    assert total / 21 > 0.01
    assert "val/agreement" not in trainer.callback_metrics
    assert "val/mae" in trainer.callback_metrics


# how often the teachers are asked


@pytest.mark.slow
def test_in_a_fit_the_teachers_are_asked_once_about_each_validation_sample():
    # The check before training asks about the first two batches.
    module = kd()
    asked = watch(module)
    trainer = tiny_trainer(max_epochs=4, num_sanity_val_steps=2)
    trainer.fit(module, datamodule=TinyDataModule(val_size=21))
    assert asked == [8, 8, 5]


@pytest.mark.slow
def test_validating_within_an_epoch_asks_no_more():
    module = kd()
    asked = watch(module)
    tiny_trainer(max_epochs=2, val_check_interval=1).fit(module, datamodule=TinyDataModule(val_size=21))
    assert asked == [8, 8, 5]


@pytest.mark.slow
def test_two_validation_loaders_are_asked_about_every_time():
    class Two(TinyDataModule):
        def val_dataloader(self):
            return [super().val_dataloader(), super().test_dataloader()]

    class Both(KDModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            predicted.append(self.teacher_prediction(batch))
            return super().validation_step(batch, batch_idx, dataloader_idx)

    predicted = []
    torch.manual_seed(0)
    module = Both(TinyNet(), TinyNet(), num_classes=3)
    asked = watch(module)
    tiny_trainer(max_epochs=2).fit(module, datamodule=Two(val_size=8))
    batches = len(predicted)
    assert batches > 4
    # Once by hand, and once for the metrics, in both epochs.
    assert len(asked) == 2 * batches


@pytest.mark.slow
def test_a_prediction_that_is_the_modules_own_is_kept_where_its_teachers_are_frozen_alone():
    class Asking(KDModule):
        def teacher_prediction(self, batch):
            asked.append(len(batch.input))
            return super().teacher_prediction(batch)

    class Moving(SupervisedModule):
        def __init__(self, student, teachers, *, num_classes):
            super().__init__(student, num_classes=num_classes)
            self.teachers = teachers

        def teacher_prediction(self, batch):
            asked.append(len(batch.input))
            return self.teachers(batch.input)

    class Following(SupervisedModule):
        def __init__(self, student, peer, *, num_classes):
            super().__init__(student, num_classes=num_classes)
            self.peer = peer

        def teacher_prediction(self, batch):
            asked.append(len(batch.input))
            return self.peer(batch.input)

    for kind, times in ((Moving, 3), (Following, 3), (Asking, 1)):
        asked = []
        torch.manual_seed(0)
        module = kind(TinyNet(), TinyNet(), num_classes=3)
        tiny_trainer(max_epochs=3, num_sanity_val_steps=0).fit(module, datamodule=TinyDataModule(val_size=8))
        assert asked == times * [8]


@pytest.mark.slow
def test_kept_answers_give_the_metrics_that_fresh_ones_give(monkeypatch):
    found = []
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(Evaluation, "_recalled", lambda *_: None)
        module = kd()
        asked = watch(module)
        trainer = tiny_trainer(max_epochs=3)
        trainer.fit(module, datamodule=TinyDataModule(val_size=21))
        found.append({name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")})
    assert asked == [8, 8] + 3 * [8, 8, 5]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.slow
def test_validation_and_test_do_not_take_each_others_answers():
    # Both number their samples from 0.
    module, data = kd(), TinyDataModule()
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=data)
    check(trainer.test(module, datamodule=data, verbose=False)[0], "test", naive_metrics(module, data.dataset("test")))
    check(
        trainer.validate(module, datamodule=data, verbose=False)[0], "val", naive_metrics(module, data.dataset("val"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize("before", ["fit", "validate", "test"])
def test_another_call_may_bring_other_data(verb, before):
    module, data, other = kd(), TinyDataModule(), TinyDataModule(seed=5)
    asked = watch(module)
    trainer = tiny_trainer(num_sanity_val_steps=0)
    if before == "fit":
        trainer.fit(module, datamodule=data)
    else:
        getattr(trainer, before)(module, datamodule=data, verbose=False)
    found = getattr(trainer, verb)(module, datamodule=other, verbose=False)[0]
    assert asked == 2 * [8, 8, 8]
    prefix = {"validate": "val", "test": "test"}[verb]
    expected = naive_metrics(module, other.dataset(prefix))
    assert abs(expected["teacher_kl"] - naive_metrics(module, data.dataset(prefix))["teacher_kl"]) > 1e-3
    check(found, prefix, expected)


@pytest.mark.slow
def test_another_fit_may_bring_other_data():
    module, other = kd(), TinyDataModule(seed=5)
    tiny_trainer().fit(module, datamodule=TinyDataModule())
    asked = watch(module)
    trainer = tiny_trainer(num_sanity_val_steps=0)
    trainer.fit(module, datamodule=other)
    assert asked == [8, 8, 8]
    check(trainer.callback_metrics, "val", naive_metrics(module, other.dataset("val")))


@pytest.mark.slow
def test_another_teacher_may_come_between_two_calls():
    module, data = kd(), TinyDataModule()
    trainer = tiny_trainer()
    trainer.validate(module, datamodule=data, verbose=False)
    module.teachers = kd(seed=3).teachers
    found = trainer.validate(module, datamodule=data, verbose=False)[0]
    check(found, "val", naive_metrics(module, data.dataset("val")))


class Changing(TinyDataModule):
    """Validates on other samples, or on the same in another order, in every epoch."""

    def __init__(self, batch):
        super().__init__()
        self.batch, self.epochs = batch, 0

    def val_dataloader(self):
        self.epochs += 1
        dataset = self.dataset("val")
        order = torch.randperm(24, generator=torch.Generator().manual_seed(self.epochs))
        self.shown = order[:20]
        parts = [dataset.__getitems__(part.tolist()) for part in torch.split(self.shown, 8)]
        return DataLoader([self.batch(part) for part in parts], batch_size=None)


BATCHES = {
    "named": lambda batch: batch,
    "pair": lambda batch: (batch.input, batch.target),
    "no view": lambda batch: {"input": batch.input, "target": batch.target, "index": batch.index},
    "no index": lambda batch: batch.replace(index=None),
    # Every batch says that it holds the same samples; only the views tell that they are others.
    "only views": lambda batch: batch.replace(index=torch.zeros_like(batch.index), view=batch.index),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BATCHES)
def test_data_in_another_order_are_asked_about_again(kind):
    module, data = kd(), Changing(BATCHES[kind])
    asked = watch(module)
    trainer = tiny_trainer(max_epochs=3, num_sanity_val_steps=0, reload_dataloaders_every_n_epochs=1)
    trainer.fit(module, datamodule=data)
    assert data.epochs == 3
    assert asked == 3 * [8, 8, 4]
    module.eval()
    dataset = data.dataset("val")
    check(trainer.callback_metrics, "val", naive_metrics(module, [dataset[int(row)] for row in data.shown]))


@pytest.mark.slow
def test_plain_pairs_of_a_tensor_data_set_are_asked_about_in_every_epoch():
    module = kd()
    asked = watch(module)
    rows = TensorDataset(torch.rand(20, *SHAPE), torch.arange(20) % 3)
    loaders = [DataLoader(rows, batch_size=8) for _ in range(2)]
    trainer = tiny_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, *loaders)
    assert asked == 2 * [8, 8, 4]
    expected = naive_metrics(module, [Batch(*rows[number]) for number in range(20)])
    check(trainer.callback_metrics, "val", expected)


@pytest.mark.slow
def test_answers_stay_out_of_the_state_dict_and_a_module_that_has_some_is_copied_and_pickled():
    module, data = kd(), TinyDataModule()
    names = list(module.state_dict())
    tiny_trainer().fit(module, datamodule=data)
    assert list(module.state_dict()) == names
    file = io.BytesIO()
    torch.save(copy.deepcopy(module), file)
    file.seek(0)
    copied = torch.load(file, weights_only=False)
    found = tiny_trainer().validate(copied, datamodule=data, verbose=False)[0]
    check(found, "val", naive_metrics(module, data.dataset("val")))


# observe


class Watching(SupervisedModule):
    """Looks at something in every batch."""

    def terms(self, batch):
        terms = super().terms(batch)
        self.look(batch, terms)
        return terms

    def look(self, batch, terms):
        self.observe("brightness", batch.input.mean())


def fitted(build=Watching, **options):
    torch.manual_seed(0)
    module = build(TinyNet(), num_classes=3)
    trainer = tiny_trainer(**options)
    # Batches of 7, 7, 7 and 3.
    data = TinyDataModule(batch_size=7)
    trainer.fit(module, datamodule=data)
    return module, trainer.callback_metrics, data


@pytest.mark.slow
def test_an_observed_value_is_logged_as_its_mean_over_the_epochs_samples():
    _, metrics, data = fitted(max_epochs=2)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    batches = list(loader)
    assert sorted(batch.size for batch in batches) == [3, 7, 7, 7]
    total = sum(float(batch.input.sum()) for batch in batches)
    assert metrics["train/brightness"].item() == pytest.approx(total / (24 * 64), rel=1e-5)


@pytest.mark.slow
def test_an_observed_value_is_no_term_and_changes_nothing_else():
    module, metrics, _ = fitted(max_epochs=2)
    plain, plain_metrics, _ = fitted(SupervisedModule, max_epochs=2)
    assert metrics.keys() - plain_metrics.keys() == {"train/brightness"}
    assert all(torch.equal(value, metrics[name]) for name, value in plain_metrics.items())
    states = module.state_dict(), plain.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.slow
def test_an_observed_value_keeps_no_graph():
    class Graph(Watching):
        def look(self, batch, terms):
            self.observe("doubled", 2 * terms["ce"])

    module, metrics, _ = fitted(Graph)
    assert metrics["train/doubled"].item() == pytest.approx(2 * metrics["train/ce"].item(), rel=1e-5)
    module.terms(Batch(torch.rand(4, *SHAPE), torch.arange(4) % 3))
    assert not module._observed["doubled"].requires_grad


def test_what_was_observed_in_one_batch_is_not_logged_for_the_next():
    class Even(Watching):
        def look(self, batch, terms):
            if self.trainer.fit_loop.batch_idx in (0, 2):
                self.observe("even", batch.input.mean())

    _, metrics, data = fitted(Even)
    means = [batch.input.mean().item() for batch in data.train_dataloader()]
    # Both have 7 samples.
    assert metrics["train/even"].item() == pytest.approx((means[0] + means[2]) / 2, rel=1e-5)
    assert abs(means[0] - means[2]) > 1e-3


def test_the_last_of_two_values_of_one_name_counts():
    class Twice(Watching):
        def look(self, batch, terms):
            self.observe("value", torch.ones(()))
            self.observe("value", torch.full((), 3.0))

    assert fitted(Twice)[1]["train/value"].item() == 3


def test_observing_beside_several_terms_leaves_their_shares():
    class Both(Watching):
        def terms(self, batch):
            logits = self.student(batch.input)
            self.observe("size", logits.abs().mean())
            return {"ce": F.cross_entropy(logits, batch.target), "square": logits.square().mean()}

        def weights(self):
            return {"ce": 1.0, "square": 0.5}

    _, metrics, _ = fitted(Both)
    assert {name for name in metrics if name.startswith("train/")} == {
        "train/loss", "train/ce", "train/square", "train/ce_share", "train/square_share", "train/size",
    }  # fmt: skip
    total = metrics["train/ce"].item() + 0.5 * metrics["train/square"].item()
    assert metrics["train/loss"].item() == pytest.approx(total, rel=1e-5)
    assert metrics["train/ce_share"].item() + metrics["train/square_share"].item() == pytest.approx(1, rel=1e-5)


class TwoLoaders(TinyDataModule):
    """The validation data, and the test data beside them, which have other labels here."""

    def val_dataloader(self):
        return [super().val_dataloader(), self.other()]

    def test_dataloader(self):
        return [super().val_dataloader(), self.other()]

    def predict_dataloader(self):
        return [super().val_dataloader(), self.other()]

    def other(self):
        batches = list(super().test_dataloader())
        wrong = (torch.cat([batch.target for batch in batches]) + 1) % 3
        return DataLoader(TensorDataset(torch.cat([batch.input for batch in batches]), wrong), batch_size=5)


def alone(build, number, stage):
    """What one of the two loaders gives without the other."""
    data = TwoLoaders(val_size=21)
    data.setup()
    run = getattr(tiny_trainer(), "validate" if stage == "val" else "test")
    return run(build(), data.val_dataloader()[number], verbose=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["val", "test"])
def test_several_loaders_have_numbers_of_their_own(stage):
    run = "validate" if stage == "val" else "test"
    both = getattr(tiny_trainer(), run)(kd(), datamodule=TwoLoaders(val_size=21), verbose=False)
    for number, found in enumerate(both):
        expected = alone(kd, number, stage)
        assert f"{stage}/teacher_kl" in expected
        assert found == {f"{name}/dataloader_idx_{number}": value for name, value in expected.items()}
    accuracies = [found[f"{stage}/accuracy/dataloader_idx_{number}"] for number, found in enumerate(both)]
    assert accuracies[0] != accuracies[1]


@pytest.mark.slow
def test_several_loaders_in_every_epoch_of_a_fit_and_after_it():
    seen = []

    class Look(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name})

    module = kd()
    data = TwoLoaders(val_size=21)
    trainer = tiny_trainer(max_epochs=2, num_sanity_val_steps=2, callbacks=[Look()])
    trainer.fit(module, datamodule=data)
    assert len(seen) == 2
    again = tiny_trainer().validate(module, datamodule=data, verbose=False)
    assert {name: value for found in again for name, value in found.items()} == seen[-1]
    # One loader again: nothing is left of the other.
    one = tiny_trainer().validate(module, data.val_dataloader()[0], verbose=False)[0]
    assert one["val/nll"] == seen[-1]["val/nll/dataloader_idx_0"]
    predictions = tiny_trainer().predict(module, datamodule=data)
    assert [sum(len(batch) for batch in found) for found in predictions] == [21, 24]


@pytest.mark.slow
def test_a_paraphraser_and_a_generator_take_several_loaders():
    def paraphraser():
        torch.manual_seed(0)
        return ParaphraserModule([TinyNet(), TinyNet()], layers="features", input_shape=SHAPE)

    def generator():
        torch.manual_seed(0)
        return GeneratorModule(input_shape=SHAPE, output_range=(-4.0, 4.0))

    expected = [alone(paraphraser, number, "val") for number in range(2)]
    found = tiny_trainer().validate(paraphraser(), datamodule=TwoLoaders(val_size=21), verbose=False)
    for number, (of_loader, values) in enumerate(zip(found, expected, strict=True)):
        assert of_loader == {f"{name}/dataloader_idx_{number}": value for name, value in values.items()}
    found = tiny_trainer().validate(generator(), datamodule=TwoLoaders(val_size=21), verbose=False)
    assert [sorted(values) for values in found] == [
        [f"val/{name}/dataloader_idx_{number}" for name in ("kl", "loss", "reconstruction")] for number in range(2)
    ]


@pytest.mark.slow
def test_metrics_that_share_their_states_are_counted_by_loader():
    """torchmetrics keeps one state for metrics of a collection that count alike."""

    def build():
        torch.manual_seed(0)
        metrics = MetricCollection([MulticlassRecall(3), MulticlassPrecision(3)])
        return SupervisedModule(TinyNet(), num_classes=3, metrics=metrics)

    expected = [alone(build, number, "val") for number in range(2)]
    module = build()
    for _ in range(2):
        found = tiny_trainer().validate(module, datamodule=TwoLoaders(val_size=21), verbose=False)
        for number, (of_loader, values) in enumerate(zip(found, expected, strict=True)):
            assert of_loader == {f"{name}/dataloader_idx_{number}": value for name, value in values.items()}


# What a distributed sampler repeats


class Five(pl.LightningDataModule):
    """Five samples, one without a label, which two processes can only share by reading one of them twice."""

    def __init__(self, *, own_batches=False):
        super().__init__()
        self.own_batches = own_batches

    def loader(self):
        generator = torch.Generator().manual_seed(0)
        samples = TensorDataset(torch.randn(5, *SHAPE, generator=generator), torch.tensor([0, 1, 2, -100, 1]))
        if self.own_batches:
            return DataLoader(samples, batch_sampler=OwnBatches(SequentialSampler(samples), 2, drop_last=False))
        return DataLoader(samples, 2)

    train_dataloader = val_dataloader = test_dataloader = loader


class OwnBatches(BatchSampler):
    pass


def metrics_of_processes(verb, processes, data):
    torch.manual_seed(0)
    student, teacher = TinyNet(norm="group"), TinyNet(norm="group")
    for network in (student, teacher):
        nn.init.normal_(network.head.weight, std=5.0)
    module = KDModule(student, teacher, num_classes=3, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    options = {"devices": 2, "strategy": "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"}
    trainer = tiny_trainer(**(options if processes == 2 else {}))
    getattr(trainer, verb)(module, datamodule=data)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("train/")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*it is recommended to use `Trainer.devices=1")
@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_two_processes_count_every_sample_of_any_data_once(verb):
    one, two = (metrics_of_processes(verb, processes, Five()) for processes in (1, 2))
    assert one == {name: pytest.approx(two[name], rel=1e-5, abs=1e-6) for name in one}
    assert len(one) > 6


@pytest.mark.slow
def test_samples_that_cannot_be_told_are_told_of(tmp_path):
    module = SupervisedModule(TinyNet(), num_classes=3)
    loader = Five(own_batches=True).loader()
    loader.batch_sampler.sampler = DistributedSampler(loader.dataset, 2, 0, shuffle=False)
    loop = SimpleNamespace(_combined_loader=SimpleNamespace(flattened=[loader]))
    module._trainer = SimpleNamespace(world_size=2, _evaluation_loop=loop)
    with pytest.warns(UserWarning, match="1 samples are evaluated twice"):
        assert repeated_rows(module, 1, 0, 1) is None
