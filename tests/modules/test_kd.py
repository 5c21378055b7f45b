"""KD against a naive reference, its ends and its refusals."""

import math

import pytest
import torch

from distill_lightning import Batch, InputError, KDModule, LabelSmoothing, SupervisedModule, TeacherEnsemble
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


def batch_of(count=5):
    return Batch(torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 3)


def softmax(row, temperature):
    exps = [math.exp(value / temperature) for value in row]
    return [value / sum(exps) for value in exps]


def naive_terms(student_logits, teacher_logits, targets, temperature, weights):
    ce = kd = 0.0
    for row, target in enumerate(targets):
        ce -= math.log(softmax(student_logits[row], 1.0)[target])
        student = softmax(student_logits[row], temperature)
        for k in range(len(student)):
            mean = sum(
                w * softmax(logits[row], temperature)[k] for w, logits in zip(weights, teacher_logits, strict=True)
            )
            kd += mean * (math.log(mean) - math.log(student[k]))
    return ce / len(targets), temperature**2 * kd / len(targets)


@pytest.mark.parametrize("teachers", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_terms_equal_the_naive_reference(teachers, temperature):
    networks = [TinyNet() for _ in range(teachers)]
    weights = [1.0, 2.0, 5.0][:teachers]
    module = KDModule(TinyNet(), TeacherEnsemble(networks, weights), num_classes=3, temperature=temperature).eval()
    batch = batch_of()
    with torch.no_grad():
        student = module.student(batch.input).double().tolist()
        logits = [network(batch.input).double().tolist() for network in networks]
    expected = naive_terms(student, logits, batch.target.tolist(), temperature, [w / sum(weights) for w in weights])
    terms = module.terms(batch)
    assert float(terms["ce"]) == pytest.approx(expected[0], rel=1e-5)
    assert float(terms["kd"]) == pytest.approx(expected[1], rel=1e-4)


def test_weights_share_the_loss():
    module = KDModule(TinyNet(), TinyNet(), num_classes=3, hard_label_weight=0.25)
    assert module.weights() == {"ce": 0.25, "kd": 0.75}


@pytest.mark.slow
def test_only_hard_labels_is_plain_training_bit_for_bit():
    states = []
    for distil in (True, False):
        torch.manual_seed(0)
        student = TinyNet()
        module = (
            KDModule(student, TinyNet(), num_classes=3, hard_label_weight=1.0)
            if distil
            else SupervisedModule(student, num_classes=3)
        )
        tiny_trainer(max_epochs=2).fit(module, datamodule=TinyDataModule())
        states.append(module.student.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_network_a_list_and_an_ensemble_are_teachers():
    network = TinyNet()
    for given in (network, [network], TeacherEnsemble(network)):
        assert list(KDModule(TinyNet(), given, num_classes=3).teachers) == [network]


def test_without_hard_labels_the_targets_do_not_matter():
    module = KDModule(TinyNet(), TinyNet(), num_classes=3, hard_label_weight=0.0).eval()
    batch = batch_of()
    gradients = []
    for target in (batch.target, (batch.target + 1) % 3):
        module.zero_grad()
        terms, weights = module.terms(batch.replace(target=target)), module.weights()
        sum(weights[name] * term for name, term in terms.items()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.student.parameters()]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"hard_label_weight": 1.5}, r"hard_label_weight must be in \[0, 1\], got 1.5"),
        ({"num_classes": 4, "input_shape": (1, 8, 8)}, r"student \(TinyNet\) has 3 classes where num_classes=4"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
    ],
)
def test_refusals_name_what_is_wrong(options, message):
    with pytest.raises(InputError, match=message):
        KDModule(TinyNet(), TinyNet(), **({"num_classes": 3} | options))


def test_a_teacher_with_other_classes_is_named():
    with pytest.raises(InputError, match=r"teacher 1 \(TinyNet\) has 5 classes where num_classes=3"):
        KDModule(TinyNet(), [TinyNet(), TinyNet(5)], num_classes=3, input_shape=(1, 8, 8))


def test_label_smoothing_is_the_mixed_target():
    module = SupervisedModule(TinyNet(), num_classes=3, transforms=[LabelSmoothing(0.3)]).eval()
    batch = batch_of()
    log_probs = torch.log_softmax(module.student(batch.input), dim=1)
    target = 0.7 * torch.nn.functional.one_hot(batch.target, 3) + 0.1
    terms = module.terms(module.prepared(batch))
    assert float(terms["ce"]) == pytest.approx(float(-(target * log_probs).sum(1).mean()), rel=1e-5)
    with pytest.raises(InputError, match=r"epsilon must be in \[0, 1\), got 1"):
        SupervisedModule(TinyNet(), num_classes=3, transforms=[LabelSmoothing(1.0)])
