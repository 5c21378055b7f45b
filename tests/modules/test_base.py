"""The base: subclassing, checkpoints that rebuild themselves, schedules, and clear refusals."""

import copy
import pickle
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Unpack

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from distill_lightning import (
    Batch,
    DistillationModule,
    FEEDModule,
    FixedDiscriminator,
    InputError,
    KDModule,
    MEALV2Module,
    OneCycle,
    Pretrained,
    RegressionModule,
    SmallResNet,
    SupervisedModule,
    TeacherEnsemble,
)
from distill_lightning.data.transforms import LabelSmoothing
from distill_lightning.layers.call import call
from distill_lightning.modules.options import TrainingOptions
from distill_lightning.modules.parts.distances import FactorDistance, FunctionTranslator, LinearTranslator
from distill_lightning.networks import timm_network
from distill_lightning.networks.weights import write_weights
from distill_lightning.outputs.metrics import classification_metrics
from distill_lightning.teachers import Features, Given, Logits, MeanLogits, Softened, Teachers
from distill_lightning.testing import TinyDataModule, TinyNet, assert_module_contract, tiny_trainer


class LogitRegression(DistillationModule):
    """What a user writes."""

    def __init__(
        self,
        student: nn.Module,
        teachers: Given = None,
        *,
        num_classes: int,
        beta: float = 1.0,
        **options: Unpack[TrainingOptions],
    ):
        super().__init__(student, num_classes=num_classes, **options)
        self.teachers = Teachers(teachers, ask=[Logits()])
        self.beta = beta

    def terms(self, batch):
        logits = call(self.student, batch.input)
        teacher = self.teachers.logits(batch).mean(dim=0)
        return {"ce": F.cross_entropy(logits, batch.target), "mse": F.mse_loss(logits, teacher)}

    def weights(self):
        return {"ce": 1.0, "mse": self.beta}


def build_users(student, teachers, num_classes):
    return LogitRegression(student, teachers, num_classes=num_classes, beta=0.5)


class Leaky(LogitRegression):
    """Keeps its teachers in the registry, with what learns."""

    def __init__(self, student, teachers, *, num_classes, beta=1.0):
        super().__init__(student, teachers, num_classes=num_classes, beta=beta)
        self.ensemble = TeacherEnsemble.of(teachers)


def build_leaky(student, teachers, num_classes):
    return Leaky(student, teachers, num_classes=num_classes)


class Thawed(LogitRegression):
    """Trains its teachers."""

    def __init__(self, student, teachers, *, num_classes):
        super().__init__(student, teachers, num_classes=num_classes)
        self.adopted = nn.ModuleList(self.teachers).requires_grad_(True)

    def terms(self, batch):
        return {**super().terms(batch), "mse": sum(t(batch.input).square().mean() for t in self.adopted)}


def build_thawed(student, teachers, num_classes):
    return Thawed(student, teachers, num_classes=num_classes)


class Waiting(LogitRegression):
    """Waits for the device in every step."""

    def terms(self, batch):
        terms = super().terms(batch)
        self.last = terms["ce"].item()
        return terms


def build_waiting(student, teachers, num_classes):
    return Waiting(student, teachers, num_classes=num_classes)


class WaitingBesideTheLoss(LogitRegression):
    """Waits for the device after every step of the optimiser."""

    def optimizer_step(self, *args, **options):
        super().optimizer_step(*args, **options)
        self.last = next(self.student.parameters()).sum().item()


def build_waiting_beside(student, teachers, num_classes):
    return WaitingBesideTheLoss(student, teachers, num_classes=num_classes)


class Listed(LogitRegression):
    """Keeps a layer where neither the optimiser nor the checkpoint sees it."""

    def __init__(self, student, teachers, *, num_classes):
        super().__init__(student, teachers, num_classes=num_classes)
        self.adaptor = nn.Linear(num_classes, num_classes)
        self.unused = nn.Linear(2, 2)

    def terms(self, batch):
        terms = super().terms(batch)
        return {**terms, "mse": self.adaptor(self.student(batch.input)).square().mean()}


def build_listed(student, teachers, num_classes):
    return Listed(student, teachers, num_classes=num_classes)


@pytest.mark.slow
def test_a_users_method_keeps_the_contract():
    assert_module_contract(build_users)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "message"),
    [
        # An average that changes them came with 2.6; another point of the contract fails before.
        pytest.param(
            build_leaky,
            "averages_of_weights_leave_frozen_networks_alone: .* changed teacher 0",
            marks=pytest.mark.lightning(since=(2, 6)),
        ),
        (build_thawed, "frozen_networks_do_not_change: teacher 0 changed in fit"),
        (build_waiting, "a_training_step_does_not_wait_for_the_device: 3 hidden synchronisations"),
        (build_waiting_beside, "a_training_step_does_not_wait_for_the_device: 3 hidden synchronisations"),
        (build_listed, "the_optimizer_holds_exactly_what_learns: no gradient reaches .'unused.weight'"),
    ],
)
def test_the_contract_catches_what_breaks_it(build, message, monkeypatch):
    from distill_lightning import testing

    # Spawning processes is slow, and none of these breaks that point.
    monkeypatch.delitem(testing.CONTRACT, "two_processes_equal_one")
    with pytest.raises(AssertionError, match=message):
        assert_module_contract(build)


def test_terms_and_weights_must_name_the_same():
    class Forgetful(LogitRegression):
        def weights(self):
            return {"ce": 1.0}

    module = Forgetful(TinyNet(), TinyNet(), num_classes=3)
    with pytest.raises(KeyError, match="must name the same"):
        tiny_trainer().fit(module, datamodule=TinyDataModule())


def test_an_unfinished_method_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="must define terms"):
        DistillationModule(TinyNet(), num_classes=3).terms(Batch(torch.zeros(1), torch.zeros(1)))


def feed_on_small_nets(**options):
    teachers = TeacherEnsemble([SmallResNet(3, width=2), SmallResNet(3, width=2)], weights=[1, 2], combine="logits")
    return FEEDModule(
        SmallResNet(3, width=4),
        teachers,
        num_classes=3,
        student_layer="stage3",
        beta=3.0,
        input_shape=(1, 8, 8),
        **options,
    )


@pytest.mark.slow
def test_a_checkpoint_rebuilds_the_module_alone(tmp_path):
    module = feed_on_small_nets()
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "feed.ckpt")
    with pytest.warns(UserWarning, match="teachers: the weights are not those that this checkpoint was trained with"):
        loaded = FEEDModule.load_from_checkpoint(tmp_path / "feed.ckpt")
    assert (loaded.beta, *loaded.teachers.ensemble.rule) == (3.0, "logits", [1, 2])
    assert all(
        torch.equal(value, loaded.student.state_dict()[name]) for name, value in module.student.state_dict().items()
    )
    assert all(
        torch.equal(value, loaded.translators.state_dict()[name])
        for name, value in module.translators.state_dict().items()
    )


@pytest.mark.parametrize("sizes", [{"depth": 10**7}, {"num_classes": 10**9}], ids=str)
def test_sizes_of_a_network_in_a_checkpoint_are_not_believed(tmp_path, sizes):
    trainer = tiny_trainer()
    trainer.fit(SupervisedModule(SmallResNet(3, width=2), num_classes=3), datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    checkpoint["recipes"]["student"]["arguments"] |= sizes
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    with pytest.raises(
        InputError, match=r"evil.ckpt: student describes a network of more than 2,147,483,648 bytes: if"
    ):
        SupervisedModule.load_from_checkpoint(tmp_path / "evil.ckpt")
    module = SupervisedModule.load_from_checkpoint(tmp_path / "evil.ckpt", student=SmallResNet(3, width=2))
    assert module.num_classes == 3


def small_linear(student_channels, teacher_channels):
    return nn.Conv2d(student_channels, teacher_channels, 1, bias=False)


@pytest.mark.slow
@pytest.mark.parametrize("translator", [LinearTranslator(), FunctionTranslator(small_linear)])
def test_a_checkpoint_keeps_the_kind_of_translator(tmp_path, translator):
    distance = FactorDistance(translator=translator)
    module = feed_on_small_nets(distance=distance)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "feed.ckpt")
    given = {} if isinstance(translator, LinearTranslator) else {"distance": distance}
    loaded = FEEDModule.load_from_checkpoint(tmp_path / "feed.ckpt", teachers=module.teachers.ensemble, **given)
    assert loaded.distance == distance
    assert torch.equal(loaded.translators[0].weight, module.translators[0].weight)
    if given:
        with pytest.raises(InputError, match="does not hold distance, of which a part is not a plain value"):
            FEEDModule.load_from_checkpoint(tmp_path / "feed.ckpt", teachers=module.teachers.ensemble)


@pytest.mark.slow
def test_the_same_teachers_are_recognised(tmp_path, recwarn):
    module = feed_on_small_nets()
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "feed.ckpt")
    FEEDModule.load_from_checkpoint(tmp_path / "feed.ckpt", teachers=module.teachers.ensemble)
    assert not [warning for warning in recwarn if "the weights are not those" in str(warning.message)]


@pytest.mark.slow
def test_a_network_from_elsewhere_must_be_given(tmp_path):
    module = SupervisedModule(TinyNet(), num_classes=3)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "tiny.ckpt")
    with pytest.raises(
        InputError, match=r"cannot tell how student was built: load_from_checkpoint\(path, student=\.\.\.\)"
    ):
        SupervisedModule.load_from_checkpoint(tmp_path / "tiny.ckpt")
    loaded = SupervisedModule.load_from_checkpoint(tmp_path / "tiny.ckpt", student=TinyNet())
    assert torch.equal(loaded.student.head.weight, module.student.head.weight)


@pytest.mark.slow
def test_another_architecture_is_named(tmp_path):
    module = SupervisedModule(SmallResNet(3, width=4), num_classes=3)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    with pytest.raises(
        InputError, match="checkpoint of another architecture than SupervisedModule: it has 'student.stem"
    ):
        SupervisedModule.load_from_checkpoint(tmp_path / "small.ckpt", student=SmallResNet(3, width=8))


def test_hyper_parameters_are_plain_values():
    module = feed_on_small_nets()
    assert module.hparams["beta"] == 3.0
    assert not any(isinstance(value, nn.Module) or callable(value) for value in module.hparams.values())


class Passing(SupervisedModule):
    """Hands its options on."""

    def __init__(self, student, *, num_classes, **options):
        super().__init__(student, num_classes=num_classes, **options)


@pytest.mark.slow
def test_options_that_a_subclass_hands_on_are_kept(tmp_path):
    trainer = tiny_trainer()
    trainer.fit(
        Passing(SmallResNet(3, width=2), num_classes=3, transforms=[LabelSmoothing(0.25)]), datamodule=TinyDataModule()
    )
    trainer.save_checkpoint(tmp_path / "passing.ckpt")
    assert Passing.load_from_checkpoint(tmp_path / "passing.ckpt").transforms == (LabelSmoothing(0.25),)


def test_a_users_networks_and_functions_stay_out_of_the_checkpoint(tmp_path):
    class Adapted(SupervisedModule):
        def __init__(self, student, *, num_classes, adaptor, activation, sizes):
            super().__init__(student, num_classes=num_classes)
            self.adaptor, self.activation = adaptor, activation

        def terms(self, batch):
            logits = self.activation(self.adaptor(self.student(batch.input)))
            return {"ce": F.cross_entropy(logits, batch.target)}

    module = Adapted(TinyNet(), num_classes=3, adaptor=nn.Linear(3, 3), activation=torch.relu, sizes=[1, 2])
    assert set(module.hparams) == {"num_classes", "sizes"}
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "adapted.ckpt")
    assert torch.load(tmp_path / "adapted.ckpt", weights_only=True)["hyper_parameters"]["sizes"] == [1, 2]


def test_weights_of_any_kind_are_kept_as_numbers(tmp_path):
    teachers = TeacherEnsemble([TinyNet(), TinyNet()], weights=np.array([1.0, 3.0]))
    module = KDModule(TinyNet(), teachers, num_classes=3)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "kd.ckpt")
    assert torch.load(tmp_path / "kd.ckpt", weights_only=True)["recipes"]["teachers"]["weights"] == [1.0, 3.0]


@pytest.mark.slow
def test_objects_that_a_checkpoint_could_not_hold_are_named_when_training_goes_on(tmp_path):
    options = {"optimizer": partial(torch.optim.SGD, lr=0.1), "metrics": classification_metrics(3)}
    trainer = tiny_trainer()
    trainer.fit(SupervisedModule(SmallResNet(3, width=2), num_classes=3, **options), datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "alone.ckpt")
    loaded = SupervisedModule.load_from_checkpoint(tmp_path / "alone.ckpt", optimizer=options["optimizer"])
    # Predictions need none of them.
    tiny_trainer().predict(loaded, datamodule=TinyDataModule())
    with pytest.warns(UserWarning, match=r"cannot hold every argument: metrics are the defaults now"):
        tiny_trainer().fit(loaded, datamodule=TinyDataModule())


@pytest.mark.slow
@pytest.mark.parametrize("targets", [None, 1])
def test_calls_follow_one_another_in_any_order(targets):
    def value(trainer):
        return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}

    options = {"num_targets": targets} if targets else {"num_classes": 3}
    kind = RegressionModule if targets else SupervisedModule
    torch.manual_seed(0)
    module, data = (
        kind(TinyNet(None if targets else 3, num_targets=targets), **options),
        TinyDataModule(num_targets=targets),
    )
    for inference in (True, False):
        for verb in ("validate", "fit", "test", "fit", "validate", "validate"):
            trainer = tiny_trainer(inference_mode=inference)
            getattr(trainer, verb)(module, datamodule=data)
    first, second = tiny_trainer(), tiny_trainer(inference_mode=False)
    first.validate(module, datamodule=data)
    second.validate(module, datamodule=data)
    assert value(first) == value(second)


def test_a_student_that_was_frozen_as_a_teacher_is_refused():
    network = TinyNet()
    KDModule(TinyNet(), network, num_classes=3)
    with pytest.raises(InputError, match=r"the student has nothing to train.* copy.deepcopy"):
        tiny_trainer().fit(SupervisedModule(network, num_classes=3), datamodule=TinyDataModule())


def test_a_checkpoint_of_a_users_own_module_is_told_from_ours(tmp_path):
    class Own(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = TinyNet()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch.input), batch.target)

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    own, trainer = Own(), tiny_trainer(limit_val_batches=0)
    trainer.fit(own, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    # The command line notes a class in every checkpoint.
    checkpoint = torch.load(tmp_path / "own.ckpt", weights_only=True)
    torch.save({**checkpoint, "hyper_parameters": {"_class_path": "own.Own"}}, tmp_path / "own.ckpt")
    with pytest.raises(InputError, match=r"own.ckpt is the checkpoint of another kind of module: .*Pretrained"):
        SupervisedModule.load_from_checkpoint(tmp_path / "own.ckpt")
    taken = Pretrained(TinyNet(), tmp_path / "own.ckpt", part="net")
    assert torch.equal(taken.head.weight, own.net.head.weight)


@pytest.mark.slow
def test_loading_the_right_teachers_late_is_noticed(tmp_path, recwarn):
    module = feed_on_small_nets()
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "feed.ckpt")
    torch.manual_seed(9)
    other = feed_on_small_nets()
    other.teachers.ensemble.load_state_dict(module.teachers.ensemble.state_dict())
    tiny_trainer(max_epochs=2).fit(other, datamodule=TinyDataModule(), ckpt_path=str(tmp_path / "feed.ckpt"))
    assert not [warning for warning in recwarn if "the weights are not those" in str(warning.message)]


@pytest.mark.parametrize("content", [None, {"state_dict": {}}])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    if content is not None:
        torch.save(content, tmp_path / "some.ckpt")
    with pytest.raises(InputError, match="not? a? ?checkpoint"):
        SupervisedModule.load_from_checkpoint(tmp_path / "some.ckpt")


@pytest.mark.slow
def test_a_checkpoint_of_another_module_is_refused(tmp_path):
    module = feed_on_small_nets()
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "feed.ckpt")
    with pytest.raises(InputError, match="another architecture than SupervisedModule: it has an unknown 'translators"):
        SupervisedModule.load_from_checkpoint(tmp_path / "feed.ckpt")


@pytest.mark.slow
def test_a_wrapped_compiled_student_is_exported_and_tapped_plainly(tmp_path):
    student, teacher = (torch.compile(TinyNet(), backend="eager") for _ in range(2))
    module = FEEDModule(student, teacher, num_classes=3, student_layer="features", input_shape=(1, 8, 8))
    assert torch.isfinite(module.terms(Batch(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])))["feed"])
    TinyNet().load_state_dict(load_file(module.export_student(tmp_path / "student.safetensors")), strict=True)


def test_export_refuses_another_suffix(tmp_path):
    with pytest.raises(InputError, match=r"written as \.safetensors, \.pt or \.pth, got 'student.onnx'"):
        SupervisedModule(TinyNet(), num_classes=3).export_student(tmp_path / "student.onnx")
    assert not list(tmp_path.iterdir())


def test_tied_weights_are_exported_and_loaded_strictly(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.two = nn.Linear(3, 3)
            self.two.weight = self.one.weight

    module = SupervisedModule(Tied(), num_classes=3)
    Tied().load_state_dict(load_file(module.export_student(tmp_path / "tied.safetensors")), strict=True)


def test_one_cycle_gets_the_length_of_the_training():
    module = SupervisedModule(TinyNet(), num_classes=3, lr_scheduler=OneCycle)
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=TinyDataModule())
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert (scheduler.total_steps, scheduler.last_epoch) == (6, 6)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 1e-4)


def test_one_cycle_without_an_end_is_refused():
    module = SupervisedModule(TinyNet(), num_classes=3, lr_scheduler=OneCycle)
    with pytest.raises(InputError, match="OneCycle needs the length of the training"):
        tiny_trainer(max_epochs=-1).fit(module, datamodule=TinyDataModule())


def test_plateau_watches_the_validation_nll():
    module = SupervisedModule(TinyNet(), num_classes=3, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=TinyDataModule())
    assert trainer.lr_scheduler_configs[0].monitor == "val/nll"


def test_other_data_modules_pairs_are_read():
    loader = torch.utils.data.DataLoader([(torch.rand(1, 8, 8), k % 3) for k in range(6)], batch_size=3)
    module = KDModule(TinyNet(), TinyNet(), num_classes=3)
    trainer = tiny_trainer()
    trainer.fit(module, train_dataloaders=loader, val_dataloaders=loader)
    assert {"val/accuracy", "val/nll", "val/ece", "train/kd"} <= trainer.callback_metrics.keys()


@pytest.mark.slow
def test_training_learns_the_tiny_data():
    module = SupervisedModule(TinyNet(), num_classes=3)
    trainer = tiny_trainer(max_epochs=15)
    trainer.fit(module, datamodule=TinyDataModule(samples=60))
    assert trainer.callback_metrics["val/accuracy"] > 0.9


@pytest.mark.slow
def test_a_checkpoint_holds_the_weights_of_a_pretrained_student(tmp_path, monkeypatch):
    """The file that it began with may be gone, and what was downloaded is not downloaded again."""
    asked = []

    def create_model(name, *, pretrained, num_classes, in_chans):
        asked.append(pretrained)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * in_chans, num_classes))

    fake = SimpleNamespace(is_model=lambda name: True, create_model=create_model)
    monkeypatch.setattr("distill_lightning.networks.libraries.package", lambda *args, **options: fake)
    file = SmallResNet(3, width=2)
    write_weights(file, tmp_path / "begin.safetensors")
    for number, student in enumerate(
        [
            Pretrained(SmallResNet(3, width=2), tmp_path / "begin.safetensors"),
            timm_network("some", num_classes=3, in_channels=1, pretrained=True),
        ]
    ):
        module = SupervisedModule(student, num_classes=3)
        trainer = tiny_trainer()
        trainer.fit(module, datamodule=TinyDataModule())
        trainer.save_checkpoint(tmp_path / f"{number}.ckpt")
        (tmp_path / "begin.safetensors").unlink(missing_ok=True)
        loaded = SupervisedModule.load_from_checkpoint(tmp_path / f"{number}.ckpt")
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())
    assert asked == [True, False]


@pytest.mark.slow
def test_numpys_numbers_are_kept_as_pythons(tmp_path):
    module = SupervisedModule(SmallResNet(3, width=2), num_classes=3, transforms=[LabelSmoothing(np.float64(0.25))])
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "smooth.ckpt")
    assert SupervisedModule.load_from_checkpoint(tmp_path / "smooth.ckpt").transforms == (LabelSmoothing(0.25),)


@pytest.mark.slow
@pytest.mark.lightning(since=(2, 5))
def test_one_cycle_goes_on_in_the_middle_of_an_epoch(tmp_path):
    """To know its length it has the data set up, before Lightning knows where in them the checkpoint was made."""

    def fit(seed, **options):
        torch.manual_seed(seed)
        module = SupervisedModule(
            TinyNet(), num_classes=3, optimizer=partial(torch.optim.SGD, lr=0.05), lr_scheduler=OneCycle
        )
        tiny_trainer(max_epochs=3, **options.pop("trainer", {})).fit(module, datamodule=TinyDataModule(), **options)
        return module

    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    whole = fit(0, trainer={"callbacks": [kept], "enable_checkpointing": True}).state_dict()
    for step in (2, 4, 6, 8):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Be aware that when using .ckpt_path.")
            resumed = fit(9, ckpt_path=str(tmp_path / f"step={step}.ckpt")).state_dict()
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), step


# Frozen networks stand outside of the registry


@pytest.mark.slow
@pytest.mark.parametrize("version", [None, 3])
def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path, version):
    trainer = tiny_trainer(limit_train_batches=1, limit_val_batches=0)
    trainer.fit(SupervisedModule(SmallResNet(3, width=2), num_classes=3), datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    assert checkpoint.pop("distill_lightning") == 2
    torch.save({**checkpoint, **({} if version is None else {"distill_lightning": version})}, tmp_path / "old.ckpt")
    message = f"has format {version or 1} of distill_lightning's checkpoints, this version reads 2: train anew, or"
    with pytest.raises(InputError, match=message) as caught:
        SupervisedModule.load_from_checkpoint(tmp_path / "old.ckpt")
    assert "\n" not in str(caught.value)
    resumed = SupervisedModule(SmallResNet(3, width=2), num_classes=3)
    with pytest.raises(InputError, match=message):
        tiny_trainer(max_epochs=2).fit(resumed, datamodule=TinyDataModule(), ckpt_path=str(tmp_path / "old.ckpt"))


@pytest.mark.slow
def test_a_choice_that_no_checkpoint_holds_must_be_given_again(tmp_path):
    teacher = SmallResNet(3, width=2)
    chosen = FixedDiscriminator(lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1))
    trainer = tiny_trainer(limit_train_batches=1, limit_val_batches=0)
    module = MEALV2Module(SmallResNet(3, width=2), teacher, num_classes=3, discriminator=chosen, hard_label_weight=1.0)
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "meal.ckpt")
    with pytest.raises(InputError, match=r"does not hold discriminator, .* load_from_checkpoint\(path, discriminator="):
        MEALV2Module.load_from_checkpoint(tmp_path / "meal.ckpt")
    again = MEALV2Module.load_from_checkpoint(tmp_path / "meal.ckpt", discriminator=chosen, teachers=teacher)
    assert again.discriminator.kind == "fixed"


class Asking(LogitRegression):
    """Asks for what a test says, and reads it all."""

    questions = (Softened(2.0), Logits(), MeanLogits(), Features("features"))

    def __init__(self, student, teachers, *, num_classes):
        super().__init__(student, teachers, num_classes=num_classes)
        self.teachers = Teachers(teachers, ask=self.questions)

    def terms(self, batch):
        teachers = self.teachers
        self.read = [teachers.probabilities(batch), teachers.logits(batch), teachers.mean_logits(batch)]
        self.read += teachers.features(batch)
        return super().terms(batch)


def test_networks_run_once_a_batch_however_many_questions_there_are():
    networks, calls = [TinyNet(), TinyNet()], []
    for number, network in enumerate(networks):
        network.register_forward_hook(lambda *_, number=number: calls.append(number))
    module = Asking(TinyNet(), networks, num_classes=3)
    trainer = tiny_trainer(limit_train_batches=2, limit_val_batches=0)
    trainer.fit(module, datamodule=TinyDataModule())
    assert calls == [0, 1, 0, 1]
    probs, logits, mean, *features = module.read
    assert torch.allclose(probs, (logits / 2).softmax(dim=-1).mean(dim=0), atol=1e-6)
    assert torch.allclose(mean, logits.mean(dim=0), atol=1e-6)
    assert [feature.shape[1:] for feature in features] == [(8, 4, 4)] * 2


@pytest.mark.parametrize("name", ["probabilities", "mean_logits", "features"])
def test_a_question_that_was_not_declared_is_refused(name):
    module = LogitRegression(TinyNet(), TinyNet(), num_classes=3)
    batch = Batch(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    message = rf"LogitRegression reads the teachers' {name} but asks for Logits: add \w+ to Teachers\(ask=...\)"
    with pytest.raises(InputError, match=message):
        getattr(module.teachers, name)(batch)


def test_teachers_are_in_no_registry_and_in_the_printed_module():
    module = LogitRegression(TinyNet(), [TinyNet(), TinyNet()], num_classes=3)
    ours = {id(parameter) for parameter in module.parameters()}
    assert not ours & {id(parameter) for network in module.teachers for parameter in network.parameters()}
    assert all(name.startswith("student.") for name in module.state_dict())
    assert "(teachers, frozen): Teachers(TinyNet, TinyNet)" in repr(module)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_teachers_of_its_own_that_say_the_same(copied):
    module = Asking(TinyNet(), [TinyNet(), TinyNet()], num_classes=3).eval()
    other, batch = copied(module), Batch(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    assert all(torch.equal(a, b) for a, b in zip(module.teachers[0].parameters(), other.teachers[0].parameters()))  # noqa: B905
    for name, term in module.terms(batch).items():
        assert torch.equal(term, other.terms(batch)[name])
    with torch.no_grad():
        other.teachers[0].head.bias.add_(1)
    assert not torch.equal(module.teachers.logits(batch.replace()), other.teachers.logits(batch.replace()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("64-true", torch.float64),
        pytest.param("bf16-true", torch.bfloat16, marks=pytest.mark.lightning(since=(2, 1))),
    ],
)
def test_teachers_follow_the_modules_precision(precision, dtype):
    module = Asking(TinyNet(), [TinyNet(), TinyNet()], num_classes=3)
    trainer = tiny_trainer(precision=precision)
    trainer.fit(module, datamodule=TinyDataModule())
    assert {p.dtype for network in module.teachers for p in network.parameters()} == {dtype}
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_teachers_follow_a_conversion_by_hand():
    module = Asking(TinyNet(), [TinyNet()], num_classes=3).double()
    assert module.teachers[0].head.weight.dtype == torch.float64
    assert module.float().teachers[0].head.weight.dtype == torch.float32
    assert module.to("meta").teachers[0].head.weight.device.type == "meta"


@pytest.mark.slow
def test_compiled_teachers_outside_of_the_registry_say_the_same(monkeypatch):
    compile_in_place = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_in_place(module, backend="eager"))
    torch._dynamo.reset()
    states = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = LogitRegression(TinyNet(), [TinyNet(), TinyNet()], num_classes=3, compile=compiled)
        tiny_trainer().fit(module, datamodule=TinyDataModule())
        assert all((network._compiled_call_impl is not None) == compiled for network in module.teachers)
        states.append(module.state_dict())
    torch._dynamo.reset()
    assert all(torch.allclose(value, states[1][name], atol=1e-5) for name, value in states[0].items())
