"""Metrics whose counts and sums no conversion of the networks around them rounds."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError, MetricCollection

from distill_lightning import (
    GapReduction,
    KDModule,
    ParaphraserModule,
    RegressionModule,
    SelfKDModule,
    SupervisedModule,
)
from distill_lightning.functional import area_under_risk_coverage, gap_reduction, hard_targets, interval_error
from distill_lightning.outputs.metrics import (
    AURC,
    Accuracy,
    Agreement,
    AngularError,
    BoxMetric,
    BrierScore,
    CalibrationError,
    COCOAveragePrecision,
    Confidences,
    DetectionCalibrationError,
    GaussianDivergence,
    GaussianMeanAbsoluteError,
    GaussianNegativeLogLikelihood,
    GaussianRootMeanSquaredError,
    IntervalCalibration,
    MeanDivergence,
    NegativeLogLikelihood,
    Perplexity,
    VOC07AveragePrecision,
    classification_metrics,
    regression_metrics,
)
from distill_lightning.outputs.metrics.exact import ExactMetric
from distill_lightning.outputs.metrics.mean import SampleMean
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

HALVES = [torch.bfloat16, torch.float16]
CONVERSIONS = {
    "to": lambda module, dtype: module.to(dtype),
    "to device and type": lambda module, dtype: module.to("cpu", dtype),
    "type": lambda module, dtype: module.type(dtype),
    "method": lambda module, dtype: module.bfloat16() if dtype == torch.bfloat16 else module.half(),
}
METRICS = {
    Accuracy: {},
    NegativeLogLikelihood: {},
    Perplexity: {},
    BrierScore: {},
    CalibrationError: {},
    Confidences: {},
    AURC: {},
    Agreement: {},
    MeanDivergence: {},
    GaussianMeanAbsoluteError: {"num_targets": 1},
    GaussianRootMeanSquaredError: {"num_targets": 1},
    GaussianNegativeLogLikelihood: {"num_targets": 1},
    IntervalCalibration: {"num_targets": 1},
    GaussianDivergence: {},
    AngularError: {},
    COCOAveragePrecision: {"num_classes": 2},
    VOC07AveragePrecision: {"num_classes": 2},
    DetectionCalibrationError: {},
}


def of_kind(metric, updates=300, seed=0):
    """Batches of 64 that a metric takes."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(updates):
        first, second = torch.randn(64, 2, generator=generator), torch.randn(64, 2, generator=generator)
        if isinstance(metric, BoxMetric):
            if number < 8:
                yield [on_an_image(first)], [on_an_image(second[:8])]
        elif isinstance(metric, (Agreement, GaussianDivergence, AngularError)):
            yield first, second
        elif isinstance(metric, MeanDivergence):
            yield first, second.log_softmax(dim=1)
        elif hasattr(metric, "num_targets"):
            yield first, second[:, :1]
        else:
            yield first, second.argmax(dim=1)


def on_an_image(corners):
    """Boxes of one size at different places, most of which overlap, with classes and scores."""
    places = 100 + 10 * corners
    labels = 1 + (corners[:, 0] > 0).long()
    return {"boxes": torch.cat([places, places + 30], dim=1), "labels": labels, "scores": corners[:, 1].sigmoid()}


def value_of(metric, batches):
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


def same(first, second):
    """Bit for bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[name]) for name, value in first.items())
    if isinstance(first, tuple):
        return all(same(*pair) for pair in zip(first, second, strict=True))
    return first.dtype == second.dtype and torch.equal(first, second)


def test_every_metric_of_the_package_is_here():
    below = {kind for base in ExactMetric.__subclasses__() for kind in [base, *base.__subclasses__()]}
    below |= {kind for base in below for kind in base.__subclasses__()}
    ours = {kind for kind in below if kind.__module__.startswith("distill_lightning")}
    bases = {BoxMetric, SampleMean}
    assert ours - bases == set(METRICS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@pytest.mark.parametrize(("kind", "options"), METRICS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_converted_metric_is_the_same_to_the_last_bit(kind, options, convert, dtype):
    plain, converted = kind(**options), convert(kind(**options), dtype)
    assert converted.dtype == torch.float32
    assert same(value_of(plain, of_kind(plain)), value_of(converted, of_kind(plain)))
    # Once more in the middle, with something counted and computed.
    converted = convert(converted, dtype)
    assert same(plain.compute(), converted.compute())
    for metric in (plain, converted):
        metric.reset()
    assert same(value_of(plain, of_kind(plain, 3)), value_of(converted, of_kind(plain, 3)))


@pytest.mark.parametrize("dtype", HALVES)
def test_eight_hundred_right_batches_are_right(dtype):
    logits, target = 5 * torch.eye(10)[torch.arange(64) % 10], torch.arange(64) % 10
    metrics = classification_metrics(10).to(dtype)
    for _ in range(800):
        metrics.update(logits, target)
    values = metrics.compute()
    assert values["accuracy"] == 1
    assert values["nll"].item() == pytest.approx(nn.functional.cross_entropy(logits, target).item(), rel=1e-5)
    assert 0 < values["ece"] < 1


@pytest.mark.parametrize("kind", [lambda: classification_metrics(3), lambda: regression_metrics(1)])
def test_metrics_made_where_half_precision_is_the_default_are_exact(kind):
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = kind()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, metric in made.items():
        assert metric.dtype == torch.float32, name
        states = [state for state in metric.metric_state.values() if isinstance(state, torch.Tensor)]
        assert not [state for state in states if state.dtype == torch.bfloat16], name


def test_wider_types_are_taken_and_set_dtype_is_obeyed():
    assert Accuracy().to(torch.float64).total.dtype == torch.float64
    assert Accuracy().to(torch.float64).to(torch.bfloat16).total.dtype == torch.float64
    assert Accuracy().set_dtype(torch.bfloat16).total.dtype == torch.bfloat16


def test_a_metric_inside_another_is_exact():
    gap = GapReduction(0.5, 1.0, of=MeanSquaredError())
    module = SupervisedModule(TinyNet(), num_classes=3, metrics=MetricCollection({"gap": gap})).to(torch.float16)
    assert module.val_metrics["gap"].of.sum_squared_error.dtype == torch.float32


def test_a_network_inside_a_metric_is_converted():
    class PerceptualError(MeanSquaredError):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(2, 2)

    module = SupervisedModule(TinyNet(), num_classes=3, metrics=MetricCollection({"p": PerceptualError()}))
    metric = module.to(torch.bfloat16).val_metrics["p"]
    assert metric.network.weight.dtype == torch.bfloat16
    assert metric.sum_squared_error.dtype == torch.float32


def images(count=1600):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(count, 1, 8, 8, generator=generator)
    return inputs, torch.arange(count) % 3


class FirstProbabilityError(MeanSquaredError):
    """torchmetrics' own, of what is read from logits."""

    def update(self, preds, target):
        super().update(preds.softmax(dim=1)[:, 0], target.to(preds.dtype))


@pytest.mark.lightning(since=(2, 1))
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
def test_validation_in_half_precision_counts_like_one_in_float32(precision, dtype):
    """The same outputs, to be counted in float32."""
    inputs, target = images()
    teacher, student = TinyNet(), TinyNet()
    metrics = classification_metrics(3)
    metrics.add_metrics({"foreign": FirstProbabilityError()})
    module = KDModule(student, teacher, num_classes=3, metrics=metrics)
    loader = DataLoader(TensorDataset(inputs, target), batch_size=4)
    found = tiny_trainer(precision=precision).validate(module, loader, verbose=False)[0]
    plain, judge = copy.deepcopy(student).to(dtype).eval(), copy.deepcopy(teacher).to(dtype).eval()
    with torch.no_grad():
        pairs = [(plain(x.to(dtype)).float(), judge(x.to(dtype)).float(), y) for x, y in loader]
    for logits, _, y in pairs:
        metrics.update(logits, y)
    for name, value in metrics.compute().items():
        assert found[f"val/{name}"] == pytest.approx(value.item(), rel=1e-6), name
    agreement = value_of(Agreement(), [pair[:2] for pair in pairs])
    assert found["val/agreement"] == agreement.item()
    divergence = value_of(MeanDivergence(), [(first, second.log_softmax(dim=1)) for first, second, _ in pairs])
    # The teacher's probabilities pass through the ensemble.
    assert found["val/teacher_kl"] == pytest.approx(divergence.item(), rel=1e-4)


@pytest.mark.lightning(since=(2, 1))
@pytest.mark.slow
def test_a_regressions_validation_counts_like_one_in_float32():
    inputs, classes = images()
    target = classes[:, None].bfloat16().float() + 0.5
    student = TinyNet(None, num_targets=1)
    module = RegressionModule(student, num_targets=1)
    loader = DataLoader(TensorDataset(inputs, target), batch_size=4)
    found = tiny_trainer(precision="bf16-true").validate(module, loader, verbose=False)[0]
    plain, metrics = copy.deepcopy(student).bfloat16().eval(), regression_metrics(1)
    with torch.no_grad():
        for x, y in loader:
            metrics.update(module.output.prediction(plain(x.bfloat16())), y)
    for name, value in metrics.compute().items():
        assert found[f"val/{name}"] == pytest.approx(value.item(), rel=1e-6), name


@pytest.mark.lightning(since=(2, 1))
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_module_made_under_the_trainers_precision_is_exact(precision):
    trainer = tiny_trainer(precision=precision)
    with trainer.init_module():
        module = SupervisedModule(TinyNet(), num_classes=3, metrics=MetricCollection({"p": FirstProbabilityError()}))
    inputs, target = images(16)
    trainer.validate(module, DataLoader(TensorDataset(inputs, target), batch_size=4), verbose=False)
    assert module.val_metrics["p"].sum_squared_error.dtype == torch.float32
    assert module.val_metrics["p"].dtype == torch.float32


def test_a_paraphrasers_errors_are_exact():
    module = ParaphraserModule([TinyNet()], layers="features", input_shape=(1, 8, 8)).to(torch.bfloat16)
    assert {metric.sum_abs_error.dtype for metric in module.val_metrics[0].values()} == {torch.float32}


def test_the_score_of_a_module_in_half_precision():
    inputs, target = images(64)
    module = SupervisedModule(TinyNet(), num_classes=3).to(torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        scores = module.score([(inputs.bfloat16(), target)])
    finally:
        torch.set_default_dtype(torch.float32)
    again = module.score([(inputs.bfloat16(), target)])
    assert scores == again


@pytest.fixture
def half_by_default():
    """As in a Trainer's step under bf16-true."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_formulas_make_no_half_precision_of_integers_and_numbers(half_by_default):
    assert gap_reduction(0.7, 0.1, 0.9).item() == pytest.approx(0.75, rel=1e-6)
    assert hard_targets(torch.tensor([0, 1]), 3, label_smoothing=0.1)[0, 1].item() == pytest.approx(0.1 / 3, rel=1e-6)
    assert interval_error(torch.tensor([1, 1, 1]), 3).dtype == torch.float32
    confidence = torch.linspace(0, 1, 1001, dtype=torch.float32)
    assert area_under_risk_coverage(confidence, confidence > 0.3).dtype == torch.float32


@pytest.mark.lightning(since=(2, 1))
def test_self_kd_logs_its_own_alpha_in_half_precision():
    module = SelfKDModule(TinyNet(), num_classes=3, alpha_T=0.7)
    trainer = tiny_trainer(precision="bf16-true", max_epochs=1)
    trainer.fit(module, datamodule=TinyDataModule())
    assert trainer.callback_metrics["train/alpha"].item() == pytest.approx(0.7, rel=1e-6)
