"""Every classification method on data modules that know nothing of this package."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.functional import to_pil_image

from distill_lightning import (
    CompressionBaseline,
    CutMix,
    ExtracurricularModule,
    FEEDModule,
    FixedDiscriminator,
    GeneratorModule,
    HintDistance,
    IndexedDataModule,
    InputError,
    KDModule,
    LabelSmoothing,
    MEALV2Module,
    Mixup,
    MixupSampler,
    MovingAverage,
    ParaphraserModule,
    PastModel,
    SelfKDModule,
    SupervisedModule,
    TeacherStore,
)
from distill_lightning.compression.steps import PruneWeights
from distill_lightning.testing import TinyNet, tiny_trainer

SAMPLES = 20


class Place:
    """Stands for what no device takes: a coordinate system, or the bounds of a picture."""

    def __init__(self, name):
        self.name = name


class Pictures(Dataset):
    """Bright corners in noise; ``make`` tells how a library hands a sample out."""

    def __init__(self, make, seed):
        generator = torch.Generator().manual_seed(seed)
        self.make, self.labels = make, torch.arange(SAMPLES) % 3
        self.images = torch.rand(SAMPLES, 1, 8, 8, generator=generator)
        for image, label in zip(self.images, self.labels.tolist(), strict=True):
            image[0, 4 * (label // 2) :, 4 * (label % 2) :] += 0.5

    def __len__(self):
        return SAMPLES

    def __getitem__(self, number):
        return self.make(self.images[number], self.labels[number], number)


def pair(image, label, number):
    return image, label


def of_torchgeo(image, label, number):
    return {"image": image, "label": label, "crs": Place("EPSG:32633"), "bounds": (number, number + 1.0)}


def stacked(samples):
    """As torchgeo collates: tensors are stacked, everything else is listed."""
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: torch.stack(c) if isinstance(c[0], torch.Tensor) else c for name, c in columns.items()}


def of_lightly(image, label, number):
    return image, int(label), f"pictures/{number:03}.png"


def as_tuple(samples):
    """As lightly's own functions collate, which give the file names in a list."""
    images, labels, names = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), list(names)


def in_views(image, label, number):
    """Two views of a sample, the second one brighter; a transform of lightly gives such a list."""
    return [image, image + 0.1], int(label), f"pictures/{number:03}.png"


class Foreign(pl.LightningDataModule):
    """A data module of another library."""

    num_classes, input_shape = 3, (1, 8, 8)

    def __init__(self, make=pair, *, collate=default_collate, seen=None):
        super().__init__()
        self.make, self.collate, self.seen = make, collate, pair if seen is None else seen

    def loader(self, make, seed):
        collate = self.collate if make is self.make else default_collate
        return DataLoader(Pictures(make, seed), batch_size=5, collate_fn=collate)

    def train_dataloader(self):
        return self.loader(self.make, 0)

    def val_dataloader(self):
        return self.loader(self.seen, 1)

    test_dataloader = predict_dataloader = val_dataloader


class Geo(Foreign):
    """As torchgeo's: what no device takes is left on the host, and the device augments."""

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        batch = {name: part for name, part in batch.items() if name not in ("crs", "bounds")}
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "image": batch["image"] * 1.0}


LAYOUTS = {
    "pairs": Foreign,
    "torchgeo": lambda: Foreign(of_torchgeo, collate=stacked, seen=of_torchgeo),
    "torchgeo with hooks": lambda: Geo(of_torchgeo, collate=stacked, seen=of_torchgeo),
    "lightly": lambda: Foreign(of_lightly, seen=of_lightly),
    "lightly's own collate": lambda: Foreign(of_lightly, collate=as_tuple, seen=of_lightly),
}
METHODS = {
    "supervised": lambda s, t, _: SupervisedModule(s, num_classes=3, transforms=[Mixup(), LabelSmoothing(0.1)]),
    "kd": lambda s, t, _: KDModule(s, [t], num_classes=3, transforms=[CutMix()]),
    "kd without labels": lambda s, t, _: KDModule(s, t, num_classes=3, hard_label_weight=0.0),
    "kd from a store": lambda s, t, path: KDModule(
        s, TeacherStore(path / "store", [t], data="pictures"), num_classes=3
    ),
    "feed": lambda s, t, _: FEEDModule(s, t, num_classes=3, student_layer="features", beta=1.0),
    "hint": lambda s, t, _: FEEDModule(s, t, num_classes=3, student_layer="features", distance=HintDistance()),
    "self-kd": lambda s, t, _: SelfKDModule(s, num_classes=3),
    "self-kd, model": lambda s, t, _: SelfKDModule(s, num_classes=3, past=PastModel()),
    "self-kd, average": lambda s, t, _: SelfKDModule(s, num_classes=3, past=MovingAverage()),
    "meal v2": lambda s, t, _: MEALV2Module(s, t, num_classes=3, discriminator=FixedDiscriminator()),
    "extracurricular": lambda s, t, _: ExtracurricularModule(
        s, t, num_classes=3, samplers=[MixupSampler()], label_weight=0.1
    ),
    "compression": lambda s, t, _: CompressionBaseline(
        s, num_classes=3, teacher=t, dense_epochs=1, steps=[PruneWeights(amount=0.5, finetune_epochs=1)]
    ),
}  # fmt: skip
# Whose draws, or what they keep, belong to samples.
NEED_INDEX = {"kd from a store", "self-kd"}
DRAW = {"supervised", "kd", "extracurricular"}


def fitted(name, data, tmp_path):
    torch.manual_seed(0)
    student, teacher = TinyNet(), TinyNet(width=6)
    module = METHODS[name](student, teacher, tmp_path)
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=data)
    logged = {key: value.clone() for key, value in trainer.callback_metrics.items()}
    logged |= trainer.test(module, datamodule=data, verbose=False)[0]
    assert torch.cat(trainer.predict(module, datamodule=data)).shape == (SAMPLES, 3)
    return student, logged


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_alike_whatever_the_batches_look_like(name, tmp_path):
    student, logged = fitted(name, IndexedDataModule(Foreign()), tmp_path / "pairs")
    assert torch.isfinite(logged["train/loss"])
    pictures = Pictures(pair, 1)
    with torch.no_grad():
        right = student.eval()(pictures.images).argmax(dim=1) == pictures.labels
    assert float(logged["test/accuracy"]) == pytest.approx(float(right.double().mean()))
    expected = {key: value.clone() for key, value in student.state_dict().items()}
    wrapped = ["torchgeo", "lightly"] if name == "kd from a store" else ["torchgeo with hooks", "lightly's own collate"]
    plain = [] if name in NEED_INDEX | DRAW else ["torchgeo", "lightly"]
    for layout in [*wrapped, *plain]:
        data = LAYOUTS[layout]()
        other, found = fitted(name, IndexedDataModule(data) if layout in wrapped else data, tmp_path / layout)
        for key, value in expected.items():
            assert torch.equal(value, other.state_dict()[key]), (layout, key)
        assert found["test/accuracy"] == logged["test/accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["torchgeo with hooks", "lightly"])
@pytest.mark.parametrize("name", sorted(DRAW))
def test_without_indices_inputs_are_mixed_all_the_same(name, layout, tmp_path):
    _, logged = fitted(name, LAYOUTS[layout](), tmp_path)
    assert torch.isfinite(logged["train/loss"])


HELPERS = {
    "generator": lambda: GeneratorModule(input_shape=(1, 8, 8), latent_dim=2, output_range=(-2, 3)),
    "paraphraser": lambda: ParaphraserModule([TinyNet()], layers="features", input_shape=(1, 8, 8)),
}


@pytest.mark.parametrize("name", HELPERS)
def test_what_is_trained_for_a_method_reads_them_too(name):
    states = []
    for layout in ("pairs", "torchgeo", "lightly"):
        torch.manual_seed(0)
        module = HELPERS[name]()
        before = {key: value.clone() for key, value in module.state_dict().items()}
        tiny_trainer(limit_val_batches=0).fit(module, datamodule=LAYOUTS[layout]())
        states.append(module.state_dict())
    assert any(not torch.equal(value, before[key]) for key, value in states[0].items())
    for other in states[1:]:
        assert all(torch.equal(value, other[key]) for key, value in states[0].items())


@pytest.mark.parametrize("layout", ["pairs", "torchgeo", "lightly"])
@pytest.mark.parametrize("name", sorted(NEED_INDEX))
def test_what_needs_indices_says_so(name, layout, tmp_path):
    with pytest.raises(InputError, match=r"IndexedDataModule\(datamodule\)") as refused:
        fitted(name, LAYOUTS[layout](), tmp_path)
    assert "\n" not in str(refused.value)


def test_a_store_refuses_images_that_change_on_the_device(tmp_path):
    with pytest.raises(InputError, match="has a hook on_after_batch_transfer: do in the data set what it does"):
        fitted("kd from a store", IndexedDataModule(LAYOUTS["torchgeo with hooks"]()), tmp_path)


def as_lists(samples):
    """As it comes of ``zip``, without a tensor of the labels."""
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), labels


@pytest.mark.parametrize("name", ["feed", "self-kd"])
def test_labels_that_are_no_tensor_are_one_line(name, tmp_path):
    data = IndexedDataModule(Foreign(lambda image, label, _: (image, int(label)), collate=as_lists))
    with pytest.raises(InputError, match=r"Module: the targets are of the type tuple: let the data module give a ten"):
        fitted(name, data, tmp_path)
    # Who never looks at labels may get the names of files.
    tiny_trainer(limit_val_batches=0).fit(
        METHODS["kd without labels"](TinyNet(), TinyNet(), tmp_path), datamodule=Foreign(collate=as_lists)
    )


@pytest.mark.parametrize(
    ("inputs", "kind"), [(list, "list"), (lambda images: None, "NoneType"), (lambda images: 0 * len(images), "int")]
)
def test_inputs_that_are_no_tensors_are_one_line(inputs, kind, tmp_path):
    def collate(samples):
        images, labels = zip(*samples, strict=True)
        return inputs([to_pil_image(image) for image in images]), torch.stack(labels)

    message = f"training batch 0 has no tensor among its inputs, which are of the type {kind}: let the data module give"
    with pytest.raises(InputError, match=message) as refused:
        tiny_trainer(limit_val_batches=0).fit(
            METHODS["kd without labels"](TinyNet(), TinyNet(), tmp_path), datamodule=Foreign(collate=collate)
        )
    assert "\n" not in str(refused.value)


# Several views of each sample


def views(collate=default_collate):
    return Foreign(in_views, collate=collate, seen=of_lightly)


def test_views_are_joined_as_rows_with_their_samples_target_and_index():
    (first, *_) = IndexedDataModule(views(), join_views=True).train_dataloader()
    pictures = Pictures(pair, 0)
    expected = torch.cat([pictures.images[:5], pictures.images[:5] + 0.1])
    assert torch.equal(first.input, expected)
    assert first.target.tolist() == 2 * [0, 1, 2, 0, 1]
    assert first.index.tolist() == first.key.index.tolist() == 2 * [0, 1, 2, 3, 4]
    (keyed, *_) = IndexedDataModule(
        Foreign(lambda *sample: dict(zip(("image", "label"), in_views(*sample), strict=False))), join_views=True
    ).train_dataloader()
    assert torch.equal(keyed.input, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name != "kd from a store"])
def test_every_method_trains_on_joined_views(name, tmp_path):
    _, logged = fitted(name, IndexedDataModule(views(), join_views=True), tmp_path)
    assert torch.isfinite(logged["train/loss"])


@pytest.mark.parametrize("name", ["supervised", "feed", "extracurricular", "self-kd, model"])
def test_views_that_are_not_joined_are_one_line(name, tmp_path):
    message = r"TinyNet takes images, and the batch gives it 2 inputs by position .*wrap the data in IndexedDataModule"
    with pytest.raises(InputError, match=message) as refused:
        fitted(name, views(), tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda image, label, _: ([image, image[:, :4]], label), r"\[\(5, 1, 8, 8\), \(5, 1, 4, 8\)\]"),
        (pair, "Tensor"),
    ],
)
def test_what_are_no_views_of_one_size_is_refused(make, found):
    with pytest.raises(
        InputError, match=f"joins a list of views of one shape, and the batch has {found}: leave it out"
    ):
        next(iter(IndexedDataModule(Foreign(make), join_views=True).train_dataloader()))
