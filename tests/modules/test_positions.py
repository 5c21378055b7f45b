"""Classifiers of every position of a sequence: language models, trained, distilled and evaluated."""

import math
from types import SimpleNamespace

import pytest
import torch

from distill_lightning import (
    Batch,
    DocstringsDataModule,
    ExtracurricularModule,
    FactorDistance,
    FEEDModule,
    InputError,
    KDModule,
    LabelSmoothing,
    MEALV2Module,
    NoDiscriminator,
    NoTranslator,
    PastModel,
    SelfKDModule,
    SmallLSTM,
    SmallTransformer,
    SupervisedModule,
    TeacherEnsemble,
)
from distill_lightning.callbacks import ReliabilityDiagram, TeacherReport
from distill_lightning.cli import main
from distill_lightning.teachers import TeacherStore
from distill_lightning.teachers.recorder import record
from distill_lightning.testing import TinyDataModule, tiny_trainer

LENGTH, CLASSES = 6, 256


def data_of(folder, **options):
    for number in range(12):
        (folder / f"module_{number}.py").write_text(f'"""{chr(97 + number)} text {number} of a few bytes more."""\n')
    return DocstringsDataModule(
        data_dir=folder, length=LENGTH, batch_size=7, **({"val_size": 10, "test_size": 11} | options)
    )


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    return data_of(folder)


def lstm(seed=0):
    torch.manual_seed(seed)
    return SmallLSTM(CLASSES, vocabulary=CLASSES, width=8)


def transformer(seed=0):
    torch.manual_seed(seed)
    return SmallTransformer(CLASSES, vocabulary=CLASSES, length=LENGTH, width=8, feedforward=8)


def supervised(**options):
    return SupervisedModule(lstm(), num_classes=CLASSES, input_shape=(LENGTH,), **options)


def loud(seed):
    """A teacher that is sure of what it says."""
    network = transformer(seed)
    with torch.no_grad():
        network.head.weight.mul_(10)
    return network


def kd(store=None, **options):
    """With a store: its folder, and what it is made with."""
    teachers = TeacherEnsemble([loud(1), loud(2)], weights=[1, 3])
    if store is not None:
        teachers = TeacherStore(store.pop("path"), teachers, **store)
    return KDModule(lstm(), teachers, num_classes=CLASSES, input_shape=(LENGTH,), **({"temperature": 2.0} | options))


def batch_of(samples=3):
    text = torch.randint(0, CLASSES, (samples, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return Batch(text[:, :-1], text[:, 1:], torch.arange(samples), torch.zeros(samples, dtype=torch.long))


def softmax(row, temperature=1.0):
    exps = [math.exp(value / temperature) for value in row]
    return [value / sum(exps) for value in exps]


def positions(tensor):
    """Rows of logits or classes, as Python numbers."""
    return [entry for sample in tensor.tolist() for entry in sample]


# Terms


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@torch.no_grad()
def test_the_cross_entropy_is_the_mean_over_all_positions(label_smoothing):
    module, batch = supervised(transforms=[LabelSmoothing(label_smoothing)] if label_smoothing else []), batch_of()
    total = 0.0
    for row, label in zip(positions(module(batch.input)), positions(batch.target), strict=True):
        logs = [math.log(value) for value in softmax(row)]
        total -= (1 - label_smoothing) * logs[label] + label_smoothing * sum(logs) / len(logs)
    assert module.terms(module.prepared(batch))["ce"].item() == pytest.approx(total / (3 * LENGTH), rel=1e-5)


@torch.no_grad()
def test_both_terms_of_kd_are_means_over_all_positions():
    module, batch = kd(), batch_of()
    student = positions(module(batch.input))
    teachers = [positions(network(batch.input)) for network in module.teachers]
    ce = divergence = 0.0
    for place, label in enumerate(positions(batch.target)):
        ce -= math.log(softmax(student[place])[label])
        first, second = (softmax(logits[place], 2.0) for logits in teachers)
        for k, own in enumerate(softmax(student[place], 2.0)):
            mean = 0.25 * first[k] + 0.75 * second[k]
            divergence += mean * (math.log(mean) - math.log(own))
    terms = module.terms(batch)
    assert terms["ce"].item() == pytest.approx(ce / (3 * LENGTH), rel=1e-5)
    assert terms["kd"].item() == pytest.approx(4 * divergence / (3 * LENGTH), rel=1e-4)


@torch.no_grad()
def test_an_ensemble_predicts_every_position():
    ensemble, batch = TeacherEnsemble([loud(1), loud(2)], weights=[1, 3]), batch_of()
    assert ensemble.logits(batch.input).shape == (2, 3, LENGTH, CLASSES)
    first, second = (network(batch.input).softmax(-1) for network in ensemble)
    expected = 0.25 * first + 0.75 * second
    torch.testing.assert_close(ensemble.probabilities(batch.input), expected)
    torch.testing.assert_close(ensemble(batch.input), expected.log(), rtol=1e-4, atol=1e-4)


# From end to end


@torch.no_grad()
def naive_metrics(module, loader):
    module.eval()
    hits = nll = squares = top = same = divergence = count = 0
    for batch in loader:
        student = positions(module.student(batch.input))
        teacher = None if not module.teachers else positions(module.teachers.ensemble(batch.input))
        for place, label in enumerate(positions(batch.target)):
            probs, row = softmax(student[place]), student[place]
            count += 1
            hits += row.index(max(row)) == label
            top += label in sorted(range(len(row)), key=lambda k: -row[k])[:5]
            nll -= math.log(probs[label])
            squares += sum((value - (k == label)) ** 2 for k, value in enumerate(probs))
            if teacher is not None:
                same += row.index(max(row)) == teacher[place].index(max(teacher[place]))
                divergence += sum(
                    math.exp(log) * (log - math.log(p)) for log, p in zip(teacher[place], probs, strict=True)
                )
    found = {"accuracy": hits, "top5": top, "nll": nll, "brier": squares}
    found |= {"agreement": same, "teacher_kl": divergence} if teacher is not None else {}
    return count, {name: value / count for name, value in found.items()}


def self_kd_of_positions(**options):
    """Self-KD with the past model, which positions need."""
    return SelfKDModule(lstm(), num_classes=CLASSES, input_shape=(LENGTH,), past=PastModel(), **options)


def test_its_first_epoch_is_plain_training_at_every_position(data):
    modules = [self_kd_of_positions(), supervised()]
    for module in modules:
        tiny_trainer(max_epochs=1).fit(module, datamodule=data)
    first, second = (module.state_dict() for module in modules)
    for name, value in first.items():
        # The mean is taken over rows of another shape.
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("build", [supervised, kd, self_kd_of_positions])
def test_training_validation_and_test_count_positions(data, build):
    module = build()
    trainer = tiny_trainer(max_epochs=3)
    trainer.fit(module, datamodule=data)
    logged = dict(trainer.callback_metrics)
    count, expected = naive_metrics(module, data.val_dataloader())
    assert count == 10 * LENGTH
    for name, value in expected.items():
        assert logged[f"val/{name}"].item() == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert math.isfinite(logged["train/loss"])
    results = trainer.test(module, datamodule=data, verbose=False)[0]
    count, expected = naive_metrics(module, data.test_dataloader())
    assert count == 11 * LENGTH
    for name, value in expected.items():
        assert results[f"test/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    predictions = torch.cat(trainer.predict(module, datamodule=data))
    assert predictions.shape == (11, LENGTH, CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("build", [supervised, kd])
def test_training_lowers_the_loss(data, build):
    module = build(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02))
    data.setup()
    trainer = tiny_trainer(max_epochs=8)
    before = trainer.validate(module, datamodule=data, verbose=False)[0]
    trainer.fit(module, datamodule=data)
    name = "val/nll" if build is supervised else "val/teacher_kl"
    assert trainer.callback_metrics[name] < before[name] - 0.05


def test_a_checkpoint_builds_language_models_again(data, tmp_path):
    module = kd()
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "kd.ckpt")
    # The teachers' weights are in no checkpoint.
    loaded = KDModule.load_from_checkpoint(tmp_path / "kd.ckpt", teachers=module.teachers.ensemble).eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch_of().input), module.eval()(batch_of().input))
    assert [type(network) for network in (loaded.student, *loaded.teachers)] == [
        SmallLSTM,
        SmallTransformer,
        SmallTransformer,
    ]


def test_a_resumed_training_is_the_uninterrupted_one(data, tmp_path):
    whole = supervised()
    tiny_trainer(max_epochs=2).fit(whole, datamodule=data)
    first = supervised()
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(first, datamodule=data)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    resumed = SupervisedModule(lstm(seed=9), num_classes=CLASSES, input_shape=(LENGTH,))
    tiny_trainer(max_epochs=2).fit(resumed, datamodule=data, ckpt_path=str(tmp_path / "first.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"top_k": 256}, {"keep": "logits"}], ids=["answers", "top_k", "logits"])
def test_a_store_answers_for_the_teachers_at_every_position(data, tmp_path, options):
    online = kd()
    tiny_trainer(max_epochs=2).fit(online, datamodule=data)
    stored = kd(store={"path": tmp_path / "store", "dtype": "float32", **options})
    tiny_trainer(max_epochs=2).fit(stored, datamodule=data)
    assert stored.teachers.store.is_complete
    for name, value in online.student.state_dict().items():
        torch.testing.assert_close(stored.student.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_the_largest_probabilities_of_every_position_are_kept(data, tmp_path):
    module = kd(store={"path": tmp_path / "store", "dtype": "float32", "top_k": 3})
    store = module.teachers.store
    record(tiny_trainer(), module, data)
    batch = next(iter(data.train_dataloader()))
    kept = store.read_or_ask(batch, None, device="cpu")["probabilities"]
    exact = module.teachers.ensemble.probabilities(batch.input, temperature=2.0)
    assert kept.shape == exact.shape == (7, LENGTH, CLASSES)
    for found, row in zip(kept.flatten(0, 1), exact.flatten(0, 1), strict=True):
        first = row.topk(3).indices
        rest = (1 - row[first].sum()) / (CLASSES - 3)
        torch.testing.assert_close(found, torch.full((CLASSES,), rest.item()).index_copy(0, first, row[first]))
    assert store.shapes() == {"probabilities": (LENGTH, CLASSES)}


def test_samples_that_fill_up_a_share_do_not_count(monkeypatch):
    module, batch = kd(), batch_of(4).replace(counted=torch.tensor([True, False, True, False]))
    monkeypatch.setattr(module, "log_dict", lambda *args, **options: None)
    module._trainer = SimpleNamespace(num_val_batches=[1, 1], world_size=1, state=SimpleNamespace(fn="fit"))
    with torch.no_grad():
        outputs = module.eval().validation_step(batch, 0)
    assert module.val_metrics["accuracy"].count == module.val_teacher_metrics["agreement"].count == 2 * LENGTH
    assert torch.equal(outputs["target"], batch.target[[0, 2]].flatten())
    torch.testing.assert_close(outputs["output"], module(batch.input)[[0, 2]].flatten(0, 1).detach())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* little better than guessing:UserWarning")
def test_callbacks_see_positions(data):
    diagram, report = ReliabilityDiagram(), TeacherReport()
    module = kd()
    trainer = tiny_trainer(callbacks=[diagram, report])
    trainer.fit(module, datamodule=data)
    assert diagram.figure is not None
    rows = {row["name"]: row for row in report.rows}
    module.eval()
    with torch.no_grad():
        hits = [
            (module.teachers.ensemble(batch.input).argmax(-1) == batch.target).flatten()
            for batch in data.val_dataloader()
        ]
    assert rows["ensemble"]["accuracy"] == pytest.approx(torch.cat(hits).float().mean().item())
    assert rows.keys() == {"teacher_0", "teacher_1", "ensemble"}


@pytest.mark.slow
def test_the_command_line_trains_a_language_model(data, tmp_path):
    main([
        "fit", "--model=SupervisedModule", "--model.student=distill_lightning.SmallTransformer",
        "--model.student.num_classes=256", "--model.student.vocabulary=256", f"--model.student.length={LENGTH}",
        "--data=DocstringsDataModule", f"--data.data_dir={data.data_dir}", f"--data.length={LENGTH}",
        "--data.val_size=10", "--data.test_size=11", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}",
    ])  # fmt: skip
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    loaded = SupervisedModule.load_from_checkpoint(path)
    assert loaded.input_shape == (LENGTH,)
    assert loaded(batch_of().input).shape == (3, LENGTH, CLASSES)


# Who cannot


def feed(student, teacher, **options):
    return FEEDModule(
        student,
        teacher,
        num_classes=CLASSES,
        student_layer="head",
        teacher_layers="head",
        beta=1.0,
        distance=FactorDistance(translator=NoTranslator()),
        **options,
    )


def self_kd(student, teacher, **options):
    return SelfKDModule(student, num_classes=CLASSES, **options)


def meal_v2(student, teacher, **options):
    return MEALV2Module(
        student, teacher, num_classes=CLASSES, discriminator=NoDiscriminator(), hard_label_weight=0.0, **options
    )


def extracurricular(student, teacher, **options):
    return ExtracurricularModule(student, teacher, num_classes=CLASSES, extra_ratio=0.0, **options)


OTHERS = [feed, self_kd, meal_v2, extracurricular]


@pytest.mark.parametrize("build", OTHERS)
def test_other_methods_refuse_networks_that_predict_every_position(build):
    message = (
        r"student \(SmallLSTM\) predicts a class for each position, \(1, 6, 256\): use a module that takes pos.*"
        r"SelfKDModule with past=PastModel\(\)"
    )
    with pytest.raises(InputError, match=message):
        build(lstm(), loud(1), input_shape=(LENGTH,))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}], ids=["validated", "not validated"])
@pytest.mark.parametrize("build", OTHERS[1:])
def test_other_methods_refuse_targets_of_every_position(data, build, options):
    module = build(lstm(), loud(1))
    message = r"Module takes one class for each sample, and the targets have shape \(7, 6\): use a module that takes"
    with pytest.raises(InputError, match=message):
        tiny_trainer(**options).fit(module, datamodule=data)


def test_another_number_of_classes_is_refused():
    with pytest.raises(
        InputError, match=r"student \(SmallLSTM\) has an output of shape \(1, 6, 256\) where num_classes=9"
    ):
        SupervisedModule(lstm(), num_classes=9, input_shape=(LENGTH,))
    other = SmallLSTM(9, vocabulary=CLASSES)
    with pytest.raises(
        InputError, match=r"teacher 0 \(SmallLSTM\) has an output of shape \(1, 6, 9\) where num_classes"
    ):
        KDModule(lstm(), other, num_classes=CLASSES, input_shape=(LENGTH,))


def test_a_student_of_samples_is_refused_with_targets_of_positions():
    network = torch.nn.Sequential(
        torch.nn.Embedding(CLASSES, 4), torch.nn.Flatten(), torch.nn.Linear(4 * LENGTH, CLASSES)
    )
    module = SupervisedModule(network, num_classes=CLASSES, input_shape=(LENGTH,))
    rows = module.terms(Batch(batch_of().input, torch.tensor([1, 2, 3])))
    assert rows["ce"].ndim == 0
    language_model = supervised()
    with pytest.raises(InputError, match=r"need a target for each position, \(3, 6\), got \(3,\)"):
        language_model.terms(Batch(batch_of().input, torch.tensor([1, 2, 3])))


def test_images_are_classified_by_their_rows():
    torch.manual_seed(0)
    student = SmallLSTM(3, input_size=8, width=8)
    module = KDModule(student, SmallLSTM(3, input_size=8, width=8), num_classes=3, input_shape=(1, 8, 8))
    trainer, data = tiny_trainer(), TinyDataModule()
    trainer.fit(module, datamodule=data)
    batches = list(data.val_dataloader())
    with torch.no_grad():
        hits = torch.cat([student.eval()(batch.input).argmax(1) == batch.target for batch in batches])
    assert hits.shape == (24,)
    assert trainer.callback_metrics["val/accuracy"].item() == pytest.approx(hits.float().mean().item())
