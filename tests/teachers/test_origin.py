"""A store is refused for whatever would have been answered otherwise."""

import json
from dataclasses import dataclass

import pytest
import pytorch_lightning as pl
import torch

from distill_lightning import (
    AdaptedInput,
    CutMix,
    Cutout,
    ExtracurricularModule,
    Features,
    FEEDModule,
    FixedDiscriminator,
    FunctionSampler,
    Gaussian,
    GeneratorSampler,
    IndexedDataModule,
    InputError,
    KDModule,
    LabelSmoothing,
    Logits,
    MEALV2Module,
    Mixup,
    Softened,
    Teachers,
    TeacherStore,
)
from distill_lightning.data.transforms import BatchTransform
from distill_lightning.layers import ImageDecoder, fingerprint
from distill_lightning.storage import files
from distill_lightning.teachers.recorder import record
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


def net(seed=0, **options):
    torch.manual_seed(seed)
    return TinyNet(**options)


def kd(folder, teacher, **options):
    return KDModule(net(), TeacherStore(folder, [teacher], **options), num_classes=3)


def fitted(module, data=None, **options):
    tiny_trainer(**({"max_epochs": 2} | options)).fit(module, datamodule=data or TinyDataModule(views=2))


# The teachers


@pytest.mark.slow
def test_what_no_state_dict_tells_is_a_part_of_a_teacher(tmp_path):
    plain = {"size": (8, 8), "mean": 0.4, "std": 0.25, "source_mean": 0.4, "source_std": 0.25}
    fitted(kd(tmp_path, AdaptedInput(net(1), **plain)))
    fitted(kd(tmp_path, AdaptedInput(net(1), **plain)))
    for other in ({"size": (6, 6)}, {"mean": 0.5}, {"std": 0.3}):
        with pytest.raises(InputError, match="was made by something else: teachers is"):
            fitted(kd(tmp_path, AdaptedInput(net(1), **(plain | other))))


def test_a_fingerprint_counts_buffers_that_are_in_no_file():
    first, second = (AdaptedInput(net(1), mean=mean, std=1.0) for mean in (0.1, 0.2))
    assert first.state_dict().keys() == second.state_dict().keys()
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.slow
def test_the_precision_that_teachers_ran_in_is_a_part_of_their_answers(tmp_path):
    fitted(kd(tmp_path, net(1)), precision="bf16-mixed")
    with pytest.raises(InputError, match="precision is bf16-mixed, not 32-true"):
        fitted(kd(tmp_path, net(1)))
    # Who has no teachers takes what is there.
    fitted(KDModule(net(), TeacherStore(tmp_path, fill="never"), num_classes=3))


def regression(folder, *, networks=True, **options):
    torch.manual_seed(1)
    teacher, student = (TinyNet(None, num_targets=2) for _ in range(2))
    store = TeacherStore(folder, [teacher]) if networks else TeacherStore(folder, fill="never")
    return KDModule(student, store, num_targets=2, output=Gaussian(2, **options))


@pytest.mark.slow
@pytest.mark.parametrize("networks", [True, False])
def test_what_a_regressions_outputs_mean_is_a_part_of_the_answers(tmp_path, networks):
    def fit(**options):
        fitted(regression(tmp_path, **options), TinyDataModule(num_targets=2, views=2))

    given = {"teacher_variance": 0.1, "log_var_bounds": (-4.0, 4.0)}
    fit(**given)
    # One number is that of every target, and the student's own variance is not the teachers'.
    fit(**(given | {"teacher_variance": [0.1, 0.1], "fixed_variance": 1.0}), networks=networks)
    for other, message in (
        ({"teacher_variance": 0.9}, r"teacher_variance is \[0.1, 0.1\], not \[0.9, 0.9\]"),
        ({"teacher_variance": None}, r"teacher_variance is \[0.1, 0.1\], not None"),
        ({"log_var_bounds": (-9.0, 4.0)}, r"log_var_bounds is \[-4.0, 4.0\], not \[-9.0, 4.0\]"),
    ):
        with pytest.raises(InputError, match=message):
            fit(**(given | other), networks=networks)


def test_the_number_of_targets_is_a_part_of_the_answers(tmp_path):
    fitted(regression(tmp_path), TinyDataModule(num_targets=2, views=2))
    assert json.loads((tmp_path / "header.json").read_text())["made_by"]["num_targets"] == 2
    module = KDModule(TinyNet(None, num_targets=3), TeacherStore(tmp_path, fill="never"), num_targets=3)
    with pytest.raises(InputError, match="num_targets is 2, not 3"):
        fitted(module, TinyDataModule(num_targets=3, views=2))


# What is between the loader and the step


class Normalising(TinyDataModule):
    """Changes its batches where no store sees it."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch.replace(input=batch.input * 2)


class NormalisingKD(KDModule):
    """Changes its batches where no store sees it."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch.replace(input=batch.input * 2)


@pytest.mark.parametrize("act", [fitted, lambda module, data=None: record(tiny_trainer(), module, data)])
def test_hooks_that_change_batches_are_refused(tmp_path, act):
    with pytest.raises(InputError, match="Normalising has a hook on_after_batch_transfer: do in the data set"):
        act(kd(tmp_path, net(1)), Normalising(views=2))
    module = NormalisingKD(net(), TeacherStore(tmp_path, net(1)), num_classes=3)
    with pytest.raises(InputError, match="NormalisingKD has a hook on_before_batch_transfer"):
        record(tiny_trainer(), module, TinyDataModule(views=2))


def test_hooks_of_a_wrapped_data_module_are_seen(tmp_path):
    with pytest.raises(InputError, match="has a hook on_after_batch_transfer"):
        fitted(kd(tmp_path, net(1)), IndexedDataModule(Normalising(views=2)))


# What is asked


class Asking(KDModule):
    """Asks other questions than it does for its terms."""

    def __init__(self, teachers, ask):
        super().__init__(net(), teachers, num_classes=3, temperature=1.0)
        self.teachers = Teachers(teachers, ask=ask)

    def terms(self, batch):
        """Reads the answers to the first question."""
        found = {Logits: self.teachers.logits, Features: self.teachers.features, Unnamed: self.teachers.distribution}
        found[type(self.teachers.questions[0])](batch)
        return {"ce": self.student(batch.input).mean()}

    def weights(self):
        return {"ce": 1.0}


class Unnamed(Softened):
    """Does not say what its answers depend on."""

    def describe(self):
        return {}


def test_a_store_without_logits_is_refused_by_who_asks_for_them(tmp_path):
    fitted(KDModule(net(), TeacherStore(tmp_path, net(1)), num_classes=3, temperature=1.0))
    for options in ({"networks": net(1)}, {"fill": "never"}):
        with pytest.raises(InputError, match="logits is None, not True"):
            fitted(Asking(TeacherStore(tmp_path, **options), [Logits()]))


@pytest.mark.slow
def test_answers_that_a_store_does_not_hold_are_refused_by_name(tmp_path):
    fitted(KDModule(net(), TeacherStore(tmp_path / "kd", net(1)), num_classes=3, temperature=1.0))
    message = r"Asking reads the teachers' features, which the store .*kd does not hold: fill another folder"
    with pytest.raises(InputError, match=message):
        fitted(Asking(TeacherStore(tmp_path / "kd", fill="never"), [Features("features")]))
    fitted(Asking(TeacherStore(tmp_path / "logits", net(1)), [Logits()]))
    message = r"Asking reads the teachers' probabilities, which the store .*logits does not hold: fill another folder"
    with pytest.raises(InputError, match=message):
        fitted(Asking(TeacherStore(tmp_path / "logits", fill="never"), [Unnamed(1.0)]))


@pytest.mark.slow
def test_a_store_of_logits_answers_who_asks_for_logits(tmp_path):
    fitted(kd(tmp_path, net(1), keep="logits"))
    fitted(Asking(TeacherStore(tmp_path, fill="never", keep="logits"), [Logits()]))


def test_a_store_without_mean_logits_is_none_of_meal_v2s(tmp_path):
    fitted(KDModule(net(), TeacherStore(tmp_path, net(1)), num_classes=3, temperature=1.0))
    module = MEALV2Module(
        net(), TeacherStore(tmp_path, fill="never"), num_classes=3, discriminator=FixedDiscriminator()
    )
    with pytest.raises(InputError, match="mean_logits is None, not True"):
        fitted(module)


def test_the_largest_probabilities_beside_all_logits_are_refused(tmp_path):
    store = TeacherStore(tmp_path, net(1), top_k=2)
    with pytest.raises(InputError, match="give the discriminator shown='probabilities', or leave top_k out"):
        MEALV2Module(net(), store, num_classes=3, discriminator=FixedDiscriminator())
    MEALV2Module(net(), store, num_classes=3, discriminator=FixedDiscriminator(shown="probabilities"))


def test_a_store_of_predictions_holds_no_feature_maps(tmp_path):
    fitted(kd(tmp_path, net(1)))
    with pytest.raises(InputError, match="holds no feature maps"):
        FEEDModule(net(), TeacherStore(tmp_path, fill="never"), num_classes=3, student_layer="features")


def test_a_function_cannot_be_known_again(tmp_path):
    sampler = FunctionSampler(lambda inputs, draws: inputs)
    module = ExtracurricularModule(net(), TeacherStore(tmp_path, net(1)), num_classes=3, samplers=[sampler])
    with pytest.raises(InputError, match="no store can tell whether FunctionSampler's function is unchanged"):
        fitted(module)


# How the batches are transformed


@dataclass(frozen=True)
class Inverted(BatchTransform):
    """A user's own."""

    scale: float = 1.0

    def __call__(self, batch, *, num_classes):
        return batch.replace(input=-self.scale * batch.input)


class Losses(pl.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def transformed(teachers, *transforms, partners=True, **options):
    losses = Losses()
    module = KDModule(net(), teachers, num_classes=3, transforms=transforms)
    data = TinyDataModule(views=2, partners=partners)
    fitted(module, data, max_epochs=4, callbacks=[losses], **options)
    return losses.values


@pytest.mark.slow
@pytest.mark.parametrize(
    "transforms", [[Mixup()], [Cutout(3), CutMix(probability=0.7)], [Inverted(0.5)], [LabelSmoothing(0.1)]], ids=str
)
def test_answers_are_about_the_transformed_batches(tmp_path, transforms):
    online = transformed(net(1), *transforms)
    store = {"dtype": "float32", "shard_size": 7}
    assert transformed(TeacherStore(tmp_path / "online", net(1), **store), *transforms) == pytest.approx(
        online, rel=1e-5
    )
    alone = transformed(TeacherStore(tmp_path / "online", fill="never", **store), *transforms)
    assert alone == pytest.approx(online, rel=1e-5)
    module = KDModule(net(), TeacherStore(tmp_path / "ahead", net(1), **store), num_classes=3, transforms=transforms)
    record(tiny_trainer(), module, TinyDataModule(views=2, partners=True))
    alone = transformed(TeacherStore(tmp_path / "ahead", fill="never", **store), *transforms)
    assert alone == pytest.approx(online, rel=1e-5)


def test_samples_that_are_mixed_with_others_of_their_batch_are_refused(tmp_path):
    message = "these were mixed with others of their batch: give the data module partners=True"
    with pytest.raises(InputError, match=message):
        transformed(TeacherStore(tmp_path, net(1)), Mixup(), partners=False)
    module = KDModule(net(), TeacherStore(tmp_path / "ahead", net(1)), num_classes=3, transforms=[CutMix()])
    with pytest.raises(InputError, match=message):
        record(tiny_trainer(), module, TinyDataModule(views=2))


@pytest.mark.slow
def test_other_transforms_are_refused(tmp_path):
    transformed(TeacherStore(tmp_path, net(1)), Inverted(0.5))
    with pytest.raises(InputError, match=r"transforms is \['Inverted\(scale=0.5\)'\], not \['Inverted\(scale=2.0\)'\]"):
        transformed(TeacherStore(tmp_path, net(1)), Inverted(2.0))
    # Who transforms nothing asks about nothing that was kept.
    with pytest.raises(InputError, match=r"transforms is .*, not \[\]"):
        transformed(TeacherStore(tmp_path, net(1)))


class Relabelling(BatchTransform):
    """Changes targets only."""

    changes_inputs = False

    def __call__(self, batch, *, num_classes):
        return batch


@pytest.mark.slow
def test_what_leaves_the_inputs_as_they_are_is_no_part_of_the_answers(tmp_path):
    transformed(TeacherStore(tmp_path, net(1)), Inverted(0.5))
    smoothed = [Inverted(0.5), LabelSmoothing(0.1)]
    transformed(TeacherStore(tmp_path, net(1)), *smoothed)
    transformed(TeacherStore(tmp_path, fill="never"), *smoothed)
    # Nor has a transform of one's own to tell its options.
    transformed(TeacherStore(tmp_path, fill="never"), Relabelling(), Inverted(0.5))


def test_a_transform_that_does_not_tell_its_options_cannot_be_known_again(tmp_path):
    class Secret(BatchTransform):
        def __call__(self, batch, *, num_classes):
            return batch

    with pytest.raises(
        InputError, match="cannot tell whether Secret is unchanged: make it a frozen dataclass of its opt"
    ):
        transformed(TeacherStore(tmp_path, net(1)), Secret())


# Data without views


class Unnumbered(pl.LightningDataModule):
    """Tensors without views, as anybody's data module."""

    num_classes = 3

    def setup(self, stage=None):
        samples = TinyDataModule().dataset("train")
        self.data = [(samples[index].input, samples[index].target) for index in range(24)]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.data, batch_size=8, shuffle=True)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.data, batch_size=8)


def generated(teachers):
    torch.manual_seed(2)
    decoder = ImageDecoder((1, 8, 8), 4, output_range=(-2.0, 2.0), width=4)
    return ExtracurricularModule(net(), teachers, num_classes=3, samplers=[GeneratorSampler(decoder, latent_dim=4)])


def test_without_views_the_stored_answers_are_about_the_inputs_of_every_epoch(tmp_path):
    module = generated(TeacherStore(tmp_path, [net(1)], data="tiny", dtype="float32"))
    stored = []

    class Watched(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch:
                batch = pl_module.prepared(batch, batch_idx)
                stored.append((pl_module.teachers.probabilities(batch), pl_module.teachers.run(batch)["probabilities"]))

    fitted(module, IndexedDataModule(Unnumbered()), max_epochs=3, callbacks=[Watched()])
    assert len(stored) == 6
    for answer, expected in stored:
        assert torch.allclose(answer, expected, atol=1e-5)


# Recording


class Renumbered(TinyDataModule):
    """Whose samples have indices of their own."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.collate_fn = renumbered
        return loader


def renumbered(batch):
    return batch.replace(index=23 - batch.index)


def test_samples_that_go_by_other_numbers_are_not_recorded(tmp_path):
    with pytest.raises(InputError, match="record asked for the training samples 0 to 7 and got others"):
        record(tiny_trainer(), kd(tmp_path, net(1)), Renumbered(views=2))


@pytest.mark.slow
def test_two_processes_mend_one_shard(tmp_path):
    record(tiny_trainer(), kd(tmp_path, net(1), shard_size=8), TinyDataModule(views=2))
    path = tmp_path / "view_00001/00001.shard"
    before = path.read_bytes()
    path.write_bytes(b"\0" + before[1:])
    record(tiny_trainer(devices=2, strategy="ddp_fork"), kd(tmp_path, net(1), shard_size=8), TinyDataModule(views=2))
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_shard_that_stays_is_checked_once(tmp_path, monkeypatch):
    fitted(kd(tmp_path, net(1), shard_size=8))
    checked = []
    check = files.checksum_fits
    monkeypatch.setattr(
        "distill_lightning.storage.rows.checksum_fits", lambda data: (checked.append(1), check(data))[1]
    )
    fitted(kd(tmp_path, net(1), shard_size=8, fill="never"), max_epochs=8)
    # 3 shards of 2 views, in 4 epochs each.
    assert len(checked) == 6
