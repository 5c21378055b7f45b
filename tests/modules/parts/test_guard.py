import math
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection

from distill_lightning import (
    Batch,
    CompressionBaseline,
    ExtracurricularModule,
    FEEDModule,
    FixedDiscriminator,
    GeneratorModule,
    KDModule,
    MEALV2Module,
    ParaphraserModule,
    PastModel,
    RegressionModule,
    SelfKDModule,
    SupervisedModule,
)
from distill_lightning.errors import InputError, NonFiniteError
from distill_lightning.testing import TinyNet, tiny_trainer

CLASSES = 3
INPUTS = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % CLASSES


def sgd(lr=0.1):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def supervised(**options):
    return SupervisedModule(TinyNet(), num_classes=CLASSES, optimizer=sgd(), **options)


def kd(**options):
    teachers = options.pop("teachers", None) or TinyNet()
    return KDModule(TinyNet(), teachers, num_classes=CLASSES, optimizer=sgd(), **options)


def feed(**options):
    return FEEDModule(
        TinyNet(),
        TinyNet(),
        num_classes=CLASSES,
        student_layer="features",
        teacher_layers="features",
        input_shape=(1, 8, 8),
        optimizer=sgd(),
        **options,
    )


def self_kd(**options):
    return SelfKDModule(TinyNet(), num_classes=CLASSES, past=PastModel(), optimizer=sgd(), **options)


def baseline(**options):
    return CompressionBaseline(TinyNet(), num_classes=CLASSES, optimizer=sgd(), **options)


def meal(**options):
    teachers = options.pop("teachers", None) or TinyNet()
    return MEALV2Module(TinyNet(), teachers, num_classes=CLASSES, discriminator=FixedDiscriminator(), **options)


def xcl(**options):
    return ExtracurricularModule(TinyNet(), options.pop("teachers", None) or TinyNet(), num_classes=CLASSES, **options)


READERS = [supervised, kd, feed, self_kd, baseline]
NO_READERS = [meal, xcl]


def loader(targets, inputs=INPUTS):
    return DataLoader(TensorDataset(inputs, targets), batch_size=8)


class Indexed(torch.utils.data.Dataset):
    """Which tells the samples' numbers, backwards from 123."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, number):
        return {"input": self.inputs[number], "target": self.targets[number], "index": 123 - number}


def indexed(targets=LABELS, inputs=INPUTS):
    return DataLoader(Indexed(inputs, targets), batch_size=8)


def train(module, data, **options):
    """Without validation, whose loader is there."""
    trainer = tiny_trainer(limit_val_batches=0, **options)
    trainer.fit(module, data, data)
    return trainer


def one_hot(labels):
    return nn.functional.one_hot(labels, CLASSES)


def sum_of_two(labels):
    return (one_hot(labels) + one_hot((labels + 1) % CLASSES)).float()


# Labels


@pytest.mark.parametrize("build", READERS)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (LABELS + 1, r"label of sample 2 of the batch in training batch 0 is 3, .* classes from 0 to 2, or -100"),
        (LABELS - 1, r"label of sample 0 of the batch in training batch 0 is -1, "),
        (sum_of_two(LABELS), r"label of sample 0 .* is \[1.0, 1.0, 0.0\], .* distributions, not negative and of sum 1"),
        (one_hot(LABELS) * math.nan, r"label of sample 0 .* is \[nan, nan, nan\]"),
        (one_hot(LABELS) * 2.0 - torch.tensor([1.0, 0, 0]), r"label of sample 1 of the batch .* is \[-1.0, 2.0, 0.0\]"),
        (LABELS.float(), r"targets are float32 of shape \(8,\): give classes as integers"),
        (one_hot(LABELS).float()[:, :2], r"targets are float32 of shape \(8, 2\): give classes as integers"),
        (one_hot(LABELS), r"targets have (shape )?\(8, 3\)"),
        (LABELS[:, None], r"\(8, 1\)"),
        (LABELS.to(torch.complex64), r"targets are complex64 of shape"),
    ],
    ids=["from 1", "-1", "multi-hot", "nan", "negative", "float", "two of 3", "one-hot", "column", "complex"],
)
def test_labels_that_cannot_be_right_are_refused_in_training(build, targets, message):
    with pytest.raises(InputError, match=message) as caught:
        train(build(), loader(targets))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("build", READERS + NO_READERS)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (LABELS + 1, "label of sample 2 of the batch in validation batch 0 is 3"),
        (one_hot(LABELS).float(), "metrics need classes"),
        (LABELS[:, None], r"\(8, 1\)"),
    ],
    ids=["from one", "soft", "column"],
)
def test_labels_that_cannot_be_right_are_refused_in_validation_and_test(build, targets, message):
    with pytest.raises(InputError, match=message):
        tiny_trainer().fit(build(), loader(LABELS), loader(targets))
    with pytest.raises(InputError, match=message.replace("validation", "test")):
        tiny_trainer().test(build(), loader(targets), verbose=False)


@pytest.mark.parametrize("build", NO_READERS)
def test_a_method_that_reads_no_label_takes_any_class(build):
    train(build(), loader(torch.full_like(LABELS, -1)))


def test_labels_without_a_weight_are_not_looked_at():
    train(kd(hard_label_weight=0.0), loader(LABELS + 1))


def test_missing_labels_are_named():
    module = supervised()
    with pytest.raises(InputError, match="SupervisedModule reads labels, and the batch has none"):
        module.training_step(Batch(INPUTS[:4]), 0)
    assert kd(hard_label_weight=0.0).training_step(Batch(INPUTS[:4]), 0).isfinite()


@pytest.mark.parametrize("build", READERS + NO_READERS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_integers_of_every_size_are_classes(build, dtype):
    logged = []
    for targets in (LABELS, LABELS.to(dtype)):
        torch.manual_seed(0)
        trainer = tiny_trainer(max_epochs=1)
        trainer.fit(build(), loader(targets), loader(targets))
        logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert logged[0] == logged[1]


@pytest.mark.parametrize("build", [supervised, kd, self_kd, baseline])
def test_soft_labels_train_as_cross_entropy_to_them(build):
    soft = torch.rand(24, CLASSES, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    train(build(), loader(soft))
    train(build(), loader(soft.half()))


def test_the_index_of_a_wrong_label_is_named():
    labels = LABELS.clone()
    labels[13] = 7
    with pytest.raises(InputError, match="label of sample 110 in training batch 1 is 7"):
        train(supervised(), indexed(labels))


def test_a_label_that_does_not_count_may_be_anything():
    batch = Batch(INPUTS[:4], torch.tensor([0, 9, 1, 2]), counted=torch.tensor([True, False, True, True]))
    module = supervised()
    module.guard.look(module, batch, 0, "train")
    with pytest.raises(InputError, match="label of sample 1 "):
        module.guard.look(module, batch.replace(counted=None), 0, "train")


def regression():
    return RegressionModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), num_targets=2, optimizer=sgd(0.01))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(24), r"targets have shape \(8,\) where num_targets=2 needs \(N, 2\)"),
        (torch.zeros(24, 1), r"targets have shape \(8, 1\) where num_targets=2 needs"),
        (torch.full((24, 2), math.inf), r"label of sample 0 .* is \[inf, inf\], and labels must be finite"),
    ],
    ids=["flat", "one", "infinite"],
)
def test_targets_of_a_regression(targets, message):
    with pytest.raises(InputError, match=message):
        train(regression(), loader(targets))
    train(regression(), loader(torch.zeros(24, 2)))


# Numbers


class Broken(TinyNet):
    """Gives nan for inputs that are marked by their first pixel."""

    def forward(self, inputs):
        return super().forward(inputs) + torch.where(inputs[:, 0, 0, 0] == 0.5, math.nan, 0.0)[:, None]


def marked(*rows):
    inputs = INPUTS.clone()
    inputs[list(rows), 0, 0, 0] = 0.5
    return inputs


@pytest.mark.parametrize("build", [supervised, kd, feed, self_kd, meal, xcl, baseline])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_input_that_is_not_finite_stops_training(build, value):
    inputs = INPUTS.clone()
    inputs[10] = value
    with pytest.raises(NonFiniteError) as caught:
        train(build(), indexed(inputs=inputs))
    message = str(caught.value)
    assert "113" in message
    assert "hold nan or inf" in message or "their inputs do, too" in message
    assert "\n" not in message


@pytest.mark.parametrize("build", [kd, meal, xcl])
def test_a_teacher_that_is_not_finite_is_named(build):
    module = build(teachers=[TinyNet(), Broken()])
    with pytest.raises(NonFiniteError, match=r"teacher 1 \(Broken\) answers nan or inf for samples 120, 106"):
        train(module, DataLoader(Indexed(marked(3, 17), LABELS), batch_size=24))


def test_a_loss_that_overflows_is_named_with_batch_and_epoch():
    class Exploding(SupervisedModule):
        def terms(self, batch):
            terms = super().terms(batch)
            after = self.trainer.current_epoch == 1 and self.trainer.fit_loop.batch_idx == 2
            return {"ce": terms["ce"], "more": terms["ce"] * (math.inf if after else 1.0)}

        def weights(self):
            return {"ce": 1.0, "more": 1.0}

    module = Exploding(TinyNet(), num_classes=CLASSES, optimizer=sgd())
    message = r"Exploding: train/more is not finite in batch 2 of epoch 2 \(samples 107, .*\): the inputs are finite"
    with pytest.raises(NonFiniteError, match=message):
        train(module, indexed(), max_epochs=2)


def test_a_student_that_is_not_finite_stops_an_evaluation():
    module = SupervisedModule(Broken(), num_classes=CLASSES)
    with pytest.raises(NonFiniteError, match=r"the student \(Broken\) gives nan or inf in validation batch 1"):
        tiny_trainer().validate(module, loader(LABELS, marked(9)), verbose=False)
    with pytest.raises(NonFiniteError, match="in test batch 2"):
        tiny_trainer().test(module, loader(LABELS, marked(20)), verbose=False)


@pytest.mark.filterwarnings("ignore:.*no sample of .* batch 0 counts")
def test_a_share_of_a_loss_of_zero_is_no_reason_to_stop():
    trainer = train(kd(), loader(torch.full_like(LABELS, -100)))
    assert trainer.callback_metrics["train/loss"] == 0


def test_another_device_is_read_at_the_end_of_an_epoch(monkeypatch):
    module = supervised()
    monkeypatch.setattr("distill_lightning.modules.parts.guard._is_read", lambda tensor, number: False)
    inputs = INPUTS.clone()
    inputs[10] = math.nan
    with pytest.raises(NonFiniteError, match=r"train/ce is not finite in batch 1 of epoch 1 \(samples 115, 114, "):
        train(module, indexed(inputs=inputs))
    # All batches were trained on.
    assert module.trainer.global_step == 3


def test_another_device_is_read_every_so_many_batches(monkeypatch):
    monkeypatch.setattr("distill_lightning.modules.parts.guard._is_read", lambda tensor, number: False)
    monkeypatch.setattr("distill_lightning.modules.parts.guard._EVERY", 2)
    module, inputs = supervised(), INPUTS.clone()
    inputs[1] = math.nan
    with pytest.raises(NonFiniteError, match="train/ce is not finite in batch 0 of epoch 1"):
        train(module, indexed(inputs=inputs))
    assert module.trainer.global_step == 2


def train_scaled(module, data):
    from pytorch_lightning.plugins.precision import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    train(module, data, plugins=[plugin])


@pytest.mark.lightning(since=(2, 0))
def test_steps_that_a_gradient_scaler_skips_are_counted():
    inputs = INPUTS.clone()
    inputs[1] = math.nan
    # Without BatchNorm, whose statistics would carry the nan on.
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    module = SupervisedModule(network, num_classes=CLASSES, optimizer=sgd())
    with pytest.warns(UserWarning, match="the loss was not finite in 1 of 3 batches of the epoch, whose steps"):
        train_scaled(module, loader(LABELS, inputs))
    assert all(parameter.isfinite().all() for parameter in network.parameters())


@pytest.mark.lightning(since=(2, 0))
def test_a_gradient_scaler_that_skips_every_step_is_stopped():
    with pytest.raises(NonFiniteError, match="not finite in 3 of 3 batches of the epoch, and every step was skipped"):
        train_scaled(supervised(), loader(LABELS, INPUTS * math.nan))


# Probabilities in the place of logits


class Softmaxed(TinyNet):
    def forward(self, inputs):
        return super().forward(inputs).softmax(dim=-1)


@pytest.mark.parametrize("build", [kd, meal, xcl])
def test_a_teacher_that_gives_probabilities_is_refused(build):
    module = build(teachers=[TinyNet(), Softmaxed()])
    with pytest.raises(InputError, match=r"teacher 1 \(Softmaxed\) gives probabilities where logits are needed"):
        train(module, loader(LABELS))


def test_a_student_that_gives_probabilities_is_refused_where_it_is_evaluated():
    module = SupervisedModule(Softmaxed(), num_classes=CLASSES)
    with pytest.raises(InputError, match=r"the student \(Softmaxed\) gives probabilities where logits are needed"):
        tiny_trainer().validate(module, loader(LABELS), verbose=False)


def test_the_guard_warns_of_nothing_in_an_ordinary_training():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = tiny_trainer(max_epochs=2)
        trainer.fit(kd(), indexed(), indexed())
    assert isinstance(trainer, pl.Trainer)
    assert trainer.global_step == 6


# Those who are let through


def test_positions_of_samples_that_do_not_count_are_not_looked_at():
    module = SupervisedModule(TinyNet(), num_classes=CLASSES)
    target = torch.tensor([[0, 1, 2], [9, 9, 9], [2, 1, 0]])
    batch = Batch(torch.zeros(3, 3), target, counted=torch.tensor([True, False, True]))
    module.guard.look(module, batch, 0, "train")
    with pytest.raises(InputError, match="label of sample 1 of the batch in training batch 0 is 9"):
        module.guard.look(module, batch.replace(counted=None), 0, "train")


@pytest.mark.parametrize("build", [lambda: kd(hard_label_weight=0.0), meal, xcl])
def test_who_reads_no_labels_takes_floats(build):
    train(build(), loader(LABELS.float()))


def test_a_baseline_whose_labels_have_no_weight_does_not_look_at_them():
    train(baseline(teacher=TinyNet(), hard_label_weight=0.0), loader(LABELS + 1))
    with pytest.raises(InputError, match="label of sample 2"):
        train(baseline(teacher=TinyNet()), loader(LABELS + 1))


class PerPosition(nn.Module):
    """Logits for each of eight positions, nan for those whose input is marked."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs):
        logits = self.head(inputs[:, 0])
        return torch.where((inputs[:, 0, :, 0] == 0.5)[..., None], math.nan, logits)


def test_what_an_output_holds_where_nothing_counts_does_not_matter():
    inputs, targets = INPUTS.clone(), LABELS[:, None].expand(-1, 8).clone()
    inputs[:, 0, 5:, 0] = 0.5
    targets[:, 5:] = -100
    module = SupervisedModule(PerPosition(), num_classes=CLASSES)
    tiny_trainer().validate(module, loader(targets, inputs), verbose=False)
    distilled = KDModule(PerPosition(), PerPosition(), num_classes=CLASSES, hard_label_weight=0.0, optimizer=sgd())
    distilled.teachers.heard = [distilled.teachers[0](inputs)]
    distilled.guard._look_at_teachers(distilled, Batch(inputs, targets))
    targets[3, 5] = 0
    with pytest.raises(NonFiniteError, match="gives nan or inf in validation batch 0"):
        tiny_trainer().validate(module, loader(targets, inputs), verbose=False)
    with pytest.raises(NonFiniteError, match="answers nan or inf for samples 3 of the batch"):
        distilled.guard._look_at_teachers(distilled, Batch(inputs, targets))


class Masked(TinyNet):
    """Which never gives the last class."""

    def forward(self, inputs):
        return super().forward(inputs) + torch.tensor([0.0, 0.0, -math.inf])


def test_a_class_may_be_masked_by_minus_infinity():
    tiny_trainer().validate(SupervisedModule(Masked(), num_classes=CLASSES), loader(LABELS % 2), verbose=False)


def test_a_term_cannot_be_called_loss():
    class Named(SupervisedModule):
        def terms(self, batch):
            return {"loss": super().terms(batch)["ce"]}

        def weights(self):
            return {"loss": 1.0}

    with pytest.raises(KeyError, match="not 'loss'"):
        train(Named(TinyNet(), num_classes=CLASSES), loader(LABELS))


def test_a_method_with_batches_of_its_own_is_left_alone():
    class Own(SupervisedModule):
        def prepared(self, batch, batch_idx=0):
            return super().prepared((batch[0], batch[1] - 1), batch_idx)

    train(Own(TinyNet(), num_classes=CLASSES, optimizer=sgd()), loader(LABELS + 1))


def test_metrics_of_ones_own_may_read_distributions():
    class SoftLoss(MeanMetric):
        def update(self, logits, target):
            super().update(-(target * logits.log_softmax(dim=1)).sum(dim=1))

    soft = one_hot(LABELS).float() * 0.9 + 0.1 / CLASSES
    module = supervised(metrics=MetricCollection({"soft": SoftLoss()}))
    trainer = tiny_trainer()
    trainer.validate(module, loader(soft), verbose=False)
    module.eval()
    with torch.no_grad():
        expected = -(soft * module(INPUTS).log_softmax(dim=1)).sum(dim=1).mean()
    assert trainer.callback_metrics["val/soft"] == pytest.approx(expected.item(), rel=1e-5)


class Pair(TinyNet):
    def forward(self, inputs):
        return super().forward(inputs), inputs


def test_networks_that_return_several_tensors_are_named():
    with pytest.raises(InputError, match="Pair returns tuple of 2 tensors, and one tensor"):
        train(kd(teachers=Pair()), loader(LABELS))
    with pytest.raises(InputError, match="Pair returns tuple of 2 tensors, and one tensor"):
        tiny_trainer().validate(SupervisedModule(Pair(), num_classes=CLASSES), loader(LABELS), verbose=False)


def test_an_evaluation_without_labels_is_refused():
    class Unlabelled(Indexed):
        def __getitem__(self, number):
            return Batch(self.inputs[number][None], None)

    batches = DataLoader(Unlabelled(INPUTS, LABELS), batch_size=None)
    with pytest.raises(InputError, match="KDModule is evaluated on labels, and the batch has none"):
        tiny_trainer().validate(kd(), batches, verbose=False)


def test_without_a_trainer_nothing_is_kept():
    module = supervised()
    for number in range(3):
        module.training_step(Batch(INPUTS[:4], LABELS[:4], index=torch.arange(4)), number)
    assert not module.guard._samples


def test_what_the_device_has_noted_is_read_before_a_validation(monkeypatch):
    monkeypatch.setattr("distill_lightning.modules.parts.guard._is_read", lambda tensor, number: False)
    inputs = INPUTS.clone()
    inputs[1] = math.nan
    with pytest.raises(NonFiniteError, match="train/ce is not finite in batch 0 of epoch 1"):
        tiny_trainer().fit(supervised(), indexed(inputs=inputs), indexed())


# What the first batch shows


@pytest.mark.parametrize("val", [True, False])
@pytest.mark.parametrize(
    "build",
    [
        lambda: SupervisedModule(TinyNet(5), num_classes=10),
        lambda: SelfKDModule(TinyNet(5), num_classes=10, past=PastModel()),
        lambda: CompressionBaseline(TinyNet(5), num_classes=10),
        lambda: KDModule(TinyNet(5), TinyNet(5), num_classes=10),
        lambda: KDModule(TinyNet(5), TinyNet(10), num_classes=10),
    ],
)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_student_of_another_number_of_classes_is_refused_at_the_first_batch(build, val):
    module = build()
    with pytest.raises(InputError, match=r"student \(TinyNet\) has 5 classes where num_classes=10 is needed"):
        tiny_trainer(max_epochs=1).fit(module, loader(LABELS), loader(LABELS) if val else None)
    assert not module.student._forward_hooks


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: (x * 255).byte(), "'features.0': its inputs are bytes: let the data module give v2.ToDtype"),
        (lambda x: x.double(), "'features.0': its inputs are torch.float64, its weights torch.float32"),
        (lambda x: x[:, 0], r"gets 8 of the inputs \(N, 8, 8\) of .*: they have no channels: .* image\[None\]"),
        (
            lambda x: x.permute(0, 2, 3, 1),
            r"gets 8 of the inputs \(N, 8, 8, 1\) of .*: their channels are last: .*permute",
        ),
        (lambda x: x.expand(-1, 3, -1, -1), r"reads 1 channel by its first layer, .*, which gets 3 of the inputs"),
    ],
)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("verb", ["fit", "validate", "predict", "teacher"])
def test_images_that_a_network_cannot_read_are_named(change, told, verb):
    class Any(TinyNet):
        def forward(self, inputs):
            return super().forward(inputs.reshape(-1, 1, 8, 8).float()[: len(inputs)])

    module = kd(teachers=TinyNet()) if verb == "teacher" else supervised()
    if verb == "teacher":
        module.student = Any()
    trainer = tiny_trainer(max_epochs=1, num_sanity_val_steps=0)
    run = {"validate": trainer.validate, "predict": trainer.predict}.get(verb, trainer.fit)
    with pytest.raises(InputError, match=told) as caught:
        run(module, loader(LABELS, change(INPUTS)))
    assert ("teacher 0 (TinyNet)" if verb == "teacher" else "the student (TinyNet)") in str(caught.value)


def test_another_error_of_a_network_stays_what_it_is():
    class Broken(TinyNet):
        def forward(self, inputs):
            raise RuntimeError("a reason of its own")

    with pytest.raises(RuntimeError, match="a reason of its own"):
        train(SupervisedModule(Broken(), num_classes=CLASSES), loader(LABELS))


def test_a_third_entry_that_looks_like_an_index_is_said_to_be_left_out():
    data = DataLoader(TensorDataset(INPUTS, LABELS, torch.arange(24)), batch_size=8)
    with pytest.warns(UserWarning, match=r"third entry of the batches is left out: .*Batch\(input, target, index\)"):
        tiny_trainer(max_epochs=1).fit(supervised(), data, loader(LABELS))
    weights = DataLoader(TensorDataset(INPUTS, LABELS, torch.rand(24)), batch_size=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the third entry")
        tiny_trainer(max_epochs=1).fit(supervised(), weights, loader(LABELS))


class Probable(TinyNet):
    def forward(self, images):
        return super().forward(images).softmax(dim=1)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_student_that_gives_probabilities_is_refused_where_nothing_is_validated():
    with pytest.raises(InputError, match=r"the student \(Probable\) gives probabilities where logits are needed"):
        tiny_trainer(max_epochs=1).fit(SupervisedModule(Probable(), num_classes=CLASSES), loader(LABELS))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_a_scripted_student_trains():
    student = torch.jit.script(TinyNet())
    before = student.head.weight.clone()
    train(SupervisedModule(student, num_classes=CLASSES, optimizer=sgd()), loader(LABELS))
    assert not torch.equal(student.head.weight, before)


@pytest.mark.parametrize("wrong", [LABELS + 1, LABELS.float(), one_hot(LABELS).float() * 2])
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_meal_v2_looks_at_labels_that_have_a_weight(wrong):
    module = meal(hard_label_weight=0.5)
    assert module.reads_labels
    with pytest.raises(InputError, match=r"label of sample|the targets are"):
        tiny_trainer(max_epochs=1).fit(module, loader(wrong))
    assert not meal().reads_labels


def test_labels_of_which_none_counts_are_said_to_teach_nothing():
    nothing = torch.full_like(LABELS, -100)
    with pytest.warns(UserWarning, match="no sample of training batch 0 counts, so that it teaches nothing"):
        tiny_trainer(max_epochs=1).fit(kd(hard_label_weight=0.0), loader(nothing), loader(LABELS))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize(
    "build",
    [
        lambda: ParaphraserModule(TinyNet(), layers="features", input_shape=(1, 8, 8), optimizer=sgd()),
        lambda: GeneratorModule(input_shape=(1, 8, 8), output_range=(-5.0, 5.0)),
    ],
)
def test_modules_without_a_student_stop_on_nan(build):
    inputs = INPUTS.clone()
    inputs[13] = math.nan
    told = r"train/loss is not finite in batch 1 of epoch 1: the inputs of samples 5 of the batch hold nan"
    with pytest.raises(NonFiniteError, match=told):
        tiny_trainer(max_epochs=1).fit(build(), loader(LABELS, inputs))
