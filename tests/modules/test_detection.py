"""Detectors trained the ordinary way: against a loop by hand, their metrics, their checkpoints, and what is refused."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from distill_lightning import (
    Boxes,
    Categorical,
    DetectionBatch,
    DetectionModule,
    InputError,
    Mixup,
    SmallCNN,
    faster_rcnn,
)
from distill_lightning.errors import NonFiniteError
from distill_lightning.outputs.metrics import DetectionCalibrationError
from distill_lightning.testing import TinyDetectionDataModule, TinyFasterRCNN, tiny_trainer


def detector(num_classes=2, *, seed=0):
    """It samples few boxes, so that chance has a say."""
    torch.manual_seed(seed)
    return faster_rcnn(
        SmallCNN(num_classes=5, width=4),
        num_classes=num_classes,
        layers="features.6",
        image_mean=[0.5],
        image_std=[0.25],
        min_size=32,
        max_size=64,
        anchor_sizes=[[8, 16]],
        head_features=16,
        proposals=20,
        samples=8,
    )


def images_and_boxes(count=6, *, num_classes=2):
    """Images of unlike sizes with none, one or two squares each, as torchvision's reference code collates them."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(count):
        image = torch.rand(1, 32 + 4 * (number % 2), 32, generator=generator) * 0.4
        boxes = torch.tensor([[4.0, 4.0, 16.0, 16.0], [18.0, 12.0, 28.0, 28.0]])[: number % 3]
        labels = torch.arange(number, number + len(boxes)) % num_classes + 1
        for left, top, right, bottom in boxes.long().tolist():
            image[:, top:bottom, left:right] = 1
        samples.append((image, {"boxes": boxes, "labels": labels, "image_id": torch.tensor(100 + number)}))
    return samples


def collate(samples):
    return tuple(zip(*samples, strict=True))


def loader(samples=None):
    return DataLoader(images_and_boxes() if samples is None else samples, batch_size=3, collate_fn=collate)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def module_of(student=None, **options):
    return DetectionModule(student or detector(), **{"num_classes": 2, "optimizer": sgd, **options})


def fitted(module, train=None, val=None, **options):
    trainer = tiny_trainer(**options, **({} if val else {"limit_val_batches": 0}))
    trainer.fit(module, train or loader(), val or loader())
    return trainer


def state_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_training_equals_a_loop_by_hand():
    by_hand = detector()
    optimizer = sgd(by_hand.parameters())
    torch.manual_seed(3)
    losses = []
    for _ in range(2):
        for images, targets in loader():
            terms = by_hand(list(images), list(targets))
            loss = sum(terms.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append({name: value.item() for name, value in terms.items()})
    module = module_of()
    torch.manual_seed(3)
    trainer = fitted(module, max_epochs=2)
    assert same(state_of(by_hand), state_of(module.student))
    assert module.weights() == dict.fromkeys(["classifier", "box_reg", "objectness", "rpn_box_reg"], 1.0)
    for name in module.weights():
        mean = sum(terms[f"loss_{name}"] for terms in losses[2:]) / 2
        assert trainer.callback_metrics[f"train/{name}"] == pytest.approx(mean, rel=1e-5)


def trained():
    module = DetectionModule(TinyFasterRCNN(2), num_classes=2, optimizer=partial(torch.optim.Adam, lr=0.01))
    data, trainer = TinyDetectionDataModule(), tiny_trainer(max_epochs=20, check_val_every_n_epoch=20)
    trainer.fit(module, datamodule=data)
    return module, data, trainer


@pytest.mark.slow
def test_metrics_are_those_of_all_images():
    module, data, trainer = trained()
    tested = trainer.test(module, datamodule=data, verbose=False)[0]
    assert {"test/map_class_square1", "test/map_class_square2", "test/voc07_map_50", "test/ece"} <= tested.keys()
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    module.student.eval()
    with torch.no_grad():
        for batch in data.test_dataloader():
            metric.update(module(batch), batch.target)
    expected = metric.compute()
    assert expected["map_50"] > 0
    for name in ("map", "map_50"):
        assert tested[f"test/{name}"] == pytest.approx(float(expected[name]))
    by_class = (tested["test/map_class_square1"] + tested["test/map_class_square2"]) / 2
    assert by_class == pytest.approx(tested["test/map"])
    module.train()
    scored = module.score(data.test_dataloader())
    assert scored == pytest.approx({name.removeprefix("test/"): value for name, value in tested.items()})
    assert module.training


def test_without_cocos_code_nothing_that_needs_it_begins(monkeypatch):
    monkeypatch.setattr("distill_lightning.outputs.metrics.detection.find_spec", lambda name: None)
    fitted(module_of())
    module = module_of(metrics=MetricCollection({"ece": DetectionCalibrationError()}))
    fitted(module, val=loader())
    module = module_of()
    before = state_of(module.student)
    for begin in ("fit", "validate", "test"):
        trainer = tiny_trainer(num_sanity_val_steps=0)
        loaders = [loader(), loader()] if begin == "fit" else [loader()]
        with pytest.raises(InputError, match=r"pip install 'distill-lightning\[detection\]'"):
            getattr(trainer, begin)(module, *loaders)
        assert same(before, state_of(module.student))
        metrics = [*module.val_metrics.values(), *module.test_metrics.values()]
        assert not any(metric.rows for metric in metrics)


def test_names_of_the_data_are_looked_at_before_an_epoch():
    module, data = DetectionModule(TinyFasterRCNN(2), num_classes=2, optimizer=sgd), TinyDetectionDataModule()
    data.class_names = ("a", "a")
    before = state_of(module.student)
    with pytest.raises(InputError, match="class_names have 'a' twice"):
        tiny_trainer(num_sanity_val_steps=0).fit(module, datamodule=data)
    assert same(before, state_of(module.student))


@pytest.mark.lightning(since=(2, 6))
def test_several_loaders_have_metrics_of_their_own():
    trainer = fitted(module_of(class_names=["a", "b"]), val=[loader(), loader(images_and_boxes(2))])
    names = {name for name in trainer.callback_metrics if name.startswith("val/map_class_a")}
    assert names == {"val/map_class_a/dataloader_idx_0", "val/map_class_a/dataloader_idx_1"}


def test_only_images_that_count_do():
    module, samples = module_of(), images_and_boxes()
    batch = DetectionBatch(*map(list, collate(samples)))
    some = batch.replace(counted=torch.tensor([False, True, True, False, True, False]))
    module.student.eval()
    found = module.predict_step(some)
    assert len(found) == 3
    assert torch.equal(found[0]["boxes"], module(batch)[1]["boxes"])
    assert len(module.predict_step([image for image, _ in samples])) == 6
    assert module.score([some]) == pytest.approx(
        module.score([DetectionBatch(*map(list, collate([samples[row] for row in (1, 2, 4)])))]), nan_ok=True
    )


def test_metrics_of_the_user_are_logged():
    metrics = MetricCollection({"coco": MeanAveragePrecision(class_metrics=True, backend="faster_coco_eval")})
    trainer = fitted(module_of(metrics=metrics), val=loader())
    assert {"val/map", "val/mar_100"} <= trainer.callback_metrics.keys()
    # Rows of numbers are not.
    assert not [name for name in trainer.callback_metrics if "classes" in name]


def test_a_checkpoint_and_an_exported_student_are_the_detector(tmp_path):
    module = module_of(class_names=["a", "b"])
    trainer = fitted(module)
    trainer.save_checkpoint(tmp_path / "detector.ckpt")
    loaded = DetectionModule.load_from_checkpoint(tmp_path / "detector.ckpt")
    assert same(state_of(loaded.student), state_of(module.student))
    assert loaded.output == Boxes(2, ["a", "b"])
    fresh = detector(seed=5)
    module.export_student(tmp_path / "detector.pt")
    fresh.load_state_dict(torch.load(tmp_path / "detector.pt"))
    assert same(state_of(fresh), state_of(module.student))


def test_another_kind_of_detector_is_trained_too():
    backbone = nn.Sequential(nn.Conv2d(1, 8, 4, stride=4), nn.ReLU())
    backbone.out_channels = 8
    anchors = AnchorGenerator(((8, 16),), ((1.0,),))
    student = RetinaNet(
        backbone, 3, min_size=32, max_size=32, image_mean=[0.5], image_std=[0.25], anchor_generator=anchors
    )
    trainer = fitted(module_of(student), val=loader())
    assert {"train/classification", "train/bbox_regression", "val/map"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (detector, {"transforms": [Mixup()]}, "transforms=.*: batches of boxes are not mixed"),
        (detector, {"input_shape": (1, 32, 32)}, "input_shape=.*may have any size"),
        (detector, {"compile": True}, "compile=True: the shapes of a detector change"),
        (detector, {"output": Categorical(2)}, r"output=Categorical.*: leave it out"),
        (detector, {"class_names": ["a"]}, "1 class_names for num_classes=2"),
        (detector, {"class_names": "ab"}, "must be a list of names"),
        (
            detector,
            {"class_names": ["a", "b"], "output": Boxes(2)},
            r"class_names=\['a', 'b'\] would do nothing beside",
        ),
        (
            detector,
            {"num_classes": 3},
            r"\(FasterRCNN\) has 3 classes where num_classes=3 needs 4, .* or leave the background out",
        ),
        (detector, {"num_classes": 0}, "num_classes must be at least 1"),
        (lambda: SmallCNN(num_classes=2), {}, "does not take images and targets: give a detector"),
    ],
)
def test_what_makes_no_sense_is_refused(student, options, message):
    with pytest.raises(InputError, match=message):
        module_of(student(), **options)


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        ([[0.0, 0, 4, 4]], [0], "image 7 in training batch 0 has an object of class 0, and classes go from 1 to 2"),
        ([[0.0, 0, 4, 4]], [3], "an object of class 3"),
        ([[0.0, 0, 4, 4], [4.0, 4, 4, 8]], [1, 1], r"the box \[4.0, 4.0, 4.0, 8.0\], which has no area"),
        ([[0.0, 0, torch.nan, 4]], [1], "which has no area"),
        (
            [[0.0, 0, 4, 4], [1.0, 1, 2, 99]],
            [1, 1],
            r"the box \[1.0, 1.0, 2.0, 99.0\], whose centre .* its 32x32",
        ),
        ([[-9.0, 1, 2, 4]], [1], r"the box \[-9.0, 1.0, 2.0, 4.0\], whose centre is outside"),
        ([[0, 0, 4, 4]], [1], r"boxes of int64 \(1, 4\): give floats"),
        ([0.0, 0, 4, 4], [1], r"boxes of float32 \(4,\)"),
        ([[0.0, 0, 4, 4]], [1, 2], r"labels of int64 \(2,\): give int64 \(1,\)"),
        ([[0.0, 0, 4, 4]], [1.0], r"labels of float32 \(1,\)"),
    ],
)
def test_boxes_that_cannot_be_right_are_named(boxes, labels, message):
    target = {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels), "image_id": torch.tensor(7)}
    samples = [images_and_boxes(1)[0], (torch.rand(1, 32, 32), target)]
    with pytest.raises(InputError, match=message):
        fitted(module_of(), loader(samples))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda image: (image * 255).byte(),
            r"the images in training batch 0 are torch.uint8, and .* floats in \[0, 1\]",
        ),
        (
            lambda image: image.expand(3, -1, -1),
            r"reads 1 channel .* gets 3 of the inputs \(N, 3, 32, 32\) of training",
        ),
        (lambda image: image[0], "the images of a detection must be a list of tensors"),
    ],
)
def test_images_that_cannot_be_read_are_refused(change, message):
    image, target = images_and_boxes(3)[2]
    with pytest.raises(InputError, match=message):
        fitted(module_of(), loader([(change(image), target)]))


@pytest.mark.lightning(since=(2, 1))
@pytest.mark.parametrize(("precision", "kind"), [("16-true", "float16"), ("bf16-true", "bfloat16")])
def test_boxes_that_would_be_rounded_by_pixels_are_refused(precision, kind):
    message = rf"the images in \w+ batch 0 are torch.{kind}, in which boxes, .*precision='16-mixed' or 'bf16-mixed'"
    with pytest.raises(InputError, match=message):
        fitted(module_of(), precision=precision)
    for stage in ("validate", "test", "predict"):
        with pytest.raises(InputError, match=message):
            getattr(tiny_trainer(precision=precision), stage)(module_of(), loader())


def test_boxes_may_reach_beyond_the_edge():
    target = {"boxes": torch.tensor([[-1.5, 8, 8, 34]]), "labels": torch.tensor([1])}
    trainer = fitted(module_of(), loader([(torch.rand(1, 32, 32), target)]))
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_images_that_are_not_finite_are_named():
    samples = images_and_boxes(3)
    samples[2][0][0, 3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"train/\w+ is not finite in batch 0 .* the inputs of samples 2 of"):
        fitted(module_of(), loader(samples))
    module = module_of(nonfinite="skip")
    before = state_of(module.student)
    with pytest.raises(NonFiniteError, match="1 of 1 batches of epoch 1 were skipped"):
        fitted(module, loader(samples))
    assert same(before, state_of(module.student))


def test_a_schedule_waits_for_the_precision_to_rise():
    rising = module_of(lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, mode="max"))
    trainer = fitted(rising, val=loader())
    assert trainer.lr_scheduler_configs[0].monitor == "val/map"
    with pytest.raises(InputError, match="ReduceLROnPlateau watches val/map, which rises: give it mode='max'"):
        fitted(module_of(lr_scheduler=ReduceLROnPlateau), val=loader())


def test_boxes_are_no_distribution():
    output = Boxes(2)
    with pytest.raises(InputError, match="Boxes has no divergence"):
        output.divergence_rows(torch.zeros(1), torch.zeros(1))
    with pytest.raises(InputError, match=r"Boxes has no likelihood of labels: take a module that is made for such"):
        output.label_loss(torch.zeros(1), DetectionBatch([]))
