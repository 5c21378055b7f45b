"""Frozen teachers and their joint prediction."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from distill_lightning import Categorical, InputError, KDModule, SmallResNet, TeacherEnsemble
from distill_lightning.functional import softened_kl
from distill_lightning.layers import fingerprint, freeze


def images(count=4, channels=1):
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def teacher(seed=0, classes=3, channels=1):
    torch.manual_seed(seed)
    return SmallResNet(classes, in_channels=channels, width=2)


class Constant(nn.Module):
    """The same logits for every sample."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, inputs):
        return self.logits.expand(len(inputs), -1)


def check(ensemble, input_shape, classes):
    """What every module does that is told the shape of an input."""
    KDModule(teacher(9, classes), ensemble, num_classes=classes, input_shape=input_shape)


def naive_softmax(row, temperature=1.0):
    top = max(row)
    exponentials = [math.exp((value - top) / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


# freezing


def test_freeze_returns_the_same_network_without_gradients_and_in_eval_mode():
    network = teacher().train()
    assert freeze(network) is network
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_constructor_freezes_every_teacher():
    networks = [teacher(seed).train() for seed in range(3)]
    ensemble = TeacherEnsemble(networks)
    assert list(ensemble) == networks
    assert len(ensemble) == 3
    assert not any(module.training for module in ensemble.modules())
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())


def test_teachers_stay_in_eval_mode_whoever_calls_train():
    ensemble = TeacherEnsemble([teacher(0), teacher(1)])
    owner = nn.ModuleDict({"teachers": ensemble, "student": teacher(2)})
    assert ensemble.train() is ensemble
    owner.train()
    assert owner["student"].training
    assert not any(module.training for module in ensemble.modules())


def test_using_teachers_does_not_change_a_bit_of_them():
    ensemble = TeacherEnsemble([teacher(0), teacher(1)])
    before = fingerprint(ensemble)
    ensemble.train()
    ensemble.probabilities(images(), temperature=4.0)
    check(ensemble, (1, 8, 8), 3)
    assert fingerprint(ensemble) == before


@pytest.mark.parametrize("method", ["logits", "probabilities", "forward"])
def test_outputs_have_no_graph_and_may_be_saved_for_backward(method):
    ensemble = TeacherEnsemble([teacher(0), teacher(1)])
    inputs = images().requires_grad_()
    output = getattr(ensemble, method)(inputs)
    assert not output.requires_grad
    student = torch.zeros_like(output, requires_grad=True)
    (student * output).sum().backward()
    assert torch.equal(student.grad, output)
    assert inputs.grad is None


# construction


def test_one_network_is_an_ensemble_of_one():
    network = teacher()
    ensemble = TeacherEnsemble(network)
    assert list(ensemble) == [network]
    assert torch.allclose(ensemble.probabilities(images()), network(images()).softmax(-1), atol=1e-7)


def test_of_keeps_an_ensemble_and_wraps_the_rest():
    first, second = teacher(0), teacher(1)
    ensemble = TeacherEnsemble([first, second], weights=[1, 2])
    assert TeacherEnsemble.of(ensemble) is ensemble
    assert list(TeacherEnsemble.of(first)) == [first]
    assert list(TeacherEnsemble.of((first, second))) == [first, second]


@pytest.mark.parametrize("networks", [[], ()])
def test_no_teacher_is_refused(networks):
    with pytest.raises(InputError, match="teachers is empty: give at least one network"):
        TeacherEnsemble(networks)


def test_the_same_teacher_twice_is_refused():
    network = teacher()
    with pytest.raises(InputError, match="the same network object stands twice"):
        TeacherEnsemble([network, teacher(1), network])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 teachers"),
        ([1.0, 1.0, 1.0], "3 weights for 2 teachers"),
        ([2.0, -1.0], "non-negative and not all zero"),
        ([0, 0], "non-negative and not all zero"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        TeacherEnsemble([teacher(0), teacher(1)], weights=weights)


def test_an_unknown_rule_is_refused():
    with pytest.raises(InputError, match="combine must be 'probabilities' or 'logits', got 'mean'"):
        TeacherEnsemble(teacher(), combine="mean")


def test_the_printed_ensemble_says_its_rule():
    printed = repr(TeacherEnsemble([teacher(0), teacher(1)], weights=[1, 3], combine="logits"))
    assert "combine='logits', weights=[1.0, 3.0]" in printed


# predictions


def test_logits_are_those_of_each_teacher_in_order():
    networks = [teacher(seed) for seed in range(3)]
    logits = TeacherEnsemble(networks).logits(images())
    assert logits.shape == (3, 4, 3)
    for member, network in zip(logits, networks, strict=True):
        assert torch.equal(member, network(images()))


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["probabilities", "logits"])
@pytest.mark.parametrize("weights", [None, [1, 1, 1], [0.2, 3.0, 0.0]])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_probabilities_are_the_loop(combine, weights, temperature):
    networks = [teacher(seed) for seed in range(3)]
    ensemble = TeacherEnsemble(networks, weights=weights, combine=combine)
    logits = [network(images()).tolist() for network in networks]
    shares = [weight / sum(weights) for weight in weights] if weights else [1 / 3] * 3
    probabilities = ensemble.probabilities(images(), temperature=temperature)
    assert probabilities.shape == (4, 3)
    for i in range(4):
        if combine == "probabilities":
            softmaxes = [naive_softmax(member[i], temperature) for member in logits]
            expected = [sum(shares[m] * softmaxes[m][k] for m in range(3)) for k in range(3)]
        else:
            mean = [sum(shares[m] * logits[m][i][k] for m in range(3)) for k in range(3)]
            expected = naive_softmax(mean, temperature)
        assert probabilities[i].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_default_is_the_mean_of_softmaxes_and_not_the_softmax_of_the_mean():
    members = [Constant(100.0, 0.0), Constant(0.0, math.log(2.0))]
    assert TeacherEnsemble(members).probabilities(images(1))[0].tolist() == pytest.approx([2 / 3, 1 / 3], rel=1e-6)
    of_the_mean = TeacherEnsemble(members, combine="logits").probabilities(images(1))[0]
    assert of_the_mean[0].item() > 0.999


def test_a_teachers_weight_is_its_share():
    members = [Constant(50.0, 0.0), Constant(0.0, 50.0)]
    probabilities = TeacherEnsemble(members, weights=[3, 1]).probabilities(images(1))[0]
    assert probabilities.tolist() == pytest.approx([0.75, 0.25], rel=1e-6)


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_the_order_of_teachers_does_not_matter(combine):
    networks, weights = [teacher(seed) for seed in range(3)], [1.0, 2.0, 5.0]
    expected = TeacherEnsemble(networks, weights, combine).probabilities(images(), temperature=2.0)
    for order in itertools.permutations(range(3)):
        permuted = TeacherEnsemble([networks[m] for m in order], [weights[m] for m in order], combine)
        assert torch.allclose(permuted.probabilities(images(), temperature=2.0), expected, atol=1e-6)


def test_combined_takes_the_logits_that_logits_gives():
    ensemble = TeacherEnsemble([teacher(0), teacher(1)], weights=[1, 2])
    combined = ensemble.combined(ensemble.logits(images()), temperature=3.0)
    assert torch.equal(combined, ensemble.probabilities(images(), temperature=3.0))


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
@pytest.mark.parametrize("weights", [None, [1, 3]])
def test_the_softmax_of_forward_is_the_probabilities(combine, weights):
    ensemble = TeacherEnsemble([teacher(0), teacher(1)], weights=weights, combine=combine)
    log_probabilities = ensemble(images())
    assert torch.allclose(log_probabilities.softmax(-1), ensemble.probabilities(images()), atol=1e-6)
    assert torch.allclose(log_probabilities.exp().sum(-1), torch.ones(4), atol=1e-6)


def test_an_ensemble_can_be_a_teacher_of_an_ensemble():
    inner = TeacherEnsemble([teacher(0), teacher(1)])
    outer = TeacherEnsemble([inner, teacher(2)])
    expected = (inner.probabilities(images()) + teacher(2).eval()(images()).softmax(-1)) / 2
    assert torch.allclose(outer.probabilities(images()), expected, atol=1e-6)


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_of_huge_logits_sum_to_one(combine, dtype):
    ensemble = TeacherEnsemble([Constant(1e4, -1e4, 0.0), Constant(-1e4, 1e4, 0.0)], [3, 1], combine).to(dtype)
    probabilities = ensemble.probabilities(images(2))
    assert probabilities.dtype == torch.float32
    expected = [0.75, 0.25, 0.0] if combine == "probabilities" else [1.0, 0.0, 0.0]
    assert probabilities.tolist() == [pytest.approx(expected)] * 2


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_a_sure_ensemble_can_stand_where_a_network_stands(combine):
    # What a distillation loss makes of the outputs that stand for logits.
    ensemble = TeacherEnsemble([Constant(1e4, -1e4, 0.0), Constant(1e4, 0.0, -1e4)], combine=combine)
    student = torch.zeros(2, 3, requires_grad=True)
    loss = softened_kl(student, ensemble(images(2)), temperature=2.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
@pytest.mark.parametrize("temperature", [0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(combine, temperature):
    ensemble = TeacherEnsemble([teacher(0), teacher(1)], combine=combine)
    with pytest.raises(InputError, match="temperature must be positive"):
        ensemble.probabilities(images(), temperature=temperature)


# checks


def test_check_accepts_what_fits():
    check(TeacherEnsemble([teacher(0), teacher(1)]), (1, 8, 8), 3)


def test_check_names_the_teacher_with_another_number_of_classes():
    ensemble = TeacherEnsemble([teacher(0), teacher(1, classes=5)])
    with pytest.raises(InputError, match=r"teacher 1 \(SmallResNet\) has 5 classes where num_classes=3 is needed"):
        check(ensemble, (1, 8, 8), 3)


def test_check_refuses_wrong_input_channels():
    ensemble = TeacherEnsemble([teacher(0), teacher(1, channels=3)])
    with pytest.raises(InputError, match=r"SmallResNet does not take an input of shape \(1, 8, 8\)"):
        check(ensemble, (1, 8, 8), 3)


def test_check_refuses_an_output_that_is_no_row_of_logits():
    with pytest.raises(InputError, match=r"teacher 0 \(Identity\) has an output of shape \(1, 1, 8, 8\)"):
        check(TeacherEnsemble(nn.Identity()), (1, 8, 8), 3)


@pytest.mark.parametrize(
    ("shape", "found"),
    [((1, 4), "4 classes"), ((3,), r"an output of shape \(3,\)"), ((1, 3, 1), r"an output of shape \(1, 3, 1\)")],
)
def test_the_check_of_an_output_says_what_it_found(shape, found):
    with pytest.raises(InputError, match=rf"student \(Linear\) has {found} where num_classes=3 is needed"):
        Categorical(3).check("student", nn.Linear(1, 1), shape)


# fingerprint


def test_equal_networks_have_equal_fingerprints():
    assert fingerprint(teacher(0)) == fingerprint(teacher(0))
    assert fingerprint(teacher(0)) != fingerprint(teacher(1))
    assert len(fingerprint(teacher(0))) == 64


def module_with(name="weight", tensor=None, *, buffer=False):
    module = nn.Module()
    tensor = torch.arange(6.0) if tensor is None else tensor
    if buffer:
        module.register_buffer(name, tensor)
    else:
        module.register_parameter(name, nn.Parameter(tensor))
    return module


def test_the_fingerprint_sees_names_types_shapes_and_every_byte():
    changed = torch.arange(6.0)
    changed[5] = torch.nextafter(changed[5], torch.tensor(9.0))
    variants = [
        module_with(),
        module_with("other"),
        module_with(tensor=torch.arange(6.0).reshape(2, 3)),
        module_with(tensor=torch.arange(6.0).bfloat16()),
        module_with(tensor=torch.arange(6.0).view(torch.int32).clone(), buffer=True),
        module_with(tensor=changed),
        module_with(tensor=-torch.zeros(6)),
        module_with(tensor=torch.zeros(6)),
    ]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)


def test_the_fingerprint_sees_the_buffers_of_batch_norm():
    network = teacher().train()
    before = fingerprint(network)
    network(images())
    assert fingerprint(network) != before


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(3), torch.empty(0), torch.tensor([True, False]), torch.rand(3, 2).T, torch.rand(3).half()],
    ids=["scalar", "empty", "bool", "not contiguous", "half"],
)
def test_the_fingerprint_reads_every_kind_of_tensor(tensor):
    first = fingerprint(module_with(tensor=tensor, buffer=True))
    assert fingerprint(module_with(tensor=tensor.clone().contiguous(), buffer=True)) == first


# faster teachers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_teachers_of_half_precision_answer_as_converted_networks_do(dtype):
    kind = getattr(torch, dtype)
    networks = [teacher(0), teacher(1)]
    copies = [copy.deepcopy(network).to(kind).eval() for network in networks]
    logits = TeacherEnsemble(networks, dtype=dtype).logits(images())
    assert logits.dtype == kind
    with torch.no_grad():
        assert torch.equal(logits, torch.stack([network(images().to(kind)) for network in copies]))
    exact = TeacherEnsemble([teacher(0), teacher(1)]).probabilities(images())
    rough = TeacherEnsemble([teacher(0), teacher(1)], dtype=dtype).probabilities(images())
    assert rough.dtype == torch.float32
    assert torch.allclose(exact, rough, atol=0.02)
    assert not torch.equal(exact, rough)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(InputError, match="a teacher's dtype must be 'float16' or 'bfloat16', got 'float8'"):
        TeacherEnsemble(teacher(), dtype="float8")


def test_channels_last_is_another_layout_of_the_same_teacher():
    ensemble, plain = TeacherEnsemble(teacher(), channels_last=True), TeacherEnsemble(teacher())
    weights = [p for p in ensemble.parameters() if p.dim() == 4]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert fingerprint(ensemble) == fingerprint(plain)
    assert torch.allclose(ensemble.logits(images()), plain.logits(images()), atol=1e-6)


def test_taps_read_what_the_networks_compute_and_may_be_saved_for_backward():
    ensemble = TeacherEnsemble([teacher(0), teacher(1)])
    answers = ensemble.each(images(), ensemble.tapped(["stage1", "stage2"]))
    for network, layer, (output, features) in zip(ensemble, ["stage1", "stage2"], answers, strict=True):
        kept = []
        with network.get_submodule(layer).register_forward_hook(lambda *args, kept=kept: kept.append(args[2])):
            assert torch.equal(output, network(images()))
        assert torch.equal(features[layer], kept[0])
        student = torch.ones_like(features[layer], requires_grad=True)
        (student * features[layer]).sum().backward()


class TwoInputs(nn.Module):
    """Reads its inputs by keyword."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, *, pixels, number):
        return pixels.mean(dim=(1, 2, 3))[:, None] * self.weight + number[:, None]


def test_inputs_in_parts_are_converted_but_for_integers():
    seen = {"pixels": images(), "number": torch.arange(4)}
    logits = TeacherEnsemble(TwoInputs(), dtype="bfloat16").logits(seen)
    assert logits.dtype == torch.bfloat16
    assert logits.shape == (1, 4, 3)
