"""``TeacherStore(keep="logits")``: every teacher's logits, from which a method can be answered in more than one way."""

import json

import pytest
import pytorch_lightning as pl
import torch

from distill_lightning import (
    ExtracurricularModule,
    FEEDModule,
    FixedDiscriminator,
    InputError,
    KDModule,
    MEALV2Module,
    TeacherEnsemble,
)
from distill_lightning.teachers import TeacherStore
from distill_lightning.teachers.recorder import record
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


class Losses(pl.Callback):
    """Of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def networks():
    torch.manual_seed(5)
    teachers = [TinyNet(width=8) for _ in range(2)]
    for network in teachers:
        torch.nn.init.normal_(network.head.weight)
    torch.manual_seed(0)
    return TinyNet(), teachers


def ensemble(**options):
    return TeacherEnsemble(networks()[1], **options)


def kd(teachers, *, temperature=2.0):
    return KDModule(networks()[0], teachers, num_classes=3, temperature=temperature)


def meal_v2(teachers, *, temperature=2.0):
    options = {"discriminator": FixedDiscriminator(), "temperature": temperature, "hard_label_weight": 0.5}
    return MEALV2Module(networks()[0], teachers, num_classes=3, **options)


def losses_of(module):
    losses = Losses()
    tiny_trainer(max_epochs=4, callbacks=[losses]).fit(module, datamodule=TinyDataModule(views=2))
    return torch.tensor(losses.values)


def logits_in(folder, teachers=None, **options):
    return TeacherStore(folder, teachers, keep="logits", dtype="float32", **options)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [{}, {"weights": [1, 3]}, {"combine": "logits"}], ids=["mean", "weights", "logits"])
@pytest.mark.parametrize("method", [kd, meal_v2])
def test_a_stored_run_is_the_online_run_loss_for_loss(tmp_path, method, rule):
    online = losses_of(method(ensemble(**rule)))
    filling = losses_of(method(logits_in(tmp_path, ensemble(**rule))))
    reading = losses_of(method(logits_in(tmp_path, fill="never")))
    assert torch.allclose(online, filling, rtol=1e-5)
    assert torch.allclose(online, reading, rtol=1e-5)


@pytest.mark.slow
def test_half_precision_is_close(tmp_path):
    online = losses_of(kd(ensemble()))
    stored = losses_of(kd(TeacherStore(tmp_path, ensemble(), keep="logits")))
    assert torch.allclose(online, stored, rtol=2e-3)


@pytest.mark.slow
def test_another_temperature_and_another_method_read_the_same_store(tmp_path):
    record(tiny_trainer(), kd(logits_in(tmp_path, ensemble()), temperature=2.0), TinyDataModule(views=2))
    for method in (kd, meal_v2):
        online = losses_of(method(ensemble(), temperature=7.0))
        stored = losses_of(method(logits_in(tmp_path, fill="never"), temperature=7.0))
        assert torch.allclose(online, stored, rtol=1e-5)


def test_what_is_kept_are_every_teachers_logits(tmp_path):
    store = logits_in(tmp_path, ensemble())
    done = record(tiny_trainer(), kd(store), TinyDataModule(views=2))
    assert done.nbytes == 48 * 2 * 3 * 4
    batch = TinyDataModule().dataset("train", augment=True).__getitems__([(5, 0), (23, 1)])
    told = store.read_or_ask(batch, None, device="cpu")["logits"]
    with torch.no_grad():
        expected = torch.stack([network.eval()(batch.input) for network in networks()[1]], dim=1)
    assert torch.allclose(told, expected, atol=1e-5)


def test_answers_and_logits_are_stores_of_two_kinds(tmp_path):
    losses_of(kd(logits_in(tmp_path, ensemble())))
    with pytest.raises(InputError, match="keep is logits, not answers"):
        losses_of(kd(TeacherStore(tmp_path, ensemble(), dtype="float32")))


def test_the_rule_of_the_ensemble_is_a_part_of_the_store(tmp_path):
    losses_of(kd(logits_in(tmp_path, ensemble(weights=[1, 3]))))
    assert json.loads((tmp_path / "header.json").read_text())["made_by"]["ensemble"]["weights"] == [1.0, 3.0]
    with pytest.raises(InputError, match="ensemble is"):
        losses_of(kd(logits_in(tmp_path, ensemble(weights=[3, 1]))))


def test_methods_that_need_more_than_logits_say_so(tmp_path):
    student, teachers = networks()
    feed = FEEDModule(
        student, logits_in(tmp_path, teachers), num_classes=3, student_layer="features", input_shape=(1, 8, 8)
    )
    with pytest.raises(InputError, match="FEEDModule needs more than its teachers' logits: leave the store's keep out"):
        losses_of(feed)
    student, teachers = networks()
    extracurricular = ExtracurricularModule(student, logits_in(tmp_path / "x", teachers), num_classes=3)
    with pytest.raises(InputError, match="ExtracurricularModule needs more than its teachers' logits"):
        record(tiny_trainer(), extracurricular, TinyDataModule(views=2, partners=True))


def test_options_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(InputError, match="top_k keeps the largest probabilities; with keep='logits' leave it out"):
        TeacherStore(tmp_path, keep="logits", top_k=2)
    with pytest.raises(InputError, match="keep must be one of answers, logits, got 'all'"):
        TeacherStore(tmp_path, keep="all")
