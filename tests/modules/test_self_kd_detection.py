"""Self-KD of detectors: against loops over boxes by hand, its limits, its past, its checkpoints, its refusals."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from distill_lightning import (
    DetectionModule,
    InputError,
    MovingAverage,
    PastModel,
    SelfKDDetectionModule,
    SmallCNN,
    SmallResNet,
    StoredPast,
    faster_rcnn,
    torchvision_network,
)
from distill_lightning.testing import TinyDetectionDataModule, TinyFasterRCNN, tiny_trainer

CLASSES = 2
SIZES = {"image_mean": [0.5], "image_std": [0.25], "min_size": 32, "max_size": 64}
FEW = {"head_features": 16, "proposals": 20, "samples": 8, "fpn_channels": 8}


def one_layer():
    backbone = SmallCNN(num_classes=5, width=4)
    return faster_rcnn(
        backbone, num_classes=CLASSES, layers="features.6", anchor_sizes=[[8, 16]], **SIZES, **FEW
    )  # fmt: skip


def pyramid():
    layers = ["stage2", "stage3"]
    backbone = SmallResNet(num_classes=5, width=4)
    return faster_rcnn(
        backbone, num_classes=CLASSES, layers=layers, anchor_sizes=[[8], [16], [24]], **SIZES, **FEW
    )  # fmt: skip


def images_and_boxes(count=6):
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(count):
        image = torch.rand(1, 32 + 4 * (number % 2), 32, generator=generator) * 0.4
        boxes = torch.tensor([[4.0, 4.0, 16.0, 16.0], [18.0, 12.0, 28.0, 28.0]])[: number % 3]
        labels = torch.arange(number, number + len(boxes)) % CLASSES + 1
        for left, top, right, bottom in boxes.long().tolist():
            image[:, top:bottom, left:right] = 1
        samples.append((image, {"boxes": boxes, "labels": labels, "image_id": torch.tensor(number)}))
    return samples


class Numbered(torch.utils.data.Dataset):
    """The images again and again, in an order that a resumed training finds again."""

    samples = images_and_boxes()

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, target = self.samples[index]
        return image, dict(target)


def loader():
    return DataLoader(Numbered(), batch_size=2, collate_fn=lambda samples: tuple(zip(*samples, strict=True)))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def module_of(build=one_layer, *, kind=SelfKDDetectionModule, seed=0, **options):
    torch.manual_seed(seed)
    return kind(build(), **{"num_classes": CLASSES, "optimizer": sgd, **options})


def fitted(module, *, ckpt_path=None, **options):
    trainer = tiny_trainer(limit_val_batches=0, **options)
    torch.manual_seed(4)
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return trainer


def state_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


class Spy:
    """A detector's step as its own code sees it, by what is written into its classes and not into the object."""

    def __init__(self, monkeypatch, student):
        self.student = student
        heads, rpn = type(student.roi_heads), type(student.rpn)
        select, compute, sampler = heads.select_training_samples, rpn.compute_loss, type(student.rpn.fg_bg_sampler)
        sample = sampler.__call__

        def selected(own, proposals, targets):
            found = select(own, proposals, targets)
            self.boxes, self.labels = [boxes.clone() for boxes in found[0]], [label.clone() for label in found[2]]
            return found

        def computed(own, objectness, deltas, labels, targets):
            self.objectness, self.objects = objectness.detach().clone(), torch.cat(labels)
            return compute(own, objectness, deltas, labels, targets)

        def sampled(own, labels):
            found = sample(own, labels)
            # The last ones are those of the boxes.
            self.anchors = self.anchors or found
            return found

        monkeypatch.setattr(heads, "select_training_samples", selected)
        monkeypatch.setattr(rpn, "compute_loss", computed)
        monkeypatch.setattr(sampler, "__call__", sampled)
        student.transform.register_forward_hook(lambda _module, _inputs, output: setattr(self, "images", output[0]))
        student.roi_heads.box_predictor.register_forward_hook(
            lambda _module, _inputs, output: setattr(self, "logits", output[0].detach().clone())
        )
        self.anchors = None


def said_of_each_box(past, images, boxes):
    """Class logits of one box after the other."""
    features = past.backbone(images.tensors)
    features = {"0": features} if isinstance(features, torch.Tensor) else features
    for number, own in enumerate(boxes):
        one = {name: feature[number : number + 1] for name, feature in features.items()}
        for box in own:
            pooled = past.roi_heads.box_roi_pool(one, [box[None]], [images.image_sizes[number]])
            yield past.roi_heads.box_predictor(past.roi_heads.box_head(pooled))[0][0]


@pytest.mark.parametrize("build", [one_layer, pyramid])
@pytest.mark.parametrize(
    "options", [{}, {"foreground_only": True}, {"past_temperature": 2.0}, {"objectness": True, "past_temperature": 0.5}]
)
def test_terms_equal_loops_over_boxes_and_anchors(build, options, monkeypatch):
    alpha, tau = 0.3, options.get("past_temperature", 1.0)
    module = module_of(build, alpha_T=alpha, alpha_schedule="constant", **options)
    # Kept here, because Lightning 1.9 refers to it weakly.
    trainer = fitted(module)
    # Anchors of which a detector says the same could be mixed up.
    for detector in (module.student, module.past.model):
        nn.init.normal_(detector.rpn.head.cls_logits.weight)
    past = copy.deepcopy(module.past.model)
    spy = Spy(monkeypatch, module.student)
    assert module.trainer.current_epoch == trainer.current_epoch
    batch = module.prepared(next(iter(loader())))
    module.student.train()
    torch.manual_seed(9)
    stock = DetectionModule.terms(module, batch)
    random, spy.anchors = torch.get_rng_state(), None
    torch.manual_seed(9)
    terms = module.terms(batch)
    assert torch.equal(random, torch.get_rng_state())
    labels = torch.cat(spy.labels).tolist()
    assert 0 in labels
    assert set(labels) != {0}
    total = 0.0
    with torch.no_grad():
        for label, logits, said in zip(labels, spy.logits, said_of_each_box(past, spy.images, spy.boxes), strict=True):
            p = (said.double() / tau).softmax(dim=0)
            q = [alpha * p[k] + (1 - alpha) * (k == label) for k in range(CLASSES + 1)]
            if options.get("foreground_only") and label == 0:
                q = [float(k == label) for k in range(CLASSES + 1)]
            log_p = logits.double().log_softmax(dim=0)
            total -= float(sum(q[k] * log_p[k] for k in range(CLASSES + 1)))
    assert terms["classifier"].item() == pytest.approx(total / len(labels), rel=1e-4)
    assert terms["classifier"].item() != pytest.approx(stock["classifier"].item(), rel=1e-4)
    softened = [label > 0 or "foreground_only" not in options for label in labels]
    assert module._observed["known_fraction"].item() == pytest.approx(sum(softened) / len(labels))
    untouched = {"box_reg", "rpn_box_reg"} | ({"objectness"} if not options.get("objectness") else set())
    assert all(torch.equal(terms[name], stock[name]) for name in untouched)
    if options.get("objectness"):
        features = past.backbone(spy.images.tensors)
        said, deltas = past.rpn.head(list(features.values()))
        said, _ = detection.rpn.concat_box_prediction_layers(said, deltas)
        total, count = 0.0, 0
        chosen = torch.stack([torch.cat(kind) for kind in spy.anchors]).any(dim=0)
        for place in chosen.nonzero().flatten():
            s = (said.flatten()[place].double() / tau).sigmoid().item()
            q = (1 - alpha) * spy.objects[place].item() + alpha * s
            p = spy.objectness.flatten()[place].double().sigmoid().item()
            total -= q * torch.tensor(p).log().item() + (1 - q) * torch.tensor(1 - p).log().item()
            count += 1
        assert terms["objectness"].item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("options", [{"alpha_T": 0.0, "objectness": True}, {"alpha_T": 0.8, "max_epochs": 1}])
def test_without_alpha_or_a_past_it_is_the_detector_alone_bit_for_bit(options):
    max_epochs = options.pop("max_epochs", 3)
    plain, module = module_of(kind=DetectionModule), module_of(**options)
    first = fitted(plain, max_epochs=max_epochs)
    random = torch.get_rng_state()
    second = fitted(module, max_epochs=max_epochs)
    assert torch.equal(random, torch.get_rng_state())
    assert same(state_of(plain.student), state_of(module.student))
    for name in ("loss", "classifier", "objectness"):
        assert torch.equal(first.callback_metrics[f"train/{name}"], second.callback_metrics[f"train/{name}"])


class Watch(pl.Callback):
    """The past at the start of each epoch, what it is asked, and what it is at the epoch's end."""

    def __init__(self):
        self.ends, self.pasts, self.asked, self.own, self.metrics = [], [], [], [], []

    def on_train_start(self, trainer, pl_module):
        pl_module.student.roi_heads.box_roi_pool.register_forward_pre_hook(
            # The past is a copy of the student with its hooks.
            lambda module, inputs: self.own.append((inputs[1], inputs[2])) if module.training else None
        )

    def on_train_epoch_start(self, trainer, pl_module):
        past = pl_module.past.model
        self.pasts.append(None if past is None else state_of(past))
        if past is not None:
            assert not any(part.training for part in past.modules())
            past.roi_heads.box_roi_pool.register_forward_pre_hook(
                lambda _module, inputs: self.asked.append((inputs[1], inputs[2]))
            )

    def on_train_epoch_end(self, trainer, pl_module):
        past = pl_module.past.model
        assert past is None or same(self.pasts[-1], state_of(past))
        self.ends.append(state_of(pl_module.student))
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_the_past_is_the_student_of_the_last_epochs_end_and_sees_the_students_boxes():
    watch = Watch()
    fitted(module_of(pyramid, alpha_T=0.6), max_epochs=3, callbacks=[watch])
    assert watch.pasts[0] is None
    assert all(same(past, end) for past, end in zip(watch.pasts[1:], watch.ends, strict=False))
    assert any("running_mean" in name for name in watch.ends[0])
    steps = len(loader())
    assert len(watch.asked) == 2 * steps
    for (asked, asked_sizes), (own, own_sizes) in zip(watch.asked, watch.own[steps:], strict=True):
        assert asked_sizes == own_sizes
        assert all(map(torch.equal, asked, own))
    first, second, last = watch.metrics
    assert first["train/alpha"] == pytest.approx(0.2)
    assert (first["train/known_fraction"], first["train/target_gt_prob"], first["train/target_entropy"]) == (0, 1, 0)
    assert last["train/alpha"] == pytest.approx(0.6)
    assert last["train/known_fraction"] == 1
    assert 0.4 <= last["train/target_gt_prob"] < second["train/target_gt_prob"] < 1
    assert last["train/target_entropy"] > 0
    assert 0 < last["train/agree_past"] <= 1


def test_nothing_is_left_on_the_detector_even_after_an_error(monkeypatch):
    module = module_of(alpha_schedule="constant", objectness=True)
    fitted(module, max_epochs=2)
    student, batch = module.student, module.prepared(next(iter(loader())))

    def assert_clean():
        assert "select_training_samples" not in vars(student.roi_heads)
        assert "compute_loss" not in vars(student.rpn)
        assert isinstance(student.rpn.fg_bg_sampler, detection._utils.BalancedPositiveNegativeSampler)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in student.modules())

    assert_clean()
    monkeypatch.setattr(student.roi_heads.box_head, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.terms(batch)
    assert_clean()


def mask_rcnn():
    backbone = SmallCNN(num_classes=5, width=4).features
    backbone.out_channels = 16
    anchors = AnchorGenerator(((8, 16),), ((1.0,),))
    pools = {name: MultiScaleRoIAlign(["0"], 2, 2) for name in ("box_roi_pool", "mask_roi_pool")}
    return detection.MaskRCNN(
        backbone, CLASSES + 1, rpn_anchor_generator=anchors, **pools, **SIZES,
        box_batch_size_per_image=8, rpn_post_nms_top_n_train=10,
    )  # fmt: skip


def keypoint_rcnn():
    backbone = SmallCNN(num_classes=5, width=4).features
    backbone.out_channels = 16
    heads = {"keypoint_head": KeypointRCNNHeads(16, (8,)), "keypoint_predictor": KeypointRCNNPredictor(8, 1)}
    pools = {name: MultiScaleRoIAlign(["0"], 2, 2) for name in ("box_roi_pool", "keypoint_roi_pool")}
    return detection.KeypointRCNN(
        backbone, CLASSES + 1, rpn_anchor_generator=AnchorGenerator(((8, 16),), ((1.0,),)), **pools, **heads, **SIZES,
        box_batch_size_per_image=8, rpn_post_nms_top_n_train=10,
    )  # fmt: skip


def mobilenet():
    backbone = torchvision_network("mobilenet_v3_small", num_classes=5, in_channels=1)
    return faster_rcnn(backbone, num_classes=CLASSES, layers="features.3", **SIZES, **FEW)


def resnet():
    backbone = torchvision_network("resnet18", num_classes=5, in_channels=1)
    return faster_rcnn(
        backbone, num_classes=CLASSES, layers=["layer1", "layer2"], frozen_norms=True, **SIZES, **FEW
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("build", [mask_rcnn, keypoint_rcnn, mobilenet, resnet])
@pytest.mark.parametrize("past", [PastModel(), MovingAverage(decay=0.9)], ids=["model", "average"])
def test_the_whole_family_is_trained(build, past, monkeypatch):
    more = []
    for image, target in Numbered.samples:
        masks = torch.ones(len(target["boxes"]), *image.shape[1:], dtype=torch.uint8)
        # The middle of each box, which can be seen.
        corners = target["boxes"].view(-1, 2, 2).mean(dim=1)
        keypoints = torch.cat([corners, torch.ones(len(corners), 1)], dim=1)[:, None]
        more.append((image, {**target, "masks": masks, "keypoints": keypoints}))
    monkeypatch.setattr(Numbered, "samples", more)
    module = module_of(build, past=past, objectness=True, alpha_T=0.5)
    trainer = fitted(module, max_epochs=2)
    assert trainer.callback_metrics["train/known_fraction"] == 1
    assert trainer.callback_metrics["train/target_gt_prob"] < 1
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert ("mask" in module.weights()) == (build is mask_rcnn)
    assert ("keypoint" in module.weights()) == (build is keypoint_rcnn)


@pytest.mark.parametrize("past", [PastModel(), MovingAverage(decay=0.9)], ids=["model", "average"])
@pytest.mark.parametrize("when", ["epoch", pytest.param("batch", marks=pytest.mark.lightning(since=(2, 5)))])
def test_a_resumed_training_is_the_undisturbed_one(past, when, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if when == "batch" and trainer.current_epoch == 1 and batch_idx == 1:
                self.save(trainer)

        def on_train_epoch_end(self, trainer, pl_module):
            if when == "epoch" and trainer.current_epoch == 1:
                self.save(trainer)

        def save(self, trainer):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    def run(seed, **options):
        torch.manual_seed(seed)
        method = {"past": past, "alpha_T": 0.7, "objectness": True, "optimizer": sgd}
        module = SelfKDDetectionModule(TinyFasterRCNN(CLASSES), num_classes=CLASSES, **method)
        trainer = tiny_trainer(max_epochs=3, callbacks=options.pop("callbacks", []))
        trainer.fit(module, datamodule=TinyDetectionDataModule(), **options)
        return module, trainer.callback_metrics

    whole, first = run(0, callbacks=[Stop()])
    resumed, second = run(7, ckpt_path=str(tmp_path / "last.ckpt"))
    assert same(state_of(whole.student), state_of(resumed.student))
    assert same(state_of(whole.past.model), state_of(resumed.past.model))
    assert {name: float(value) for name, value in second.items()} == pytest.approx(
        {name: float(first[name]) for name in second}, nan_ok=True
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"past": StoredPast()}, r"StoredPast keeps a row of each sample, and boxes have none: use past=PastModel\(\)"),
        ({"alpha_T": 1.5}, r"alpha_T must be in \[0, 1\]"),
        ({"past_temperature": 0.0}, "past_temperature must be positive"),
        ({"alpha_schedule": "constant", "total_epochs": 3}, "total_epochs=3 would do nothing"),
        ({"num_classes": 4}, "has 3 classes where num_classes=4 needs 5"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        module_of(**options)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_detectors_are_refused(whole):
    student = one_layer()
    # Nothing is compiled before it is called.
    student.backbone.compile()
    SelfKDDetectionModule(student, num_classes=CLASSES)
    if not whole:
        student.roi_heads.compile()
    with pytest.raises(
        InputError, match=r"is compiled \((the whole detector|roi_heads)\), .* compile its backbone alone"
    ):
        SelfKDDetectionModule(torch.compile(student) if whole else student, num_classes=CLASSES)


def test_what_a_detector_does_not_show_is_named(monkeypatch):
    module = module_of(alpha_schedule="constant")
    fitted(module, max_epochs=2)
    heads = module.student.roi_heads
    # As compiled code does.
    monkeypatch.setattr(module.student, "forward", lambda *_: {"loss_classifier": torch.zeros(())})
    with pytest.raises(InputError, match="FasterRCNN has not shown its images, proposals, .* in a training step"):
        module.terms(module.prepared(next(iter(loader()))))
    assert "select_training_samples" not in vars(heads)


def test_other_detectors_are_refused():
    retina = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    with pytest.raises(InputError, match=r"\(RetinaNet\) has no rpn, .*: give a FasterRCNN, MaskRCNN or KeypointRCNN"):
        SelfKDDetectionModule(retina, num_classes=CLASSES)
