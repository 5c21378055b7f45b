"""An image and a pose in one batch, through every method of a regression, to a mean angle in degrees."""

import json
import math

import pytest
import torch
from torch import distributions
from torchmetrics import MetricCollection

from distill_lightning import (
    AngularError,
    AttentionDistance,
    CompressionBaseline,
    CutMixSampler,
    ExtracurricularModule,
    FEEDModule,
    Gaussian,
    GazeDataModule,
    GazeNet,
    InputError,
    KDModule,
    LogitTerm,
    MatchPoint,
    MEALV2Module,
    MixupSampler,
    RegressionModule,
    SelfKDModule,
    SmallResNet,
    SupervisedModule,
    TeacherStore,
    export_checkpoint,
    load_exported,
)
from distill_lightning.compression.steps import PruneUnits, PruneWeights
from distill_lightning.data.datamodules.gaze_files import Eyes
from distill_lightning.layers import dry_forward
from distill_lightning.networks import build_from, recipe_of
from distill_lightning.testing import tiny_trainer


class Looks(GazeDataModule):
    """Noise in the place of files; the gaze is what the pose and the brighter half of the image say."""

    def __init__(self, **options):
        super().__init__(data_dir="nowhere", batch_size=8, **options)

    def setup(self, stage=None):
        generator = torch.Generator().manual_seed(0)
        for split in ("train", "val", "test"):
            images = torch.randint(0, 256, (16, 1, 36, 60), generator=generator, dtype=torch.uint8)
            poses = 0.3 * torch.randn(16, 2, generator=generator)
            images[::2, :, :18] //= 2
            self._splits[split] = Eyes(images, poses, poses + 0.2 * (torch.arange(16) % 2)[:, None])


def nets(count=2, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [GazeNet(width=width, **options) for width in (2, 4, 6)[:count]]


METHODS = {
    "regression": lambda s, t, o: RegressionModule(s, num_targets=2, burn_in_epochs=1, **o),
    "supervised": lambda s, t, o: SupervisedModule(s, output=Gaussian(2), **o),
    "kd": lambda s, t, o: KDModule(s, t, num_targets=2, **o),
    "extracurricular": lambda s, t, o: ExtracurricularModule(
        s, t, num_targets=2, samplers=[MixupSampler(), CutMixSampler()], label_weight=0.1, **o
    ),
    "points": lambda s, t, o: ExtracurricularModule(
        s, t, num_targets=2, match=MatchPoint(), bn_mode="separate", **o
    ),
    "feed": lambda s, t, o: FEEDModule(
        s, t, output=Gaussian(2), student_layer="features", logit_term=LogitTerm(), beta=1.0, **o
    ),
    "attention": lambda s, t, o: FEEDModule(
        s, t, output=Gaussian(2), student_layer="features", distance=AttentionDistance(), **o
    ),
    "weights": lambda s, t, o: CompressionBaseline(
        s, num_targets=2, teacher=t, dense_epochs=1, steps=[PruneWeights(amount=0.5, finetune_epochs=1)], **o
    ),
    "channels": lambda s, t, o: CompressionBaseline(
        s, num_targets=2, teacher="dense", dense_epochs=1,
        steps=[PruneUnits(amount=0.5, unit="channel", finetune_epochs=1)], **o,
    ),
}  # fmt: skip


def made(name, teachers=1):
    student, *others = nets(1 + teachers)
    options = {"input_shape": Looks.input_shape, "metrics": MetricCollection({"angle": AngularError()})}
    return METHODS[name](student, others, options | {"optimizer": lambda p: torch.optim.SGD(p, lr=0.01)})


def naive_angle(network, data):
    """Mean arc cosine in degrees, sample by sample."""
    angles = []
    for batch in data.val_dataloader():
        with torch.no_grad():
            output = network.eval()(**batch.input)
        for found, true in zip(output[:, :2].tolist(), batch.target.tolist(), strict=True):
            one, other = (
                (-math.cos(p) * math.sin(y), -math.sin(p), -math.cos(p) * math.cos(y)) for p, y in (found, true)
            )
            angles.append(math.degrees(math.acos(sum(a * b for a, b in zip(one, other, strict=True)))))
    return sum(angles) / len(angles)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_a_regression_reads_both_inputs(name):
    module, data = made(name, teachers=2 if name == "kd" else 1), Looks()
    before = module.student.head.weight.detach().clone()
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=data)
    logged = trainer.callback_metrics
    assert torch.isfinite(logged["train/loss"])
    assert float(logged["val/angle"]) == pytest.approx(naive_angle(module.student, data), rel=1e-4)
    # The pose's weights are the last ones, and learn.
    after = module.student.head.weight
    assert (after[:2, -2:] != before[:2, -2:]).all()
    assert sum(len(output) for output in trainer.predict(module, datamodule=data)) == 16
    if name == "channels":
        assert module.student.features[0].out_channels == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kd", "feed", "weights"])
def test_a_checkpoint_tells_the_shapes_of_both_inputs(name, tmp_path):
    module = made(name)
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, datamodule=Looks())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, teacher = nets()
    given = {"teacher" if name == "weights" else "teachers": [teacher]}
    loaded = type(module).load_from_checkpoint(tmp_path / "last.ckpt", **given)
    assert loaded.input_shape == {"image": (1, 36, 60), "pose": (2,)}
    assert loaded.num_targets == 2
    for key, value in module.student.state_dict().items():
        assert torch.equal(value, loaded.student.state_dict()[key]), key


@pytest.mark.slow
def test_a_store_keeps_what_teachers_say_of_mixed_images_and_poses(tmp_path):
    states, calls = [], []
    for folder in (None, "store", "store"):
        student, teacher = nets()
        if len(states) == 2:
            teacher.register_forward_hook(lambda *_: calls.append("asked"))
        store = [teacher] if folder is None else TeacherStore(tmp_path / folder, [teacher], dtype="float32")
        module = ExtracurricularModule(student, store, num_targets=2, seed=3)
        tiny_trainer(max_epochs=2, limit_val_batches=0).fit(module, datamodule=Looks(views=1, partners=True))
        states.append(module.student.state_dict())
    assert not calls
    for name, value in states[1].items():
        assert torch.equal(value, states[2][name]), name
        # Where a sample stands in its batch may change the last bit of what is said of it.
        torch.testing.assert_close(value, states[0][name], rtol=1e-4, atol=1e-6)


# Terms that were a classifier's alone


def gaussian(output):
    mean, log_var = output.double().chunk(2, dim=1)
    return distributions.Normal(mean, (log_var / 2).exp())


@pytest.mark.parametrize("name", ["feed", "weights"])
def test_terms_of_a_regression_are_those_of_torchs_normal(name):
    module = made(name).eval()
    torch.nn.init.normal_(module.student.head.weight, std=0.3)
    torch.nn.init.normal_(module.teachers[0].head.weight, std=0.3)
    batch = next(iter(Looks().val_dataloader()))
    terms = module.terms(batch)
    student, teacher = (gaussian(network(**batch.input)) for network in (module.student, module.teachers[0]))
    nll = -student.log_prob(batch.target.double()).sum(dim=1).mean()
    kl = distributions.kl_divergence(teacher, student).sum(dim=1).mean()
    assert float(terms["nll"]) == pytest.approx(float(nll), rel=1e-4)
    assert float(terms["kd"]) == pytest.approx(float(kl), rel=1e-4)
    expected = {"nll": 1.0, "kd": 1.0, "feed": 1.0} if name == "feed" else {"nll": 0.5, "kd": 0.5}
    weights = module.weights()
    assert {key: weights[key] for key in expected} == expected
    if name == "feed":
        assert terms["feed"].requires_grad


def test_a_complete_compression_without_a_teacher_is_plain_regression():
    (student,) = nets(1)
    module = CompressionBaseline(student.eval(), num_targets=2)
    batch = next(iter(Looks().val_dataloader()))
    assert module.weights() == {"nll": 1.0}
    assert torch.equal(module.terms(batch)["nll"], SupervisedModule(student, output=Gaussian(2)).terms(batch)["nll"])


# The network


def test_gaze_net_is_its_layers_one_by_one():
    (network,) = nets(1)
    network.eval()
    image, pose = torch.rand(3, 1, 36, 60), torch.randn(3, 2)
    feature = network.features(image)
    assert feature.shape == (3, 8, 9, 15)
    cells = [
        feature[:, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].mean(dim=(2, 3))
        for row in range(3)
        for column in range(5)
    ]
    hidden = torch.relu(network.hidden[0](torch.stack(cells, dim=2).flatten(1)))
    torch.testing.assert_close(network(image, pose), network.head(torch.cat([hidden, pose], dim=1)))
    again = build_from(recipe_of(GazeNet(3, width=2, deviation=False)))
    assert again(image, pose).shape == (3, 3)
    assert GazeNet(3, width=2)(image, pose).shape == (3, 6)
    with pytest.raises(InputError, match="GazeNet: width must be at least 1, got 0"):
        GazeNet(width=0)


# Export


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "torch_export", "onnx"])
def test_a_student_of_two_inputs_is_exported(kind, tmp_path):
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    module = made("kd")
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=Looks())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    export = export_checkpoint(tmp_path / "last.ckpt", tmp_path / "out", to=[kind])
    assert export.files[0].difference < 1e-5
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert told["input_shape"] == {"image": [1, 36, 60], "pose": [2]}
    card = (tmp_path / "out/README.md").read_text()
    assert "It reads `image` `(N, 1, 36, 60)` and `pose` `(N, 2)`, by these names" in card
    inputs = next(iter(Looks().val_dataloader())).input
    if kind == "safetensors":
        found = load_exported(tmp_path / "out")(**inputs)
        assert torch.equal(found, module.student.eval()(**inputs))


# Refusals


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s, t: KDModule(SmallResNet(num_targets=2), t, num_targets=2, input_shape=Looks.input_shape),
         r"SmallResNet takes images, and the batch gives it image, pose by keyword"),
        (lambda s, t: KDModule(s, t, num_targets=2, input_shape=(1, 36, 60)), "missing 1 required positional argument"),
        (lambda s, t: KDModule(s, t, num_targets=2, input_shape={"image": (3, 36, 60), "pose": (2,)}),
         r"GazeNet does not take an input of shape {'image': \(3, 36, 60\), 'pose': \(2,\)} .*of each tensor by its"),
        (lambda s, t: KDModule(s, t, num_targets=3, input_shape=Looks.input_shape), r"num_targets=3 needs \(N, 6\)"),
        (lambda s, t: FEEDModule(s, t, output=Gaussian(2), student_layer="features", input_shape=Looks.input_shape,
                                 logit_term=LogitTerm(temperature=2.0)), "Gaussian has no temperature: leave 2.0 out"),
        (lambda s, t: CompressionBaseline(s, num_targets=2, teacher=t, temperature=2.0), "temperature=2.0 would do"),
        (lambda s, t: SelfKDModule(s, num_classes=None, output=Gaussian(2)), "SelfKDModule .*classifier"),
        (lambda s, t: MEALV2Module(s, t, num_classes=None, output=Gaussian(2)), "MEALV2Module .*classifier"),
    ],
)  # fmt: skip
def test_refusals_name_what_is_wrong(build, message):
    with pytest.raises(InputError, match=message) as refused:
        build(*nets())
    assert "\n" not in str(refused.value)


def test_a_dry_forward_gives_each_argument_its_shape():
    (network,) = nets(1)
    assert dry_forward(network, {"pose": (2,), "image": (1, 20, 33)}).shape == (1, 4)
