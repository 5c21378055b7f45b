"""FEED against naive references, its invariances, its options and its refusals."""

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distill_lightning import (
    AttentionDistance,
    Batch,
    Conv1x1Translator,
    Conv3Translator,
    EqualSizes,
    FactorDistance,
    FEEDModule,
    FunctionTranslator,
    HintDistance,
    InputError,
    LinearTranslator,
    LogitTerm,
    NoTranslator,
    PooledSize,
    SmallResNet,
    StudentSize,
    SupervisedModule,
    TeacherEnsemble,
    TeacherSize,
)
from distill_lightning.layers import Paraphraser, Translator
from distill_lightning.teachers import Features
from distill_lightning.testing import CONTRACT, TinyDataModule, TinyNet, tiny_trainer

SHAPE = (1, 8, 8)
DISTANCES = {"feed": FactorDistance, "hint": HintDistance, "attention": AttentionDistance}


def untranslated(loss, **options):
    """A distance of features as they are."""
    return DISTANCES[loss](**options, **({} if loss == "attention" else {"translator": NoTranslator()}))


def batch_of(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(count, *SHAPE, generator=generator), torch.arange(count) % 3)


def module_of(teachers=2, seed=0, **options):
    torch.manual_seed(seed)
    networks = [TinyNet().eval() for _ in range(teachers)]
    student = TinyNet()
    defaults = {"num_classes": 3, "student_layer": "features", "input_shape": SHAPE, "beta": 10.0}
    return FEEDModule(student, networks, **(defaults | options))


def naive_distance(student, teacher, p, reduction):
    """Explicit loops over samples and entries, in double precision."""
    student, teacher = (value.detach().double().numpy() for value in (student, teacher))
    sums = []
    for one, other in zip(student, teacher, strict=True):
        one, other = one.ravel(), other.ravel()  # noqa: PLW2901
        norm_one = max(math.sqrt(sum(x * x for x in one)), 1e-6)
        norm_other = max(math.sqrt(sum(x * x for x in other)), 1e-6)
        sums.append(sum(abs(x / norm_one - y / norm_other) ** p for x, y in zip(one, other, strict=True)))
    return sum(sums) / len(sums) / (len(one) if reduction == "mean" else 1)


def naive_terms(module, batch, *, p, reduction, weights):
    """The paper's terms from plain forwards of the networks' parts."""
    student_feature = module.student.features(batch.input)
    logits = module.student.head(student_feature.mean(dim=(2, 3)))
    log_probs = logits - logits.exp().sum(dim=1, keepdim=True).log()
    ce = -sum(float(log_probs[row, target]) for row, target in enumerate(batch.target)) / len(batch.target)
    distances = []
    for number, teacher in enumerate(module.teachers):
        translator = module.translators[min(number, len(module.translators) - 1)]
        distances.append(naive_distance(translator(student_feature), teacher.features(batch.input), p, reduction))
    return ce, sum(w * d for w, d in zip(weights, distances, strict=True)), distances


@pytest.mark.slow
@pytest.mark.parametrize("translator", [Conv3Translator(), Conv1x1Translator(), LinearTranslator(), NoTranslator()])
@pytest.mark.parametrize(("p", "reduction"), [(1, "mean"), (1, "sum"), (2, "mean"), (2, "sum")])
def test_terms_equal_the_naive_reference(translator, p, reduction):
    distance = FactorDistance(p=p, reduction=reduction, translator=translator)
    module = module_of(3, distance=distance, teacher_weights=[1.0, 0.5, 2.0]).eval()
    batch = batch_of()
    terms = module.terms(batch)
    ce, feed, distances = naive_terms(module, batch, p=p, reduction=reduction, weights=[1.0, 0.5, 2.0])
    assert float(terms["ce"]) == pytest.approx(ce, rel=1e-5)
    assert float(terms["feed"]) == pytest.approx(feed, rel=1e-4)
    assert [float(terms[f"feed_teacher_{m}"]) for m in range(3)] == pytest.approx(distances, rel=1e-4)
    assert module.weights() == {
        "ce": 1.0, "feed": 10.0, "feed_teacher_0": 0.0, "feed_teacher_1": 0.0, "feed_teacher_2": 0.0,
    }  # fmt: skip


def test_mean_over_teachers_is_the_sum_divided_by_their_number():
    total, mean = (module_of(3, teacher_reduction=how).terms(batch_of())["feed"] for how in ("sum", "mean"))
    assert float(total) == pytest.approx(3 * float(mean))


def test_identity_and_equal_features_give_zero():
    teacher = TinyNet()
    module = FEEDModule(
        copy.deepcopy(teacher).eval(), teacher, num_classes=3, student_layer="features", distance=untranslated("feed")
    )
    module.eval()
    assert float(module.terms(batch_of())["feed"]) < 1e-7


def test_identical_teachers_with_identical_translators_count_n_times():
    torch.manual_seed(0)
    teacher, student = TinyNet(), TinyNet()
    options = {"num_classes": 3, "student_layer": "features", "input_shape": SHAPE}
    single = FEEDModule(student, teacher, **options).eval()
    triple = FEEDModule(student, [copy.deepcopy(teacher) for _ in range(3)], **options).eval()
    for translator in triple.translators:
        translator.load_state_dict(single.translators[0].state_dict())
    batch = batch_of()
    assert float(triple.terms(batch)["feed"]) == pytest.approx(3 * float(single.terms(batch)["feed"]), rel=1e-6)


def test_the_order_of_the_teachers_does_not_matter():
    module = module_of(3).eval()
    turned = FEEDModule(
        module.student,
        list(reversed(list(module.teachers))),
        num_classes=3,
        student_layer="features",
        input_shape=SHAPE,
    ).eval()
    for number, translator in enumerate(turned.translators):
        translator.load_state_dict(module.translators[2 - number].state_dict())
    assert float(turned.terms(batch_of())["feed"]) == pytest.approx(float(module.terms(batch_of())["feed"]), rel=1e-6)


def test_another_second_teacher_leaves_the_first_translators_gradient_alone():
    gradients, distances = [], []
    for second in (1, 2):
        module = module_of(1, seed=0)
        torch.manual_seed(second)
        module = FEEDModule(
            module.student, [*module.teachers, TinyNet()], num_classes=3, student_layer="features", input_shape=SHAPE
        ).eval()
        torch.manual_seed(5)
        for translator in module.translators:
            translator.load_state_dict(Translator(8, 8).state_dict())
        terms = module.terms(batch_of())
        terms["feed"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.translators[0].parameters()]))
        distances.append(float(terms["feed_teacher_1"]))
    assert torch.equal(*gradients)
    assert distances[0] != distances[1]


def test_gradients_go_where_they_belong():
    module = module_of(2)
    module.terms(batch_of())["feed"].backward()
    assert all(p.grad is None for p in module.teachers.ensemble.parameters())
    assert all(p.grad is None for p in module.student.head.parameters())
    assert all(float(p.grad.abs().sum()) > 0 for p in module.student.features.parameters())
    assert all(p.grad is not None for p in module.translators.parameters())
    assert all(float(translator[0].weight.grad.abs().sum()) > 0 for translator in module.translators)


def test_every_network_runs_once_a_step_and_teachers_have_no_graph():
    module = module_of(3)
    calls, graphs = [], []
    for number, network in enumerate([module.student, *module.teachers]):
        network.register_forward_hook(
            lambda _m, _i, output, number=number: calls.append((number, output.requires_grad))
        )
        if number:
            network.features.register_forward_hook(lambda _m, _i, output: graphs.append(output.requires_grad))
    module.terms(batch_of())
    assert calls == [(0, True), (1, False), (2, False), (3, False)]
    assert graphs == [False, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [2])
def test_beta_zero_is_plain_training_bit_for_bit(epochs):
    states = []
    for feed in (True, False):
        torch.manual_seed(3)
        teacher = TinyNet()
        torch.manual_seed(4)
        student = TinyNet()
        options = {"num_classes": 3, "input_shape": SHAPE}
        if feed:
            module = FEEDModule(student, teacher, student_layer="features", beta=0.0, **options)
        else:
            module = SupervisedModule(student, **options)
        tiny_trainer(max_epochs=epochs).fit(module, datamodule=TinyDataModule())
        states.append(module.student.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.slow
def test_learns_on_one_batch_better_with_the_student_than_with_translators_alone():
    ends = {}
    for frozen in (True, False):
        module = module_of(1, seed=1).eval()
        batch = batch_of(8)
        start = float(module.terms(batch)["feed"])
        learning = (
            module.translators.parameters()
            if frozen
            else [*module.translators.parameters(), *module.student.parameters()]
        )
        optimizer = torch.optim.Adam(learning, lr=3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            module.terms(batch)["feed"].backward()
            optimizer.step()
        ends[frozen] = float(module.terms(batch)["feed"])
    assert ends[False] < ends[True] < start


def test_kd_term_is_the_softened_kl_to_the_ensembles_mean():
    torch.manual_seed(0)
    ensemble = TeacherEnsemble([TinyNet(), TinyNet()], weights=[1, 3])
    module = FEEDModule(
        TinyNet(), ensemble, num_classes=3, student_layer="features", input_shape=SHAPE,
        logit_term=LogitTerm(weight=0.7, temperature=2.0),
    ).eval()  # fmt: skip
    batch = batch_of()
    mean = 0.25 * F.softmax(ensemble.networks[0](batch.input) / 2, 1) + 0.75 * F.softmax(
        ensemble.networks[1](batch.input) / 2, 1
    )
    student = F.softmax(module.student(batch.input) / 2, 1)
    expected = 4 * float((mean * (mean.log() - student.log())).sum(1).mean())
    assert float(module.terms(batch)["kd"]) == pytest.approx(expected, rel=1e-4)
    assert module.weights()["kd"] == 0.7


def test_shared_translator_is_one_module_for_all_teachers():
    module = module_of(3, distance=FactorDistance(translator=Conv3Translator(shared=True)))
    assert len(module.translators) == 1
    batch = batch_of()
    module.eval()
    _, feed, _ = naive_terms(module, batch, p=1, reduction="mean", weights=[1, 1, 1])
    assert float(module.terms(batch)["feed"]) == pytest.approx(feed, rel=1e-4)


def test_paraphrasers_make_their_code_the_target():
    torch.manual_seed(0)
    paraphrasers = [Paraphraser(8, rate=0.5), Paraphraser(8, rate=0.25)]
    module = module_of(2, paraphrasers=paraphrasers).eval()
    batch = batch_of()
    feature = module.student.features(batch.input)
    expected = [
        naive_distance(translator(feature), paraphraser.encoder(teacher.features(batch.input)), 1, "mean")
        for translator, paraphraser, teacher in zip(module.translators, paraphrasers, module.teachers, strict=True)
    ]
    terms = module.terms(batch)
    assert [float(terms[f"feed_teacher_{m}"]) for m in range(2)] == pytest.approx(expected, rel=1e-4)
    assert not [name for name in module.state_dict() if "paraphraser" in name]
    (asked,) = [question for question in module.teachers.questions if isinstance(question, Features)]
    assert not any(p.requires_grad for one in asked.paraphrasers for p in one.parameters())
    assert all(p.requires_grad for one in paraphrasers for p in one.parameters())


def test_normalize_channel_and_none_differ_from_sample():
    values = {
        how: float(module_of(1, distance=FactorDistance(normalize=how)).eval().terms(batch_of())["feed"])
        for how in ("sample", "channel", "none")
    }
    assert len(set(values.values())) == 3


def test_a_factory_makes_the_translators():
    seen = []

    def factory(student_channels, teacher_channels):
        seen.append((student_channels, teacher_channels))
        return nn.Conv2d(student_channels, teacher_channels, 1)

    module = FEEDModule(
        TinyNet(width=2), [TinyNet(width=4), TinyNet(width=6)], num_classes=3, student_layer="features",
        distance=FactorDistance(translator=FunctionTranslator(factory)), input_shape=SHAPE,
    )  # fmt: skip
    assert seen == [(4, 8), (4, 12)]
    assert torch.isfinite(module.terms(batch_of())["feed"])


def test_channels_are_found_without_an_input_shape():
    module = FEEDModule(SmallResNet(10, width=4), SmallResNet(10, width=6), num_classes=10, student_layer="stage3")
    assert module.translators[0][0].in_channels == 16
    assert module.translators[0][-2].out_channels == 24


def test_the_dry_forward_changes_no_network():
    student, teacher = SmallResNet(10), SmallResNet(10)
    student.train()
    before = [copy.deepcopy(network.state_dict()) for network in (student, teacher)]
    FEEDModule(student, teacher, num_classes=10, student_layer="stage3")
    assert student.training
    for network, state in zip((student, teacher), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("sizes", [TeacherSize(), StudentSize()])
def test_sizes_are_matched_where_asked(sizes):
    module = FEEDModule(
        SmallResNet(3, width=4), SmallResNet(3, width=4), num_classes=3, student_layer="stage3",
        teacher_layers="stage2", sizes=sizes, input_shape=SHAPE, distance=FactorDistance(translator=LinearTranslator()),
    ).eval()  # fmt: skip
    batch = batch_of()
    student = module.student_tap(batch.input)[1]["stage3"]
    teacher = module.teachers.taps[0](batch.input)[1]["stage2"]
    translated = module.translators[0](student)
    assert (student.shape[2:], teacher.shape[2:]) == ((2, 2), (4, 4))
    if isinstance(sizes, TeacherSize):
        translated = F.interpolate(translated, size=(4, 4), mode="bilinear", align_corners=False)
    else:
        teacher = F.adaptive_avg_pool2d(teacher, (2, 2))
    assert float(module.terms(batch)["feed"]) == pytest.approx(naive_distance(translated, teacher, 1, "mean"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_layer": "featurs"}, "TinyNet has no layer 'featurs'; similar names: features"),
        ({"teacher_layers": ["features", "nope"]}, "TinyNet has no layer 'nope'"),
        ({"teacher_layers": ["features"]}, "1 layers for 2 teachers"),
        ({"student_layer": "features.*"}, "names 6 layers"),
        ({"student_layer": "features.0"}, r"teacher 0's 'features.3' gives \(8, 4, 4\)"),
        ({"student_layer": "head"}, r"the student's feature has shape \(1, 3\), not \(N, C, H, W\)"),
        ({"num_classes": 4}, r"student \(TinyNet\) has 3 classes where num_classes=4"),
        ({"teacher_weights": [1.0]}, "1 teacher_weights for 2 teachers"),
        ({"teacher_weights": [1.0, -0.5]}, r"beta and teacher_weights cannot be negative: 10.0, \[1.0, -0.5\]"),
        ({"beta": -1.0}, "beta and teacher_weights cannot be negative: -1.0"),
        ({"beta": float("nan")}, "FEED: beta must be a finite number, got nan"),
        ({"teacher_reduction": "avg"}, "teacher_reduction must be sum or mean, got 'avg'"),
        (
            {"distance": AttentionDistance(), "paraphrasers": [Paraphraser(8)] * 2},
            "AttentionDistance does not use paraphrasers: leave them out",
        ),
        (
            {"distance": AttentionDistance(), "student_layer": "head"},
            r"shape \(1, 3\), not \(N, C, H, W\): tap a convolutional layer",
        ),
        (
            {"paraphrasers": [Paraphraser(8), Paraphraser(4)]},
            "paraphraser 1 does not read the 8 channels of teacher 1's feature",
        ),
        ({"paraphrasers": nn.ModuleList([Paraphraser(8)])}, "1 paraphrasers for 2 teachers"),
        ({"input_shape": (3, 8, 8)}, "does not take an input of shape"),
        ({"paraphrasers": [Paraphraser(8)]}, "1 paraphrasers for 2 teachers"),
    ],
)
def test_refusals_name_what_is_wrong(options, message):
    if options.get("student_layer") == "features.0":
        options = {**options, "teacher_layers": "features.3"}
    with pytest.raises(InputError, match=message):
        module_of(2, **options)


def test_a_teacher_with_other_classes_is_named():
    with pytest.raises(InputError, match=r"teacher 1 \(TinyNet\) has 5 classes where num_classes=3"):
        FEEDModule(TinyNet(), [TinyNet(), TinyNet(5)], num_classes=3, student_layer="features", input_shape=SHAPE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitTerm(weight=float("nan")), "LogitTerm: weight must be a finite number, got nan"),
        (lambda: LogitTerm(weight=-1.0), "LogitTerm: weight must be 0 or more"),
        (lambda: LogitTerm(temperature=0), "temperature positive"),
        (lambda: FactorDistance(p=0.5), "FactorDistance: p must be at least 1, got 0.5"),
        (lambda: FactorDistance(reduction="avg"), "FactorDistance: reduction must be one of mean, sum, got 'avg'"),
        (lambda: HintDistance(reduction="avg"), "HintDistance: reduction must be one of mean, sum, got 'avg'"),
        (lambda: AttentionDistance(reduction="avg"), "AttentionDistance: reduction must be one of mean, sum, got"),
        (lambda: FactorDistance(normalize="batch"), "normalize must be one of sample, channel, none, got 'batch'"),
        (lambda: PooledSize(0), "PooledSize: pooled must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_no_translator_and_a_shared_one_refuse_other_channels():
    options = {"num_classes": 3, "student_layer": "features", "input_shape": SHAPE}
    with pytest.raises(InputError, match="they have 8 and 4 channels"):
        FEEDModule(TinyNet(), TinyNet(width=2), distance=untranslated("feed"), **options)
    shared = FactorDistance(translator=Conv3Translator(shared=True))
    with pytest.raises(InputError, match=r"equal channel counts, got \[8, 4\]"):
        FEEDModule(TinyNet(), [TinyNet(), TinyNet(width=2)], distance=shared, **options)


@pytest.mark.slow
def test_huge_translators_are_warned_about():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1600, 1)
            self.head = nn.Linear(1600, 3)

        def forward(self, images):
            return self.head(self.conv(images).mean(dim=(2, 3)))

    with pytest.warns(UserWarning, match="translators have 69,"):
        FEEDModule(Wide(), Wide(), num_classes=3, student_layer="conv", input_shape=(1, 2, 2))


def test_zero_features_and_fp16_stay_finite():
    module = module_of(2).eval()
    with torch.no_grad():
        for parameter in module.student.features.parameters():
            parameter.zero_()
    terms = module.terms(batch_of())
    (terms["ce"] + 500 * terms["feed"]).backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(module.terms(batch_of())["feed"])


def test_size_of_the_term_is_as_documented():
    student, teacher = (F.relu(torch.randn(64, 4096)) for _ in range(2))
    from distill_lightning.functional import factor_distance

    assert float(factor_distance(student, teacher)) == pytest.approx(0.8 / np.sqrt(4096), rel=0.05)


@pytest.mark.slow
def test_a_compiled_student_gives_the_same_terms():
    module = module_of(2).eval()
    plain = module.terms(batch_of())
    torch._dynamo.reset()
    module.student.compile(backend="eager")
    compiled = module.terms(batch_of())
    assert {name: float(value) for name, value in compiled.items()} == pytest.approx(
        {name: float(value) for name, value in plain.items()}, rel=1e-5
    )


# Other feature losses under the same teachers


def naive_hint(student, teacher, reduction):
    total = 0.0
    for one, other in zip(student.detach().flatten(1).tolist(), teacher.detach().flatten(1).tolist(), strict=True):
        total += sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
    return total / len(student) / (student[0].numel() if reduction == "mean" else 1)


def naive_attention(student, teacher, reduction):
    total = 0.0
    for pair in zip(student.detach(), teacher.detach(), strict=True):
        maps = [[sum(value**2 for value in site) for site in feature.flatten(1).T.tolist()] for feature in pair]
        norms = [math.sqrt(sum(value**2 for value in values)) for values in maps]
        total += sum((a / norms[0] - b / norms[1]) ** 2 for a, b in zip(*maps, strict=True))
    return total / len(student) / (student[0, 0].numel() if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("teacher_reduction", ["sum", "mean"])
@pytest.mark.parametrize(("loss", "naive"), [("hint", naive_hint), ("attention", naive_attention)])
def test_other_feature_losses_equal_the_naive_reference(loss, naive, reduction, teacher_reduction):
    module = module_of(
        3,
        distance=DISTANCES[loss](reduction=reduction),
        teacher_reduction=teacher_reduction,
        teacher_weights=[1.0, 0.5, 2.0],
    ).eval()
    batch = batch_of()
    feature = module.student.features(batch.input)
    translated = [feature] * 3 if loss == "attention" else [translator(feature) for translator in module.translators]
    distances = [
        naive(student, teacher.features(batch.input), reduction)
        for student, teacher in zip(translated, module.teachers, strict=True)
    ]
    terms = module.terms(batch)
    total = distances[0] + 0.5 * distances[1] + 2 * distances[2]
    assert float(terms[loss]) == pytest.approx(total / (3 if teacher_reduction == "mean" else 1), rel=1e-4)
    assert [float(terms[f"{loss}_teacher_{m}"]) for m in range(3)] == pytest.approx(distances, rel=1e-4)
    assert list(terms) == ["ce", loss, *(f"{loss}_teacher_{m}" for m in range(3))] == list(module.weights())
    assert [module.weights()[name] for name in terms] == [1.0, 10.0, 0, 0, 0]


@pytest.mark.parametrize(("loss", "beta"), [("feed", 500.0), ("hint", 1.0), ("attention", 1000.0)])
def test_each_feature_loss_has_its_own_default_weight(loss, beta):
    assert module_of(1, distance=DISTANCES[loss](), beta=None).weights()[loss] == beta
    assert module_of(1, distance=DISTANCES[loss](), beta=0.0).weights()[loss] == 0.0
    options = {"num_classes": 3, "student_layer": "features", "input_shape": SHAPE}
    assert FEEDModule(TinyNet(), TinyNet(), **options).beta == 500.0


def test_attention_has_no_translator_and_takes_other_channels():
    module = FEEDModule(
        TinyNet(width=2), [TinyNet(width=4), TinyNet(width=6)], num_classes=3, student_layer="features",
        distance=AttentionDistance(), input_shape=SHAPE,
    )  # fmt: skip
    assert len(module.translators) == 0
    assert module.terms(batch_of())["attention"] > 0


def test_attention_is_zero_for_permuted_channels_and_feed_is_not():
    teacher = TinyNet()
    student = copy.deepcopy(teacher)
    order = torch.tensor([3, 0, 1, 2, 7, 4, 5, 6])
    with torch.no_grad():
        student.features[3].weight.copy_(teacher.features[3].weight[order])
    values = {
        loss: float(
            FEEDModule(
                student, teacher, num_classes=3, student_layer="features",
                distance=untranslated(loss, reduction="sum"), input_shape=SHAPE,
            ).eval().terms(batch_of())[loss]
        )
        for loss in ("feed", "hint", "attention")
    }  # fmt: skip
    assert values["attention"] < 1e-10
    assert values["feed"] > 1
    assert values["hint"] > 0.05


@pytest.mark.parametrize("loss", ["hint", "attention"])
@pytest.mark.parametrize("sizes", [TeacherSize(), StudentSize()])
def test_other_feature_losses_match_sizes_where_asked(loss, sizes):
    options = {
        "num_classes": 3, "student_layer": "stage3", "teacher_layers": "stage2", "input_shape": SHAPE,
        "distance": DISTANCES[loss](),
    }  # fmt: skip
    module = FEEDModule(SmallResNet(3, width=4), SmallResNet(3, width=4), sizes=sizes, **options).eval()
    batch = batch_of()
    student = module.student_tap(batch.input)[1]["stage3"]
    teacher = module.teachers.taps[0](batch.input)[1]["stage2"]
    if loss == "hint":
        student = module.translators[0](student)
    if isinstance(sizes, TeacherSize):
        student = F.interpolate(student, size=(4, 4), mode="bilinear", align_corners=False)
    else:
        teacher = F.adaptive_avg_pool2d(teacher, (2, 2))
    naive = naive_hint if loss == "hint" else naive_attention
    assert float(module.terms(batch)[loss]) == pytest.approx(naive(student, teacher, "mean"), rel=1e-4)
    with pytest.raises(InputError, match="set sizes: TeacherSize or StudentSize"):
        FEEDModule(SmallResNet(3, width=4), SmallResNet(3, width=4), **options)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["hint", "attention"])
def test_gradients_of_other_feature_losses_go_where_they_belong(loss):
    module = module_of(2, distance=DISTANCES[loss]())
    module.terms(batch_of())[loss].backward()
    assert all(p.grad is None for p in [*module.teachers.ensemble.parameters(), *module.student.head.parameters()])
    assert all(float(p.grad.abs().sum()) > 0 for p in module.student.features.parameters())
    assert all(float(p.grad.abs().sum()) > 0 for p in module.translators.parameters())


def test_hint_of_paraphrased_features_compares_with_the_code():
    paraphrasers = [Paraphraser(8, rate=0.5)]
    module = module_of(1, distance=HintDistance(), paraphrasers=paraphrasers).eval()
    batch = batch_of()
    translated = module.translators[0](module.student.features(batch.input))
    code = paraphrasers[0].encoder(module.teachers[0].features(batch.input))
    assert float(module.terms(batch)["hint"]) == pytest.approx(naive_hint(translated, code, "mean"), rel=1e-4)


@pytest.mark.parametrize("loss", ["feed", "hint", "attention"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_feature_loss_is_finite_with_zero_features_under_autocast(loss, dtype):
    module = module_of(2, distance=DISTANCES[loss]()).eval()
    with torch.no_grad():
        for parameter in [*module.student.features.parameters(), *module.teachers[0].features.parameters()]:
            parameter.zero_()
    with torch.autocast("cpu", dtype=dtype):
        terms = module.terms(batch_of())
    (terms["ce"] + 500 * terms[loss]).backward()
    assert terms[loss].dtype == torch.float32
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def zero_features_of(module, batch):
    logged = {}
    module.observe = lambda name, value: logged.update({name: value})
    module.terms(batch)
    return logged


def test_the_share_of_features_that_cannot_be_normalised_is_observed():
    module = module_of(2, distance=untranslated("feed")).eval()
    batch = batch_of(4)
    # One of four images becomes black, and black images have a zero feature.
    batch.input[2] = 0
    for network in (module.student, *module.teachers):
        network.features[1].bias.data.zero_()
        network.features[4].bias.data.zero_()
    assert float(zero_features_of(module, batch)["zero_features"]) == 0.25
    module = module_of(2).eval()
    with torch.no_grad():
        for parameter in module.translators[0].parameters():
            parameter.zero_()
    assert float(zero_features_of(module, batch)["zero_features"]) == 0.5
    for distance in (FactorDistance(normalize="channel"), HintDistance(), AttentionDistance()):
        assert zero_features_of(module_of(2, distance=distance).eval(), batch) == {}


@pytest.mark.parametrize("loss", ["feed", "hint", "attention"])
def test_what_is_logged_begins_with_the_loss_and_the_share_is_its_part(loss):
    module = module_of(2, distance=DISTANCES[loss](), beta=3.0)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule(batch_size=24))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
    names = {"loss", "ce", "ce_share", loss, f"{loss}_share", f"{loss}_teacher_0", f"{loss}_teacher_1"}
    assert logged.keys() == {f"train/{name}" for name in names | ({"zero_features"} if loss == "feed" else set())}
    assert logged[f"train/{loss}_share"] == pytest.approx(3 * logged[f"train/{loss}"] / logged["train/loss"], rel=1e-5)
    assert logged["train/loss"] == pytest.approx(logged["train/ce"] + 3 * logged[f"train/{loss}"], rel=1e-5)


def test_an_exported_student_has_the_parameters_and_the_cost_of_a_plain_one(tmp_path):
    module = module_of(2)
    plain = TinyNet()
    plain.load_state_dict(load_file(module.export_student(tmp_path / "student.safetensors")))
    batch = batch_of()
    flops = []
    for network in (plain, module):
        with FlopCounterMode(display=False) as counter:
            network(batch.input)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    assert sum(p.numel() for p in module.student.parameters()) == sum(p.numel() for p in TinyNet().parameters())


def hint(student, teachers, num_classes):
    return FEEDModule(
        student, teachers, num_classes=num_classes, student_layer="features", input_shape=SHAPE,
        distance=HintDistance(translator=Conv1x1Translator()), beta=1.0,
    )  # fmt: skip


def attention(student, teachers, num_classes):
    return FEEDModule(
        student, teachers, num_classes=num_classes, student_layer="features", input_shape=SHAPE,
        distance=AttentionDistance(), beta=100.0,
    )  # fmt: skip


def factor_transfer(student, teachers, num_classes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        paraphrasers = [Paraphraser(8, rate=0.5) for _ in teachers]
    return FEEDModule(
        student, teachers, num_classes=num_classes, student_layer="features", beta=10.0, paraphrasers=paraphrasers,
        input_shape=SHAPE,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("build", [hint, attention, factor_transfer])
@pytest.mark.parametrize("point", CONTRACT)
def test_contract(point, build):
    CONTRACT[point](build)


class Tokens(nn.Module):
    """Tokens ``(N, length, width)`` of an 8x8 image."""

    def __init__(self, length, width):
        super().__init__()
        self.length = length
        self.embed = nn.Linear(64 // length, width)
        self.head = nn.Linear(width, 3)

    def forward(self, images):
        return self.head(self.embed(images.reshape(len(images), self.length, -1)).mean(dim=1))


def test_tokens_of_equal_length_are_translated_by_a_users_module():
    distance = FactorDistance(translator=FunctionTranslator(nn.Linear))
    options = {"num_classes": 3, "student_layer": "embed", "distance": distance, "input_shape": SHAPE}
    module = FEEDModule(Tokens(8, 4), Tokens(8, 6), **options).eval()
    batch = batch_of()
    student, teacher = (
        network.embed(batch.input.reshape(4, 8, -1)) for network in (module.student, module.teachers[0])
    )
    expected = naive_distance(module.translators[0](student), teacher, 1, "mean")
    assert float(module.terms(batch)["feed"]) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(InputError, match=r"gives \(8, 4\) and teacher 0's 'embed' gives \(4, 4\)"):
        FEEDModule(Tokens(8, 4), Tokens(4, 4), **options)


# Targets in fewer numbers


def wide_module(**options):
    torch.manual_seed(0)
    networks = [TinyNet(width=width).eval() for width in (4, 6)]
    defaults = {"num_classes": 3, "student_layer": "features", "input_shape": SHAPE, "beta": 10.0}
    return FEEDModule(TinyNet(), networks, **(defaults | options))


def naive_pool(feature, size):
    """Means of equal blocks, which adaptive pooling takes where the size divides."""
    count, channels, height, width = feature.shape
    down, across = height // size, width // size
    pooled = torch.zeros(count, channels, size, size, dtype=torch.float64)
    for row in range(size):
        for column in range(size):
            block = feature[:, :, row * down : (row + 1) * down, column * across : (column + 1) * across]
            pooled[:, :, row, column] = block.double().sum(dim=(2, 3)) / (down * across)
    return pooled


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 1, 2, 4])
@pytest.mark.parametrize("loss", ["feed", "hint"])
def test_reduced_terms_equal_the_naive_reference(size, loss):
    module = wide_module(sizes=EqualSizes() if size is None else PooledSize(size), distance=DISTANCES[loss]()).eval()
    batch = batch_of()
    terms, told = module.terms(batch), module.teachers.run(batch)
    student_feature = module.student.features(batch.input)
    for number, teacher in enumerate(module.teachers):
        target = teacher.features(batch.input).detach()
        target = target.double() if size is None else naive_pool(target, size)
        assert torch.allclose(told[f"feature_{number}"].double(), target, atol=1e-6)
        translated = module.translators[number](student_feature).detach()
        translated = translated.double() if size is None else naive_pool(translated, size)
        assert translated.shape == target.shape
        if loss == "feed":
            expected = naive_distance(translated, target, 1, "mean")
        else:
            pairs = zip(translated.flatten().tolist(), target.flatten().tolist(), strict=True)
            expected = sum((one - other) ** 2 for one, other in pairs) / target.numel()
        assert float(terms[f"{loss}_teacher_{number}"]) == pytest.approx(expected, rel=1e-4)


def test_the_attention_of_smaller_maps_is_that_of_pooled_features():
    module = wide_module(sizes=PooledSize(2), distance=AttentionDistance()).eval()
    batch, own = batch_of(), []
    for network in (module.student, *module.teachers):
        energy = (naive_pool(network.features(batch.input).detach(), 2) ** 2).sum(dim=1).flatten(1)
        own.append(energy / (energy**2).sum(dim=1, keepdim=True).sqrt())
    for number, teacher in enumerate(own[1:]):
        expected = float(((own[0] - teacher) ** 2).mean())
        assert float(module.terms(batch)[f"attention_teacher_{number}"]) == pytest.approx(expected, rel=1e-4)


def test_a_code_can_be_pooled():
    torch.manual_seed(1)
    paraphrasers = [Paraphraser(8), Paraphraser(12)]
    module = wide_module(paraphrasers=paraphrasers, sizes=PooledSize(2))
    told = module.teachers.run(batch_of())
    assert [told[f"feature_{number}"].shape for number in range(2)] == [(4, 4, 2, 2), (4, 6, 2, 2)]


def test_the_reduction_is_in_no_checkpoint_and_in_no_export(tmp_path):
    module = wide_module(sizes=PooledSize(2))
    assert not [name for name in module.state_dict() if not name.startswith(("student.", "translators."))]
    tiny_trainer().fit(module, datamodule=TinyDataModule())


def test_maps_of_other_sizes_meet_at_the_reduced_one():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher.append(nn.Linear(6, 3))
    options = {"num_classes": 3, "student_layer": "features", "teacher_layers": "1", "input_shape": SHAPE}
    with pytest.raises(InputError, match="tap layers of the same spatial size"):
        FEEDModule(TinyNet(), teacher, **options)
    module = FEEDModule(TinyNet(), teacher, sizes=PooledSize(4), **options)
    assert module.teachers.run(batch_of())["feature_0"].shape == (4, 6, 4, 4)


def test_features_smaller_than_the_pooled_size_are_refused():
    with pytest.raises(InputError, match=r"PooledSize\(5\) needs feature maps at least as large, and the student's is"):
        wide_module(sizes=PooledSize(5))


def test_vectors_cannot_be_pooled():
    distance = FactorDistance(translator=FunctionTranslator(nn.Linear))
    with pytest.raises(InputError, match=r"PooledSize\(1\) needs feature maps .* is \(3,\): lower it, or tap another"):
        wide_module(student_layer="head", distance=distance, sizes=PooledSize(1))
