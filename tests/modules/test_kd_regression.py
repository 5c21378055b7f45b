"""KD of a regression: both terms against plain loops, its end, its store, its checkpoint and the contract."""

import math

import pytest
import torch

from distill_lightning import (
    Batch,
    Gaussian,
    InputError,
    KDModule,
    SmallResNet,
    SupervisedModule,
    TeacherEnsemble,
    TeacherStore,
)
from distill_lightning.testing import CONTRACT, TinyDataModule, TinyNet, tiny_trainer

SHAPE = (1, 8, 8)


def net(targets, seed):
    """A network in eval mode whose log-variances depend on its input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TinyNet(None, num_targets=targets).eval()
        torch.nn.init.normal_(network.head.weight)
    return network


def batch_of(count=5, targets=2, counted=None):
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.rand(count, *SHAPE, generator=generator), torch.randn(count, targets, generator=generator)
    return Batch(inputs, target, counted=counted)


def naive_terms(student, teachers, target, weights, rows):
    """Explicit loops over samples and targets, in double precision."""
    nll = kd = 0.0
    d = target.shape[1]
    shares = [weight / sum(weights) for weight in weights]
    for n in rows:
        for j in range(d):
            m, v, y = float(student[n, j]), math.exp(float(student[n, d + j])), float(target[n, j])
            nll += (math.log(v) + (y - m) ** 2 / v + math.log(2 * math.pi)) / 2
            means = [float(teacher[n, j]) for teacher in teachers]
            seconds = [math.exp(float(t[n, d + j])) + mean**2 for t, mean in zip(teachers, means, strict=True)]
            mean = sum(w * one for w, one in zip(shares, means, strict=True))
            variance = sum(w * second for w, second in zip(shares, seconds, strict=True)) - mean**2
            kd += (math.log(v / variance) + variance / v + (mean - m) ** 2 / v - 1) / 2
    return nll / len(rows), kd / len(rows)


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("counted", [None, [True, False, True, True, False]])
def test_terms_equal_the_naive_reference(targets, members, counted):
    student, *networks = (net(targets, seed) for seed in range(1 + members))
    weights = [1.0, 2.0, 5.0][:members]
    module = KDModule(student, TeacherEnsemble(networks, weights), num_targets=targets).eval()
    batch = batch_of(targets=targets, counted=None if counted is None else torch.tensor(counted))
    with torch.no_grad():
        outputs = [network(batch.input).double() for network in (student, *networks)]
    rows = [row for row in range(5) if counted is None or counted[row]]
    nll, kd = naive_terms(outputs[0], outputs[1:], batch.target, weights, rows)
    terms = module.terms(batch)
    assert list(terms) == ["nll", "kd"]
    assert float(terms["nll"]) == pytest.approx(nll, rel=1e-5)
    assert float(terms["kd"]) == pytest.approx(kd, rel=1e-4)
    assert module.weights() == {"nll": 0.1, "kd": 0.9}


@pytest.mark.parametrize("variance", [0.5, [0.5, 2.0]])
def test_teachers_of_means_have_the_given_variance(variance):
    student, teacher = net(2, 0), TinyNet(2).eval()
    module = KDModule(student, teacher, num_targets=2, output=Gaussian(2, teacher_variance=variance)).eval()
    batch = batch_of()
    with torch.no_grad():
        means = teacher(batch.input).double()
        told = torch.cat([means, torch.tensor(variance, dtype=torch.float64).log().expand(5, 2)], dim=1)
        _, kd = naive_terms(student(batch.input).double(), [told], batch.target, [1.0], range(5))
    assert float(module.terms(batch)["kd"]) == pytest.approx(kd, rel=1e-4)


def fitted(module, **options):
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=TinyDataModule(num_targets=2, **options))
    return module.student.state_dict(), trainer.callback_metrics


def test_only_labels_is_plain_regression_bit_for_bit():
    state, logged = fitted(KDModule(net(2, 0), net(2, 1), num_targets=2, hard_label_weight=1.0))
    plain, known = fitted(SupervisedModule(net(2, 0), output=Gaussian(2)))
    assert all(torch.equal(value, plain[name]) for name, value in state.items())
    assert torch.equal(logged["train/nll"], known["train/nll"])
    assert torch.equal(logged["val/mae"], known["val/mae"])


def test_it_logs_both_terms_and_how_close_the_student_is():
    _, logged = fitted(KDModule(net(2, 0), [net(2, 1), net(2, 2)], num_targets=2))
    train = {name.removeprefix("train/") for name in logged if name.startswith("train/")}
    assert train == {"loss", "nll", "nll_share", "kd", "kd_share"}
    assert {name for name in logged if name.startswith("val/")} == {
        f"val/{name}" for name in ("mae", "rmse", "nll", "calibration_error", "teacher_kl")
    }


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["answers", "logits"])
def test_a_complete_store_stands_for_the_teachers(tmp_path, keep):
    def module(teachers):
        return KDModule(net(2, 0), teachers, num_targets=2)

    networks = [net(2, 1), net(2, 2)]
    live, _ = fitted(module(networks), views=1)
    options = {"keep": keep, "dtype": "float32"}
    filled, _ = fitted(module(TeacherStore(tmp_path / "store", networks, **options)), views=1)
    calls = []
    for network in networks:
        network.register_forward_hook(lambda *_: calls.append("teacher"))
    read, _ = fitted(module(TeacherStore(tmp_path / "store", **options)), views=1)
    assert not calls
    for name, value in live.items():
        assert torch.equal(value, filled[name]), name
        assert torch.equal(value, read[name]), name


def test_a_checkpoint_keeps_what_an_output_means(tmp_path):
    output = Gaussian(2, log_var_bounds=(-4.0, 5.0))
    teachers = [SmallResNet(num_targets=2, width=2) for _ in range(2)]
    module = KDModule(SmallResNet(num_targets=2, width=2), teachers, num_targets=2, output=output)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule(num_targets=2))
    trainer.save_checkpoint(tmp_path / "kd.ckpt")
    loaded = KDModule.load_from_checkpoint(tmp_path / "kd.ckpt", teachers=teachers)
    assert (loaded.num_targets, loaded.num_classes, loaded.output) == (2, None, output)
    for name, value in module.student.state_dict().items():
        assert torch.equal(value, loaded.student.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_classes": 3},
            r"KDModule needs either num_classes \(a classifier\) or num_targets \(a regression\)",
        ),
        ({"output": Gaussian(3)}, r"output=Gaussian\(num_targets=3, .* does not go with num_targets=2: let them agree"),
        ({"num_targets": 3, "input_shape": SHAPE}, r"where num_targets=3 needs \(N, 6\), means and log-variances"),
        ({"num_targets": 0}, "num_targets must be at least 1, got 0"),
    ],
)
def test_refusals_name_what_is_wrong(options, message):
    with pytest.raises(InputError, match=message):
        KDModule(net(2, 0), net(2, 1), **({"num_targets": 2} | options))


def test_a_rule_for_probabilities_is_refused():
    teachers = TeacherEnsemble([net(2, 1), net(2, 2)], combine="logits")
    with pytest.raises(InputError, match="collapsed to one Gaussian: combine has no meaning there"):
        KDModule(net(2, 0), teachers, num_targets=2).terms(batch_of())


# The contract


def regression(student, teachers, num_classes):
    return KDModule(student, TeacherEnsemble(teachers, weights=[1, 3]), num_targets=2)


regression.num_targets = 2


@pytest.mark.slow
@pytest.mark.parametrize("point", CONTRACT)
def test_contract(point):
    CONTRACT[point](regression)
