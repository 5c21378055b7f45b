"""``compile``, ``channels_last`` and faster teachers: the same numbers, sooner."""

import os
import shutil

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from distill_lightning import (
    ExtracurricularModule,
    FEEDModule,
    FixedDiscriminator,
    KDModule,
    LogitTerm,
    MEALV2Module,
    RegressionModule,
    SelfKDModule,
    SmallResNet,
    SupervisedModule,
    TeacherEnsemble,
)
from distill_lightning.networks.weights import read_weights
from distill_lightning.testing import CONTRACT, TinyDataModule, TinyNet, tiny_trainer

FEED = {"student_layer": "features", "input_shape": (1, 8, 8)}
METHODS = {
    "supervised": lambda student, teachers, **o: SupervisedModule(student, num_classes=3, **o),
    "kd": lambda student, teachers, **o: KDModule(student, teachers, num_classes=3, **o),
    "feed": lambda student, teachers, **o: FEEDModule(
        student, teachers, num_classes=3, logit_term=LogitTerm(weight=0.5), **FEED, **o
    ),
    "self_kd": lambda student, teachers, **o: SelfKDModule(student, num_classes=3, **o),
    "meal_v2": lambda student, teachers, **o: MEALV2Module(
        student, teachers, num_classes=3, discriminator=FixedDiscriminator(), hard_label_weight=1.0, **o
    ),
    "extracurricular": lambda student, teachers, **o: ExtracurricularModule(student, teachers, num_classes=3, **o),
}


class Losses(pl.Callback):
    """Of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def networks(classes=3):
    torch.manual_seed(0)
    return TinyNet(classes), [TinyNet(classes, width=8) for _ in range(2)]


def losses_of(method, *, epochs=2, teachers=None, validated=True, **options):
    student, plain = networks()
    losses = Losses()
    module = METHODS[method](student, plain if teachers is None else teachers(plain), **options)
    trainer = tiny_trainer(max_epochs=epochs, callbacks=[losses], limit_val_batches=None if validated else 0)
    trainer.fit(module, datamodule=TinyDataModule())
    return torch.tensor(losses.values), module


@pytest.fixture
def graphs(monkeypatch):
    """Counts what is compiled, with a backend that needs no C++ compiler."""
    captured = []

    def backend(graph, inputs):
        captured.append(graph)
        return graph.forward

    compile_in_place = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_in_place(module, backend=backend))
    torch._dynamo.reset()
    yield captured
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_channels_last_trains_the_same_student(method):
    plain, _ = losses_of(method)
    fast, module = losses_of(method, channels_last=True)
    assert torch.allclose(plain, fast, rtol=1e-3, atol=1e-4)
    weights = [weight for weight in module.student.parameters() if weight.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_a_regression_takes_both_options_too():
    module = RegressionModule(TinyNet(None, num_targets=2), num_targets=2, channels_last=True, compile=True)
    assert module.compiles
    assert module.student.features[3].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_networks_train_as_plain_ones(method, graphs):
    plain, _ = losses_of(method)
    assert not graphs
    fast, module = losses_of(method, compile=True)
    assert torch.allclose(plain, fast, rtol=1e-4, atol=1e-5)
    compiled = [module.student, *(getattr(module, "teachers", None) or [])]
    assert all(network._compiled_call_impl is not None for network in compiled)
    assert len(graphs) >= len(compiled)
    # In place: nothing has another name.
    assert module.student.state_dict().keys() == TinyNet().state_dict().keys()


@pytest.mark.slow
def test_taps_see_what_compiled_teachers_compute(graphs):
    _, module = losses_of("feed", compile=True, epochs=1)
    inputs = torch.rand(8, 1, 8, 8)
    for network, tap in zip(module.teachers, module.teachers.taps, strict=True):
        output, features = module.teachers.ensemble.each(inputs, [tap])[0]
        with torch.no_grad():
            assert torch.allclose(features["features"], network.features(inputs), atol=1e-6)
            expected = network.head(network.features(inputs).mean(dim=(2, 3)))
        assert torch.allclose(output, expected, atol=1e-6)


@pytest.mark.slow
def test_a_second_fit_compiles_nothing_again(graphs):
    _, module = losses_of("kd", compile=True, epochs=1)
    before = module.student._compiled_call_impl
    count = len(graphs)
    tiny_trainer(max_epochs=1).fit(module, datamodule=TinyDataModule())
    assert module.student._compiled_call_impl is before
    assert len(graphs) == count


@pytest.mark.slow
@pytest.mark.usefixtures("graphs")
def test_what_a_compiled_run_saves_is_plain(tmp_path):
    torch.manual_seed(0)
    module = KDModule(
        SmallResNet(10, width=2), TeacherEnsemble([SmallResNet(10, width=4)]), num_classes=10, compile=True,
        channels_last=True,
    )  # fmt: skip
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    fresh = SmallResNet(10, width=2)
    for name in ("student.pt", "student.safetensors"):
        path = module.export_student(tmp_path / name)
        fresh.load_state_dict(read_weights(path), strict=True)
    inputs = torch.rand(4, 1, 8, 8)
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    with pytest.warns(UserWarning, match="teachers: the weights are not those"):
        loaded = KDModule.load_from_checkpoint(tmp_path / "module.ckpt").eval()
    assert loaded.compiles
    assert loaded.student.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.allclose(loaded(inputs), module.eval().student.forward(inputs), atol=1e-6)
        assert torch.allclose(fresh.eval()(inputs), loaded(inputs), atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_inductor_trains_the_same_student():
    # Without validation: each further graph is compiled by the C++ compiler for ten seconds and more.
    plain, _ = losses_of("feed", epochs=1, validated=False)
    torch._dynamo.reset()
    fast, _ = losses_of("feed", epochs=1, validated=False, compile=True, channels_last=True)
    torch._dynamo.reset()
    assert torch.allclose(plain, fast, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"channels_last": True}])
@pytest.mark.parametrize("method", ["kd", "meal_v2", "extracurricular"])
def test_faster_teachers_teach_the_same(method, options):
    plain, _ = losses_of(method)
    fast, _ = losses_of(method, teachers=lambda given: TeacherEnsemble(given, **options))
    assert torch.allclose(plain, fast, rtol=1e-2 if "dtype" in options else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"channels_last": True}])
def test_faster_teachers_show_the_same_features(options):
    plain, _ = losses_of("feed")
    fast, _ = losses_of("feed", teachers=lambda given: TeacherEnsemble(given, **options))
    assert torch.allclose(plain, fast, rtol=1e-2 if "dtype" in options else 1e-4)


@pytest.mark.slow
def test_a_checkpoint_knows_how_its_teachers_ran(tmp_path):
    torch.manual_seed(0)
    teachers = TeacherEnsemble([SmallResNet(3, width=2) for _ in range(2)], [1, 2], channels_last=True)
    module = KDModule(SmallResNet(3, width=2), teachers, num_classes=3)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    with pytest.warns(UserWarning, match="teachers: the weights are not those"):
        loaded = KDModule.load_from_checkpoint(tmp_path / "module.ckpt")
    assert loaded.teachers.ensemble.options() == teachers.options()


def fast_kd(student, teachers, num_classes):
    ensemble = TeacherEnsemble(teachers, channels_last=True)
    return KDModule(student, ensemble, num_classes=num_classes, channels_last=True)


@pytest.mark.slow
@pytest.mark.parametrize("point", CONTRACT)
def test_the_contract_holds(point):
    CONTRACT[point](fast_kd)


# A store on a device that is not the host, for which PyTorch's "meta" stands here


class NotingStore:
    """Notes what it is asked about."""

    def __init__(self):
        self.asked, self.keep = [], "answers"

    def read_or_ask(self, batch, ask, *, device):
        self.asked.append(batch)
        return {"probabilities": torch.zeros(batch.size, 3, device=device)}

    def release(self):
        pass


class MovedBatches(KDModule):
    """Whose batches go there, and which asks its store alone."""

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return super().transfer_batch_to_device(batch, torch.device("meta"), dataloader_idx)

    def terms(self, batch):
        assert self.teachers.probabilities(batch).device.type == "meta"
        return {"ce": self.student.head.weight.sum(), "kd": self.student.head.bias.sum()}

    def on_train_start(self):
        """The store is none."""

    def on_train_epoch_end(self):
        """The store is none."""


def asked_on_another_device(module):
    module.teachers.store = NotingStore()
    data = TinyDataModule()
    data.setup()
    tiny_trainer(limit_val_batches=0).fit(module, data.train_dataloader(), data.val_dataloader())
    assert {batch.device.type for batch in module.teachers.store.asked} == {"meta"}
    return [batch.key.index for batch in module.teachers.store.asked]


def test_a_store_reads_the_index_that_is_still_on_the_host():
    index = asked_on_another_device(MovedBatches(TinyNet(), TinyNet(), num_classes=3))
    assert {part.device.type for part in index} == {"cpu"}
    assert sorted(torch.cat(index).tolist()) == list(range(24))
