"""Backbones in files, features of classifiers, and Faster R-CNN on them, against torchvision's built by hand."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from distill_lightning import (
    DetectionModule,
    InputError,
    PastModel,
    RegressionModule,
    SelfKDModule,
    SmallCNN,
    SmallLSTM,
    SmallResNet,
    SupervisedModule,
    faster_rcnn,
    pytorchcv_network,
    timm_network,
    torchvision_network,
)
from distill_lightning.layers import FeatureTap
from distill_lightning.networks import build_from, recipe_of
from distill_lightning.networks.backbones import Features, load_backbone, write_backbone
from distill_lightning.testing import TinyDetectionDataModule, TinyNet, tiny_trainer
from distill_lightning.testing.tiny import TinyDataModule

GREY = {"image_mean": [0.4], "image_std": [0.3], "min_size": 40, "max_size": 64, "head_features": 16}


def targets():
    return [
        {"boxes": torch.tensor([[2.0, 3, 14, 20], [10, 8, 30, 30]]), "labels": torch.tensor([1, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]


def images():
    return [torch.rand(1, 32, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


class ByHand(nn.Module):
    """The layers of a `SmallResNet` as torchvision wants them."""

    def __init__(self, network, *, has_pyramid):
        super().__init__()
        self.stem, self.stage1, self.stage2, self.stage3 = network.stem, network.stage1, network.stage2, network.stage3
        self.fpn = FeaturePyramidNetwork([8, 16], 12, extra_blocks=LastLevelMaxPool()) if has_pyramid else None
        self.out_channels = 12 if has_pyramid else 16

    def forward(self, images):
        second = self.stage2(self.stage1(self.stem(images)))
        third = self.stage3(second)
        return third if self.fpn is None else self.fpn({"0": second, "1": third})


@pytest.mark.parametrize("layers", ["stage3", ["stage2", "stage3"]])
def test_losses_and_boxes_equal_torchvisions_by_hand(layers):
    has_pyramid = not isinstance(layers, str)
    anchors = [[8], [16], [24]] if has_pyramid else [[8, 16, 24]]
    ours = faster_rcnn(
        SmallResNet(num_classes=5, width=4), num_classes=2, layers=layers, anchor_sizes=anchors, fpn_channels=12, **GREY
    )
    body = ByHand(SmallResNet(num_classes=9, width=4), has_pyramid=has_pyramid)
    theirs = FasterRCNN(
        body,
        3,
        min_size=40,
        max_size=64,
        image_mean=[0.4],
        image_std=[0.3],
        rpn_anchor_generator=AnchorGenerator(tuple(map(tuple, anchors)), ((0.5, 1.0, 2.0),) * len(anchors)),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"] if has_pyramid else ["0"], 7, 2),
    )
    # Both have the same layers in the same order, under other names; the heads are narrower here.
    theirs.roi_heads.box_head.fc6 = nn.Linear(theirs.backbone.out_channels * 49, 16)
    theirs.roi_heads.box_head.fc7 = nn.Linear(16, 16)
    theirs.roi_heads.box_predictor.cls_score, theirs.roi_heads.box_predictor.bbox_pred = (
        nn.Linear(16, 3),
        nn.Linear(16, 12),
    )
    renamed = {name.replace("features.body.", ""): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(renamed)
    torch.manual_seed(1)
    first = ours(images(), targets())
    torch.manual_seed(1)
    second = theirs(images(), targets())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for one, other in zip(ours.eval()(images()), theirs.eval()(images()), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("boxes", "scores", "labels"))


NETWORKS = {
    "cnn": (lambda classes: SmallCNN(num_classes=classes, width=4), ["features.2", "features.10"], "head"),
    "resnet": (lambda classes: SmallResNet(num_classes=classes, width=4), ["stage1", "stage3"], "head"),
    "torchvision": (lambda classes: torchvision_network("resnet18", num_classes=classes), ["layer1", "layer3.0"], "fc"),
    "mobilenet": (
        lambda classes: torchvision_network("mobilenet_v3_small", num_classes=classes),
        ["features.1", "features.12"],
        "classifier.3",
    ),
    "timm": (lambda classes: timm_network("resnet10t", num_classes=classes), ["layer1", "layer2"], "fc"),
    "pytorchcv": (
        lambda classes: pytorchcv_network("resnet20_cifar10", num_classes=classes),
        ["features.stage1", "features.stage3"],
        "output",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_any_classifier_gives_its_features_and_its_backbone(name, tmp_path):
    build, layers, head = NETWORKS[name]
    network, other = build(7), build(4)
    path = write_backbone(network, tmp_path / "backbone.safetensors", num_classes=7)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    load_backbone(other, path)
    for key, value in other.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith(f"{head}.") else network.state_dict()[key]), key
    other.eval()
    inputs = torch.rand(2, next(iter(other.parameters())).shape[1], 32, 32)
    with torch.no_grad():
        _, expected = FeatureTap(other, layers)(inputs)
        features = Features(other, layers)
        found = features(inputs)
    assert [feature.shape[1] for feature in expected.values()] == features.channels
    assert all(map(torch.equal, found.values(), expected.values()))
    assert features(inputs[..., :24])["0"].shape[0] == 2
    kept = {key for key, _ in features.named_parameters()}
    assert not [key for key in kept if head in key]


def test_a_backbone_of_a_training_finds_its_way_into_a_detector(tmp_path):
    classifier = SelfKDModule(SmallResNet(num_classes=3, width=4), num_classes=3, past=PastModel())
    tiny_trainer(max_epochs=2).fit(classifier, datamodule=TinyDataModule())
    path = classifier.export_backbone(tmp_path / "backbone.safetensors")
    detector = faster_rcnn(
        SmallResNet(num_classes=10, width=4), num_classes=2, layers="stage3", backbone_weights=path, **GREY
    )
    body = detector.backbone.features.body.state_dict()
    trained = classifier.student.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in body.items())
    assert {name for name in trained if name not in body} == {"head.weight", "head.bias"}
    module, trainer = DetectionModule(detector, num_classes=2), tiny_trainer()
    module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.01)
    trainer.fit(module, datamodule=TinyDetectionDataModule())
    trainer.save_checkpoint(tmp_path / "detector.ckpt")
    path.unlink()
    loaded = DetectionModule.load_from_checkpoint(tmp_path / "detector.ckpt")
    for name, value in loaded.student.state_dict().items():
        assert torch.equal(value, module.student.state_dict()[name])


def test_a_recipe_builds_the_detector_again():
    detector = faster_rcnn(SmallCNN(num_classes=5, width=4), num_classes=2, layers="features.6", **GREY)
    again = build_from(recipe_of(detector))
    again.load_state_dict(detector.state_dict())
    assert recipe_of(again) == recipe_of(detector)
    assert recipe_of(faster_rcnn(TinyNet(), num_classes=2, layers="features.5", **GREY)) is None


def test_frozen_norms_keep_their_statistics():
    detector = faster_rcnn(SmallCNN(num_classes=5), num_classes=2, layers="features.6", frozen_norms=True, **GREY)
    module = DetectionModule(detector, num_classes=2, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    tiny_trainer().fit(module, datamodule=TinyDetectionDataModule())
    norms = [name for name, layer in detector.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms
    for name, value in detector.state_dict().items():
        assert torch.equal(value, before[name]) == (name.rpartition(".")[0] in norms), name


def test_the_callers_own_classifier_is_left_alone(tmp_path):
    classifier = SmallCNN(num_classes=5, width=4)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    other = write_backbone(SmallCNN(num_classes=3, width=4), tmp_path / "backbone.safetensors", num_classes=3)
    first = faster_rcnn(classifier, num_classes=2, layers="features.6", backbone_weights=other, **GREY)
    second = faster_rcnn(classifier, num_classes=2, layers="features.6", frozen_norms=True, **GREY)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert all(parameter.requires_grad for parameter in classifier.parameters())
    pointers = [{parameter.data_ptr() for parameter in network.parameters()} for network in (classifier, first, second)]
    assert not pointers[0] & pointers[1]
    assert not pointers[0] & pointers[2]
    assert not pointers[1] & pointers[2]


class Shortcut(nn.Module):
    """Its second layer reads more than the first has given."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, images):
        first = self.first(images)
        return self.head((self.second(first + 1)).mean(dim=(2, 3)))


class Flattening(nn.Module):
    """It gives its last layer another shape than the first has returned."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(2, 4, 1)

    def forward(self, images):
        return self.last(self.first(images).unflatten(1, (2, 2)).sum(dim=2)).mean(dim=(2, 3))


def small(**options):
    given = {"num_classes": 2, "layers": ["stage2", "stage3"], "anchor_sizes": [[8], [16], [32]], **GREY, **options}
    return faster_rcnn(SmallResNet(num_classes=5, width=4), **given)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: small(num_classes=0), "num_classes"),
        (lambda: small(image_mean=[0.1, 0.2, 0.3]), "image_mean has 3 numbers, .* 1 channels: give one for each"),
        (lambda: small(anchor_sizes=[[8], [16]]), r"of 2 levels, and there are 3 \(one for each layer, and one for"),
        (lambda: small(layers="stage3"), "of 3 levels, and there are 1: give sizes for each"),
        (lambda: small(layers="stage9"), "stage9"),
        (
            lambda: small(layers="head"),
            "SmallResNet: 'head' returns a tensor of 2 dimensions, .* name a layer before it",
        ),
        (lambda: small(layers=["stage3", "stage2"]), "runs these layers in the order stage2, stage3: name them so"),
        (lambda: small(layers=["stage3", "stage3"]), r"layers=\['stage3', 'stage3'\] have one twice"),
        (lambda: small(min_size=100), "min_size=100 is the shorter side of an image, and max_size=64 bounds"),
        (lambda: faster_rcnn(Flattening(), num_classes=2, layers="last", **GREY), "one after the other down to last"),
        (lambda: faster_rcnn(Shortcut(), num_classes=2, layers="second", **GREY), "one after the other down to second"),
        (lambda: faster_rcnn(SmallLSTM(5, input_size=8), num_classes=2, layers="lstm", **GREY), "SmallLSTM"),
    ],
)
def test_what_cannot_be_built_is_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_files_that_are_no_backbone_of_this_network_are_refused(tmp_path):
    module = SupervisedModule(SmallCNN(num_classes=3, width=4), num_classes=3)
    whole = module.export_student(tmp_path / "student.safetensors")
    with pytest.raises(InputError, match=r"is no file of a backbone: write it by module.export_backbone"):
        small(backbone_weights=whole)
    other = module.export_backbone(tmp_path / "backbone.safetensors")
    with pytest.raises(InputError, match=r"\(of a SmallCNN\) is a checkpoint of another architecture than SmallResNet"):
        small(backbone_weights=other)
    with pytest.raises(InputError, match="another architecture than SmallCNN: it has 'features.0.weight' of shape"):
        load_backbone(SmallCNN(num_classes=3, width=8), other)
    with pytest.raises(InputError, match="no checkpoint at"):
        small(backbone_weights=tmp_path / "gone.safetensors")
    with pytest.raises(InputError, match="written as .safetensors"):
        module.export_backbone(tmp_path / "backbone.pt")


class Backwards(nn.Module):
    """It declares its head before its features, whose channels are as many as its classes."""

    def __init__(self, classes=16):
        super().__init__()
        self.head, self.features = nn.Linear(16, classes), nn.Conv2d(1, 16, 3)

    def forward(self, images):
        return self.head(self.features(images).mean(dim=(2, 3)))


class Tokens(nn.Module):
    """What it reads is not known by its layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs, mask):
        return self.second(self.first(inputs * mask))


def test_the_head_is_the_last_layer_that_runs(tmp_path):
    network, other = Backwards(), Backwards(classes=3)
    load_backbone(other, write_backbone(network, tmp_path / "backbone.safetensors", num_classes=16))
    assert torch.equal(other.features.weight, network.features.weight)
    rows = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    path = write_backbone(rows, tmp_path / "rows.safetensors", num_classes=6)
    other = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    load_backbone(other, path)
    assert torch.equal(other[0].weight, rows[0].weight)
    assert not torch.equal(other[2].weight, rows[2].weight)


@pytest.mark.parametrize(
    ("network", "classes", "message"),
    [
        (Tokens(), 4, r"Tokens has several layers of 4 outputs \(first, second\), and does not run"),
        (Backwards(classes=3), 16, "Backwards has no last layer of 16 outputs .*: 'head' is its last: use"),
    ],
)
def test_a_head_that_cannot_be_told_is_refused(network, classes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        write_backbone(network, tmp_path / "backbone.safetensors", num_classes=classes)
    assert not any(tmp_path.iterdir())


def test_only_classifiers_have_a_backbone(tmp_path):
    regression = RegressionModule(SmallResNet(num_targets=2), num_targets=2)
    with pytest.raises(InputError, match="RegressionModule trains no classifier"):
        regression.export_backbone(tmp_path / "backbone.safetensors")
    headless = SupervisedModule(nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Unflatten(1, (2, 3))), num_classes=3)
    with pytest.raises(InputError, match="has no last layer of 3 outputs"):
        headless.export_backbone(tmp_path / "backbone.safetensors")
