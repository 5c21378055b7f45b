"""`Teachers`: one way to ask, whoever answers, and networks that stand outside of the module's registry."""

import copy
import json
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distill_lightning import (
    Batch,
    DistillationModule,
    ExtracurricularModule,
    Features,
    FixedDiscriminator,
    InputError,
    KDModule,
    Logits,
    MEALV2Module,
    MeanLogits,
    Softened,
    TeacherEnsemble,
    Teachers,
    TeacherStore,
)
from distill_lightning.layers import Paraphraser
from distill_lightning.modules.parts.extra_inputs import ExtraInputs
from distill_lightning.teachers import About
from distill_lightning.teachers.recorder import record
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

EVERYTHING = [Softened(2.0), Logits(), MeanLogits(), Features("features")]


def networks(count=2):
    torch.manual_seed(5)
    found = [TinyNet(width=8) for _ in range(count)]
    for network in found:
        nn.init.normal_(network.head.weight)
    return found


def batch_of(count=4):
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return Batch(images, torch.arange(count) % 3, torch.arange(count), torch.zeros(count, dtype=torch.long))


class Asking(DistillationModule):
    """Asks whatever it is told to."""

    def __init__(self, student, teachers, *, ask, about=None, **options):
        super().__init__(student, **({"num_classes": 3} | options))
        self.teachers = Teachers(teachers, ask=ask, about=about)

    def terms(self, batch):
        return {"ce": F.cross_entropy(self.student(batch.input), batch.target)}

    def weights(self):
        return {"ce": 1.0}


class Reading(Asking):
    """Reads every answer in training, and keeps it."""

    READ: ClassVar = ("probabilities", "logits", "mean_logits", "features")

    def terms(self, batch):
        found = {name: getattr(self.teachers, name)(batch) for name in self.READ}
        self.read.append((batch.index, batch.view, found))
        return super().terms(batch)


def asking(teachers=None, ask=EVERYTHING, *, kind=Asking, **options):
    teachers = networks() if teachers is None else teachers
    torch.manual_seed(0)
    return kind(TinyNet(), teachers, ask=ask, **options)


def calls_of(found):
    calls = []
    for network in found:
        network.register_forward_hook(lambda *_: calls.append(1))
    return calls


# What is asked and answered


def test_the_answers_are_those_of_the_networks_by_hand():
    found, batch = networks(), batch_of()
    teachers = asking(TeacherEnsemble(found, weights=[1, 3])).teachers
    with torch.no_grad():
        logits = [network(batch.input) for network in found]
        features = [network.features(batch.input) for network in found]
    assert torch.allclose(teachers.logits(batch), torch.stack(logits))
    softmaxes = [F.softmax(one / 2, dim=1) for one in logits]
    assert torch.allclose(teachers.probabilities(batch), (softmaxes[0] + 3 * softmaxes[1]) / 4, atol=1e-6)
    assert torch.equal(teachers.distribution(batch), teachers.probabilities(batch))
    assert torch.allclose(teachers.mean_logits(batch), (logits[0] + 3 * logits[1]) / 4, atol=1e-5)
    for answer, expected in zip(teachers.features(batch), features, strict=True):
        assert torch.equal(answer, expected)


def test_every_network_runs_once_a_batch_however_many_questions_there_are():
    found, batch = networks(), batch_of()
    teachers = asking(found).teachers
    calls = calls_of(found)
    for _ in range(2):
        for name in ("probabilities", "logits", "mean_logits", "features"):
            getattr(teachers, name)(batch)
    assert len(calls) == 2
    teachers.probabilities(batch_of())
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("ask", "name", "missing"),
    [
        ([Softened()], "logits", "Logits"),
        ([Softened()], "mean_logits", "MeanLogits"),
        ([Softened()], "features", "Features"),
        ([Logits(), MeanLogits()], "probabilities", "Softened"),
        ([], "probabilities", "Softened"),
    ],
)
def test_a_question_that_was_not_declared_is_refused(ask, name, missing):
    found = networks()
    teachers, calls = asking(found, ask).teachers, calls_of(found)
    asked = ", ".join(type(question).__name__ for question in ask) or "nothing"
    with pytest.raises(InputError) as caught:
        getattr(teachers, name)(batch_of())
    assert str(caught.value) == (
        f"Asking reads the teachers' {name} but asks for {asked}: add {missing} to Teachers(ask=...)"
    )
    assert calls == []


def test_a_question_that_was_not_declared_is_refused_though_the_store_knows_the_answer(tmp_path):
    read_all(tmp_path, TeacherStore(tmp_path, networks(), dtype="float32"))

    class Undeclared(Reading):
        READ = ("probabilities", "mean_logits")

    with pytest.raises(InputError, match="reads the teachers' mean_logits but asks for Softened: add MeanLogits"):
        read_all(tmp_path, TeacherStore(tmp_path, dtype="float32"), ask=[Softened(2.0)], kind=Undeclared)


def test_without_teachers_nothing_is_answered():
    module = asking([TinyNet()])
    module.teachers = Teachers(None, ask=[])
    assert not module.teachers
    assert len(module.teachers) == 0
    assert list(module.teachers) == []
    assert module.teachers.ensemble is None
    assert module.teachers.store is None
    assert module.teachers.prediction(batch_of().input) is None
    assert module.teachers.predictions(batch_of().input) == []
    for refused in (lambda: module.teachers.run(batch_of()), lambda: module.teachers.shapes((1, 8, 8))):
        with pytest.raises(InputError, match="there are no teachers: give networks, or a complete TeacherStore"):
            refused()


@pytest.mark.parametrize(
    ("kind", "options"),
    [(KDModule, {}), (MEALV2Module, {"discriminator": FixedDiscriminator()}), (ExtracurricularModule, {})],
)
def test_who_has_nobody_to_ask_cannot_train_but_be_validated(kind, options):
    module = kind(TinyNet(), None, num_classes=3, **options)
    tiny_trainer().validate(module, datamodule=TinyDataModule(), verbose=False)
    with pytest.raises(InputError, match="there are no teachers: give networks, or a complete TeacherStore"):
        tiny_trainer().fit(module, datamodule=TinyDataModule())


def test_a_temperature_that_is_not_positive_is_refused():
    with pytest.raises(InputError, match="temperature must be positive, got 0"):
        Softened(0)


def test_layers_are_one_for_all_or_one_each():
    found, batch = networks(), batch_of()
    first, second = asking(found, [Features(["features", "features.0"])]).teachers.features(batch)
    with torch.no_grad():
        assert torch.equal(first, found[0].features(batch.input))
        assert torch.equal(second, found[1].features[0](batch.input))
    way_out = r"give one for all, or one each \(a name, or a list of 2 names; got \['features'\]\)"
    with pytest.raises(InputError, match=f"1 layers for 2 teachers: {way_out}"):
        asking(found, [Features(["features"])])


def test_features_are_the_paraphrasers_codes_at_the_size_that_is_asked_for():
    found, batch = networks(), batch_of()
    torch.manual_seed(3)
    paraphrasers = [Paraphraser(16) for _ in found]
    question = Features("features", paraphrasers=paraphrasers, size=2)
    module = asking(found, [question])
    answers = module.teachers.features(batch)
    with torch.no_grad():
        codes = [one.encoder(network.features(batch.input)) for one, network in zip(paraphrasers, found, strict=True)]
    for number, (answer, code) in enumerate(zip(answers, codes, strict=True)):
        assert torch.equal(answer, F.adaptive_avg_pool2d(code, 2))
        assert question.shape_of(number, (1, 16, 4, 4)) == (1, *answer.shape[1:])
    assert module.teachers.shapes((1, 8, 8)) == [(1, 16, 4, 4)] * 2
    assert not any(one.training or any(p.requires_grad for p in one.parameters()) for one in paraphrasers)
    with pytest.raises(InputError, match="paraphraser 1 does not read the 8 channels of teacher 1's feature"):
        question.shape_of(1, (1, 8, 4, 4))
    assert module.fingerprints().keys() == {"teachers", "paraphrasers"}


class Halves(About):
    """A batch's own inputs, and half and a quarter of each."""

    def inputs(self, batch):
        return {"": batch.input, "less": torch.cat([batch.input / 2, batch.input / 4])}

    def describe(self):
        return {"halves": True}


def test_the_answers_are_about_the_inputs_that_are_asked_about():
    found, batch = networks(), batch_of()
    calls = calls_of(found)
    teachers = asking(found, [Softened()], about=Halves()).teachers
    answer = teachers.probabilities(batch)
    assert len(calls) == 2
    inputs = torch.cat([batch.input, batch.input / 2, batch.input / 4])
    assert torch.allclose(answer, TeacherEnsemble(found).probabilities(inputs), atol=1e-6)
    kept = teachers.rows_to_store(batch)
    assert list(kept) == ["probabilities", "probabilities_less_0", "probabilities_less_1"]
    assert torch.equal(torch.cat(list(kept.values())), answer)


# Whoever answers


def read_all(folder, teachers, *, ask=EVERYTHING, kind=Reading, epochs=2):
    """What is read in training, by sample and view."""
    module = asking(teachers, ask, kind=kind)
    module.read = []
    tiny_trainer(max_epochs=epochs, limit_val_batches=0).fit(module, datamodule=TinyDataModule(views=2))
    rows = {}
    for index, view, found in module.read:
        for row, key in enumerate(zip(index.tolist(), view.tolist(), strict=True)):
            answers = {**found, "logits": found["logits"].transpose(0, 1)} if "logits" in found else found
            rows[key] = {
                name: [one[row] for one in answer] if isinstance(answer, list) else [answer[row]]
                for name, answer in answers.items()
            }
    return rows


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert len(first) == 48
    for key, answers in first.items():
        for name, values in answers.items():
            for one, other in zip(values, second[key][name], strict=True):
                assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), (key, name)


@pytest.mark.slow
def test_live_stored_and_recorded_answers_are_equal(tmp_path):
    found = networks()
    live = read_all(tmp_path, found)
    assert_same(live, read_all(tmp_path, TeacherStore(tmp_path / "online", found, dtype="float32")))
    assert_same(live, read_all(tmp_path, TeacherStore(tmp_path / "online", dtype="float32", fill="never")))
    store = TeacherStore(tmp_path / "ahead", found, dtype="float32")
    record(tiny_trainer(), asking(store), TinyDataModule(views=2))
    calls = calls_of(found)
    assert_same(live, read_all(tmp_path, store))
    assert calls == []
    alone = asking(TeacherStore(tmp_path / "ahead", dtype="float32", fill="never"))
    assert alone.teachers
    assert len(alone.teachers) == 0
    assert alone.teachers.shapes((1, 8, 8)) == [(1, 16, 4, 4)] * 2
    assert_same(live, read_all(tmp_path, alone.teachers.store))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.0])
@pytest.mark.parametrize("rule", [{}, {"weights": [1, 3]}, {"combine": "logits"}], ids=["mean", "weights", "logits"])
def test_kept_logits_answer_whatever_can_be_made_of_them(tmp_path, temperature, rule):
    class Several(Reading):
        READ = ("probabilities", "logits", "mean_logits")

    store = {"keep": "logits", "dtype": "float32"}
    ensemble = TeacherEnsemble(networks(), **rule)
    record(tiny_trainer(), KDModule(TinyNet(), TeacherStore(tmp_path, ensemble, **store), num_classes=3),
           TinyDataModule(views=2))  # fmt: skip
    ask = [Softened(temperature), Logits(), MeanLogits()]
    live = read_all(tmp_path, ensemble, ask=ask, kind=Several)
    assert_same(live, read_all(tmp_path, TeacherStore(tmp_path, fill="never", **store), ask=ask, kind=Several))


def test_what_a_store_belongs_to_holds_what_is_asked_about(tmp_path):
    def fit(about, given):
        module = asking(given, [Softened()], about=about)
        module.terms = lambda batch: {
            "ce": module.student(batch.input).mean() + module.teachers.probabilities(batch)[0, 0]
        }
        tiny_trainer().fit(module, datamodule=TinyDataModule(views=1))

    fit(Halves(), TeacherStore(tmp_path, networks()))
    assert json.loads((tmp_path / "header.json").read_text())["made_by"]["halves"] is True
    fit(Halves(), TeacherStore(tmp_path))

    class Others(Halves):
        def describe(self):
            return {"halves": False}

    with pytest.raises(InputError, match="halves is True, not False"):
        fit(Others(), TeacherStore(tmp_path))


@pytest.mark.parametrize("fill", ["online", "never"])
def test_a_store_of_another_format_is_refused_in_one_line(tmp_path, fill):
    tiny_trainer().fit(kd(TeacherStore(tmp_path, networks())), datamodule=TinyDataModule(views=1))
    path = tmp_path / "header.json"
    header = json.loads(path.read_text())
    path.write_text(json.dumps({**header, "format": header["format"] - 1}))
    with pytest.raises(InputError) as caught:
        tiny_trainer().fit(kd(TeacherStore(tmp_path, networks(), fill=fill)), datamodule=TinyDataModule(views=1))
    message = str(caught.value)
    assert f"has format {header['format'] - 1}, this version reads {header['format']}: fill it again" in message
    assert "\n" not in message


# Outside of the registry


def kd(teachers=None):
    teachers = networks() if teachers is None else teachers
    torch.manual_seed(0)
    return KDModule(TinyNet(), teachers, num_classes=3)


def test_teachers_are_no_part_of_what_the_module_registers():
    found = networks()
    module, student = kd(found), TinyNet()
    assert {name for name, _ in module.named_parameters()} == {
        f"student.{name}" for name in dict(student.named_parameters())
    }
    assert {name for name in module.state_dict() if name.startswith(("student.", "teachers"))} == {
        f"student.{name}" for name in student.state_dict()
    }
    assert "teachers" not in dict(module.named_children())
    assert not {id(one) for network in found for one in network.modules()} & {id(one) for one in module.modules()}
    assert list(module.teachers) == found
    assert module.teachers[1] is found[1]
    assert module.frozen == {"teachers": module.teachers}


def test_the_printed_module_names_its_teachers():
    assert "(teachers, frozen): Teachers(TinyNet, TinyNet)" in repr(kd())


def test_teachers_move_with_the_module():
    module, batch = kd(), batch_of()
    before = module.teachers.probabilities(batch)
    module.double()
    assert all(p.dtype == torch.float64 for network in module.teachers for p in network.parameters())
    double = batch.replace(input=batch.input.double())
    assert torch.allclose(module.teachers.probabilities(double).float(), before, atol=1e-6)
    module.to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for network in module.teachers for p in network.parameters())
    module.to("meta")
    tensors = [t for network in module.teachers for t in (*network.parameters(), *network.buffers())]
    assert all(t.device.type == "meta" for t in tensors)


def test_no_train_reaches_them_and_nothing_of_them_learns():
    module = kd()
    module.train()
    for network in module.teachers:
        assert not any(child.training for child in network.modules())
        assert not any(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in (module.teachers.probabilities(batch_of()),))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("ask", [[Softened(2.0)], EVERYTHING], ids=["softened", "everything"])
def test_a_copied_module_has_teachers_of_its_own_that_say_the_same(copied, ask):
    module, batch = asking(ask=ask), batch_of()
    other = copied(module)
    assert other.teachers is not module.teachers
    assert not {id(network) for network in other.teachers} & {id(network) for network in module.teachers}
    before, answers = module.teachers.run(batch), other.teachers.run(batch)
    assert answers.keys() == before.keys()
    assert all(torch.equal(answer, before[name]) for name, answer in answers.items())
    for network in other.teachers:
        for parameter in network.parameters():
            parameter.data.zero_()
    # The copy reads its own networks, and the original reads its own.
    changed = other.teachers.run(batch_of())
    assert not torch.equal(changed["probabilities"], before["probabilities"])
    again = module.teachers.run(batch_of())
    assert all(torch.equal(answer, before[name]) for name, answer in again.items())


def test_a_module_is_copied_and_pickled_with_its_store(tmp_path):
    module = kd(TeacherStore(tmp_path, networks(), dtype="float32"))
    tiny_trainer(max_epochs=2).fit(module, datamodule=TinyDataModule(views=2))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.teachers.store is not module.teachers.store
        assert [*other.teachers.store.networks] == [*other.teachers]
        calls = calls_of(other.teachers)
        trainer = tiny_trainer(max_epochs=2, limit_val_batches=0)
        trainer.fit(other, datamodule=TinyDataModule(views=2))
        assert calls == []


def test_about_that_is_empty_is_kept():
    about = ExtraInputs([], weights=None, ratio=1.0, seed=0)
    assert Teachers(TinyNet(), ask=[], about=about).about is about
