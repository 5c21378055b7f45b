"""RegressionModule: both terms against plain loops, the burn-in, the bounds, the metrics and the refusals."""

import copy
import math
import statistics

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from distill_lightning import Batch, Categorical, Gaussian, InputError, RegressionModule, SmallResNet, SupervisedModule
from distill_lightning.layers import GaussianHead
from distill_lightning.networks import without_deviation
from distill_lightning.networks.weights import read_weights
from distill_lightning.testing import CONTRACT, TinyDataModule, TinyNet, tiny_trainer

SHAPE = (1, 8, 8)


def batch_of(count=5, targets=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(count, *SHAPE, generator=generator), torch.randn(count, targets, generator=generator) * 3)


class Given(nn.Module):
    """Gives its table, whatever it reads, so a test says what a network answers."""

    def __init__(self, output):
        super().__init__()
        self.output = nn.Parameter(torch.as_tensor(output))

    def forward(self, inputs):
        return self.output


def terms_of(output, target, /, **options):
    output = torch.as_tensor(output)
    module = RegressionModule(Given(output), num_targets=output.shape[1] // 2, **options)
    target = torch.as_tensor(target)
    return module, module.terms(Batch(torch.zeros(len(target), 1), target))


def naive_terms(output, target, bounds=(-10, 10)):
    """Explicit loops over samples and targets, in double precision."""
    squared_error = nll = 0.0
    for row, values in zip(output.tolist(), target.tolist(), strict=True):
        for j, y in enumerate(values):
            m, s = row[j], min(max(row[len(values) + j], bounds[0]), bounds[1])
            squared_error += (y - m) ** 2 / 2
            nll += (s + (y - m) ** 2 / math.exp(s) + math.log(2 * math.pi)) / 2
    return squared_error / len(output), nll / len(output)


@pytest.mark.parametrize("targets", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 6])
def test_terms_equal_the_naive_reference(targets, count):
    torch.manual_seed(targets)
    student = TinyNet(None, num_targets=targets).eval()
    # A fresh head gives log-variances of 0 for every input.
    nn.init.normal_(student.head.weight)
    nn.init.normal_(student.head.bias)
    module = RegressionModule(student, num_targets=targets)
    batch = batch_of(count, targets)
    terms = module.terms(batch)
    squared_error, nll = naive_terms(student(batch.input).detach().double(), batch.target)
    assert list(terms) == ["squared_error", "nll"]
    assert float(terms["squared_error"]) == pytest.approx(squared_error, rel=1e-5)
    assert float(terms["nll"]) == pytest.approx(nll, rel=1e-5)


def test_the_likelihood_is_that_of_torchs_normal():
    output, target = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    normal = torch.distributions.Normal(output[:, :2], torch.exp(output[:, 2:] / 2))
    _, terms = terms_of(output, target)
    assert float(terms["nll"]) == pytest.approx(float(-normal.log_prob(target).sum(dim=1).mean()), rel=1e-12)


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    output, target = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    error, log_var = output[:, :2] - target, output[:, 2:]
    expected = {
        "squared_error": torch.cat([error, torch.zeros_like(error)], dim=1) / 5,
        "nll": torch.cat([error * torch.exp(-log_var), (1 - error**2 * torch.exp(-log_var)) / 2], dim=1) / 5,
    }
    for name, gradient in expected.items():
        module, terms = terms_of(output, target)
        terms[name].backward()
        torch.testing.assert_close(module.student.output.grad, gradient, rtol=1e-12, atol=1e-14)


def test_the_best_variance_is_the_mean_squared_error():
    # Four targets at distance 1, 2, 3 and 4 of a mean that cannot follow.
    best = math.log(7.5)
    target = [[1.0], [-2.0], [3.0], [-4.0]]
    values = [
        float(terms_of(torch.tensor([[0.0, log_var]] * 4, dtype=torch.float64), target)[1]["nll"])
        for log_var in (best - 0.01, best, best + 0.01)
    ]
    assert values[1] < min(values[0], values[2])


# The bounds


@pytest.mark.parametrize("bounds", [(-10.0, 10.0), (-1.0, 2.0), [-3, 0.5]])
def test_log_variances_are_clamped_in_the_loss_and_in_the_metrics(bounds):
    output = torch.tensor([[0.5, -50.0], [0.5, 50.0], [0.5, -0.25]])
    target = torch.tensor([[0.0], [1.0], [2.0]])
    module, terms = terms_of(output, target, output=Gaussian(1, log_var_bounds=bounds))
    assert float(terms["nll"]) == pytest.approx(naive_terms(output, target, bounds)[1], rel=1e-5)
    assert module.output.prediction(output).tolist() == [[0.5, bounds[0]], [0.5, bounds[1]], [0.5, -0.25]]
    terms["nll"].backward()
    gradient = module.student.output.grad[:, 1].tolist()
    assert gradient[:2] == [0, 0]
    assert gradient[2] != 0


def test_the_bounds_are_ten_nats_by_default():
    _, terms = terms_of([[0.0, 11.0]], [[0.0]])
    assert float(terms["nll"]) == pytest.approx((10 + math.log(2 * math.pi)) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("log_var", [-50.0, 50.0])
def test_extreme_outputs_stay_finite(dtype, log_var):
    # In half precision an error of 2e4 squared is infinite.
    output = torch.tensor([[1e4, -1e4, log_var, log_var]], dtype=dtype)
    target = torch.tensor([[-1e4, 0.0]])
    module, terms = terms_of(output, target)
    squared_error, nll = naive_terms(output.double(), target)
    assert float(terms["squared_error"]) == pytest.approx(squared_error, rel=1e-5)
    assert float(terms["nll"]) == pytest.approx(nll, rel=1e-4)
    assert all(term.dtype == torch.float32 for term in terms.values())
    (1e-9 * sum(terms.values())).backward()
    assert torch.isfinite(module.student.output.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_targets_of_any_kind_of_number_are_read(dtype):
    target = torch.tensor([[1], [-2], [3]], dtype=dtype)
    output = torch.randn(3, 2)
    _, terms = terms_of(output, target)
    assert float(terms["nll"]) == pytest.approx(naive_terms(output, target)[1], rel=1e-5)


# What counts


@pytest.mark.parametrize("counted", [[True, False, True, True, False], [False, True, False, False, False]])
def test_samples_that_do_not_count_have_no_part_in_the_terms(counted):
    output, target = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    kept = torch.tensor(counted)
    target[~kept] = math.nan
    module = RegressionModule(Given(output), num_targets=2)
    terms = module.terms(Batch(torch.zeros(5, 1), target, counted=kept))
    squared_error, nll = naive_terms(output[kept], target[kept])
    assert float(terms["squared_error"]) == pytest.approx(squared_error, rel=1e-12)
    assert float(terms["nll"]) == pytest.approx(nll, rel=1e-12)
    sum(terms.values()).backward()
    assert torch.equal(module.student.output.grad.abs().sum(dim=1) > 0, kept)


# Plain training with a Gaussian


def test_plain_training_with_a_gaussian_is_regression_bit_for_bit():
    states, logged = [], []
    for kind, options in ((RegressionModule, {"num_targets": 2}), (SupervisedModule, {"output": Gaussian(2)})):
        torch.manual_seed(0)
        module = kind(TinyNet(None, num_targets=2), **options)
        trainer = tiny_trainer(max_epochs=2)
        trainer.fit(module, datamodule=TinyDataModule(num_targets=2))
        states.append(module.student.state_dict())
        logged.append(trainer.callback_metrics)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert {name for name in logged[1] if name.startswith("train/")} == {"train/loss", "train/nll"}
    for name, value in logged[1].items():
        assert torch.equal(value, logged[0][name]), name
    assert {"val/mae", "val/rmse", "val/nll", "val/calibration_error"} <= logged[1].keys()


# The burn-in


class Recorder(RegressionModule):
    """Notes the epoch and the weights of every step."""

    def weights(self):
        weights = super().weights()
        self.__dict__.setdefault("seen", []).append((self.current_epoch, weights["squared_error"], weights["nll"]))
        return weights


@pytest.mark.slow
@pytest.mark.parametrize("burn_in", [0, 1, 2, 5])
def test_the_burn_in_switches_at_its_epoch(burn_in):
    module = Recorder(TinyNet(None, num_targets=1), num_targets=1, burn_in_epochs=burn_in)
    tiny_trainer(max_epochs=3).fit(module, datamodule=TinyDataModule(num_targets=1))
    assert module.seen == [(epoch, *((1, 0) if epoch < burn_in else (0, 1))) for epoch in range(3) for _ in range(3)]


def test_there_is_no_burn_in_by_default():
    assert RegressionModule(TinyNet(None, num_targets=1)).weights() == {"squared_error": 0, "nll": 1}


def test_the_burn_in_trains_the_mean_alone():
    heads, losses = [], []

    class Watch(RegressionModule):
        def on_train_epoch_end(self):
            heads.append(copy.deepcopy(self.student.head.state_dict()))
            losses.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    module = Watch(
        TinyNet(None, num_targets=2), num_targets=2, burn_in_epochs=2,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    )  # fmt: skip
    tiny_trainer(max_epochs=3).fit(module, datamodule=TinyDataModule(num_targets=2, batch_size=24))
    means, deviations = ([head["weight"][rows] for head in heads] for rows in (slice(0, 2), slice(2, 4)))
    assert not torch.equal(means[0], means[1])
    assert not deviations[0].any()
    assert not deviations[1].any()
    assert deviations[2].abs().min() > 0
    assert [logged["train/loss"] for logged in losses] == [
        losses[0]["train/squared_error"], losses[1]["train/squared_error"], losses[2]["train/nll"],
    ]  # fmt: skip
    assert all({"train/squared_error", "train/nll"} <= logged.keys() for logged in losses)


def test_the_burn_in_is_plain_regression():
    states = []
    for plain in (False, True):
        torch.manual_seed(0)
        student = TinyNet(None, num_targets=1)
        module = RegressionModule(student, num_targets=1, burn_in_epochs=2)
        if plain:
            module.terms = lambda batch, net=student: {
                "squared_error": F.mse_loss(net(batch.input)[:, :1], batch.target) / 2
            }
            module.weights = lambda: {"squared_error": 1.0}
        tiny_trainer(max_epochs=2).fit(module, datamodule=TinyDataModule(num_targets=1))
        states.append(student.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-5, atol=1e-7)


# What is logged and learnt


def naive_metrics(outputs, targets):
    pairs = [
        (row[j], row[len(values) + j], y)
        for row, values in zip(outputs.tolist(), targets.tolist(), strict=True)
        for j, y in enumerate(values)
    ]
    off = []
    for level in (k / 10 for k in range(1, 10)):
        z = statistics.NormalDist().inv_cdf((1 + level) / 2)
        inside = [abs(y - m) / math.exp(s / 2) <= z for m, s, y in pairs]
        off.append(abs(sum(inside) / len(inside) - level))
    return {
        "mae": statistics.fmean(abs(y - m) for m, _, y in pairs),
        "rmse": math.sqrt(statistics.fmean((y - m) ** 2 for m, _, y in pairs)),
        "nll": naive_terms(outputs, targets, (-math.inf, math.inf))[1],
        "calibration_error": statistics.fmean(off),
    }


@pytest.mark.parametrize("targets", [1, 3])
def test_the_metrics_in_validation_and_test_are_the_naive_ones(targets):
    torch.manual_seed(0)
    student = TinyNet(None, num_targets=targets).eval()
    nn.init.normal_(student.head.weight, std=3)
    # Some log-variances lie outside these bounds, and the metrics must read the clamped ones.
    bounds = (-0.2, 0.3)
    module = RegressionModule(student, num_targets=targets, output=Gaussian(targets, log_var_bounds=bounds))
    data = TinyDataModule(num_targets=targets, val_size=19, batch_size=8)
    trainer = tiny_trainer()
    logged = {**trainer.validate(module, datamodule=data, verbose=False)[0]}
    logged |= trainer.test(module, datamodule=data, verbose=False)[0]
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = list(loader)
        with torch.no_grad():
            outputs = torch.cat([student(batch.input) for batch in batches]).double()
        outside = (outputs[:, targets:] < bounds[0]) | (outputs[:, targets:] > bounds[1])
        assert 0 < int(outside.sum()) < outside.numel()
        outputs[:, targets:].clamp_(*bounds)
        expected = naive_metrics(outputs, torch.cat([batch.target for batch in batches]).double())
        found = {name.split("/")[1]: value for name, value in logged.items() if name.startswith(split)}
        assert found == pytest.approx(expected, rel=1e-4)


def test_training_logs_both_terms_and_no_teacher():
    trainer = tiny_trainer()
    module = RegressionModule(TinyNet(None, num_targets=1), num_targets=1)
    trainer.fit(module, datamodule=TinyDataModule(num_targets=1))
    logged = trainer.callback_metrics
    train = {name for name in logged if name.startswith("train/")}
    assert train == {"train/loss", "train/squared_error", "train/nll", "train/nll_share"}
    assert {name for name in logged if name.startswith("val/")} == {
        f"val/{n}" for n in ("mae", "rmse", "nll", "calibration_error")
    }
    assert module.teacher_prediction(batch_of(targets=1)) is None


def test_plateau_watches_the_likelihood():
    module = RegressionModule(
        TinyNet(None, num_targets=1), num_targets=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5, threshold=1.0),
    )  # fmt: skip
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=TinyDataModule(num_targets=1))
    assert trainer.lr_scheduler_configs[0].monitor == "val/nll"


@pytest.mark.slow
def test_the_deviation_is_learnt_where_the_noise_is():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(1024, 1, generator=generator) * 2 - 1
    noise = torch.where(inputs > 0, 0.5, 0.05)
    targets = 2 * inputs + noise * torch.randn(1024, 1, generator=generator)
    torch.manual_seed(0)
    module = RegressionModule(
        nn.Sequential(nn.Linear(1, 32), nn.Tanh(), GaussianHead(32, 1)), num_targets=1, burn_in_epochs=3,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    )  # fmt: skip
    batches = [Batch(x, y) for x, y in zip(inputs.split(128), targets.split(128), strict=True)]
    loader = DataLoader(batches, batch_size=None)
    tiny_trainer(max_epochs=20, limit_val_batches=0).fit(module, loader, loader)
    with torch.no_grad():
        mean, log_var = module(torch.tensor([[-0.6], [0.6]])).T
    assert mean.tolist() == pytest.approx([-1.2, 1.2], abs=0.3)
    quiet, noisy = (log_var / 2).exp().tolist()
    assert 0.03 < quiet < 0.1
    assert 0.3 < noisy < 0.8


def test_the_exported_means_are_the_trained_networks(tmp_path):
    module = RegressionModule(TinyNet(None, num_targets=2), num_targets=2)
    tiny_trainer().fit(module, datamodule=TinyDataModule(num_targets=2))
    plain = TinyNet(None, num_targets=2)
    plain.load_state_dict(read_weights(module.export_student(tmp_path / "student.safetensors")), strict=True)
    batch = batch_of()
    module.eval()
    with torch.no_grad():
        output = module(batch.input)
        assert torch.equal(plain.eval()(batch.input), output)
        assert torch.equal(without_deviation(module.student)(batch.input), output[:, :2])


def test_a_checkpoint_rebuilds_the_module_alone(tmp_path):
    output = Gaussian(2, log_var_bounds=(-4.0, 5.0))
    options = {"num_targets": 2, "burn_in_epochs": 3, "output": output, "input_shape": SHAPE}
    module = RegressionModule(SmallResNet(num_targets=2, width=2), **options)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule(num_targets=2))
    trainer.save_checkpoint(tmp_path / "regression.ckpt")
    loaded = RegressionModule.load_from_checkpoint(tmp_path / "regression.ckpt")
    assert (loaded.num_targets, loaded.burn_in_epochs, loaded.output) == (2, 3, output)
    for name, value in module.student.state_dict().items():
        assert torch.equal(value, loaded.student.state_dict()[name]), name


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"burn_in_epochs": -1}, "burn_in_epochs cannot be negative, got -1"),
        ({"num_targets": 0}, "num_targets must be at least 1, got 0"),
        ({"num_classes": 3}, r"needs either num_classes \(a classifier\) or num_targets \(a regression\)"),
        (
            {"output": Gaussian(3)},
            r"output=Gaussian\(num_targets=3, .*\) does not go with num_targets=2: let them agree",
        ),
        (
            {"output": Categorical(4)},
            r"output=Categorical\(num_classes=4, class_dim=None\) does not go with num_targets=2",
        ),
        (
            {"num_targets": 1, "input_shape": SHAPE},
            r"student \(TinyNet\) has an output of shape \(1, 4\) where num_targets=1 needs \(N, 2\)",
        ),
        ({"input_shape": (3, 8, 8)}, "does not take an input of shape"),
    ],
)
def test_refusals_name_what_is_wrong(options, message):
    with pytest.raises(InputError, match=message):
        RegressionModule(TinyNet(None, num_targets=2), **({"num_targets": 2} | options))


@pytest.mark.parametrize("bounds", [(10.0, -10.0), (1.0, 1.0)])
def test_bounds_in_the_wrong_order_are_refused(bounds):
    with pytest.raises(
        InputError, match=rf"log_var_bounds must be \(smallest, largest\), got \({bounds[0]}, {bounds[1]}\)"
    ):
        Gaussian(2, log_var_bounds=bounds)


@pytest.mark.parametrize(
    ("columns", "target"),
    [
        (2, torch.zeros(4)),  # (N,) against (N, 1) would be compared all with all
        (2, torch.zeros(4, 2)),
        (4, torch.zeros(4, 1)),
    ],
)
def test_targets_and_outputs_that_do_not_fit_are_refused(columns, target):
    with pytest.raises(InputError, match="must have the same shape"):
        terms_of(torch.zeros(4, columns), target)


def test_an_odd_number_of_outputs_is_refused():
    with pytest.raises(InputError, match=r"parameters are \(N, 2 d\), means and log-variances; got \(4, 3\)"):
        terms_of(torch.zeros(4, 3), torch.zeros(4, 1))


def flat_and_column(module, **changes):
    """A batch with targets (N,), and the same one with targets (N, 1)."""
    batch = Batch(torch.rand(6, *SHAPE), torch.randn(6), **changes)
    for targets in (batch.target, batch.target[:, None]):
        yield module.prepared(batch.replace(target=targets))


def test_a_single_target_needs_no_dimension_of_its_own():
    module = RegressionModule(TinyNet(None, num_targets=1), num_targets=1).eval()
    flat, column = flat_and_column(module, counted=torch.tensor([True] * 5 + [False]))
    assert flat.target.shape == (6, 1)
    assert torch.equal(flat.target, column.target)
    assert all(torch.equal(value, module.terms(column)[name]) for name, value in module.terms(flat).items())


def test_flat_targets_are_looked_at_one_by_one():
    module = RegressionModule(TinyNet(None, num_targets=1), num_targets=1)
    targets = torch.tensor([0.5, 1.0, math.nan, 2.0])
    with pytest.raises(InputError, match="label of sample 2 .* is nan, and labels must be finite"):
        module.guard.look(module, Batch(torch.rand(4, *SHAPE), targets), 0, "train")
    with pytest.raises(InputError, match=r"targets have shape \(4,\) where num_targets=1 needs \(N, 1\)"):
        module.guard.look(module, Batch(torch.rand(4, *SHAPE), torch.arange(4)), 0, "train")


# The contract


def regression(student, teachers, num_classes):
    return RegressionModule(student, num_targets=1, burn_in_epochs=1, input_shape=SHAPE)


regression.num_targets = 1


@pytest.mark.slow
@pytest.mark.parametrize("point", CONTRACT)
def test_contract(point):
    CONTRACT[point](regression)
