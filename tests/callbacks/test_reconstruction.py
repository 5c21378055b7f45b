"""ReconstructionErrorProbe against a naive reference, what it leaves alone, and what it refuses."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from distill_lightning import Batch, FEEDModule, InputError, SupervisedModule
from distill_lightning.callbacks import ReconstructionErrorProbe
from distill_lightning.callbacks.reconstruction import _Probe
from distill_lightning.layers import Paraphraser, Translator
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer


def networks_of(*widths):
    torch.manual_seed(1)
    return {f"net_{number}": TinyNet(width=width) for number, width in enumerate(widths)}


def batches(count, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(size, 1, 8, 8, generator=generator), torch.zeros(size).long()) for _ in range(count)]


def feed_module(seed=0, **options):
    torch.manual_seed(seed)
    return FEEDModule(
        TinyNet(), [TinyNet(), TinyNet()], num_classes=3, student_layer="features", input_shape=(1, 8, 8), beta=10.0,
        **options,
    )  # fmt: skip


def units(feature):
    feature = feature.flatten(1)
    return feature / feature.square().sum(dim=1, keepdim=True).sqrt()


def naive_rows(head, source, target, train, val, *, epochs, weight, normalise):
    """One probe trained by hand: SGD with momentum and weight decay written out, errors as sums of numpy arrays."""
    source, target = copy.deepcopy(source).eval(), copy.deepcopy(target).eval()
    velocity = [torch.zeros_like(p) for p in head.parameters()]
    rows = []
    for _ in range(epochs):
        for images, _ in train:
            made, wanted = head(source.features(images).detach()), target.features(images).detach()
            if normalise:
                made, wanted = units(made), units(wanted)
            gradients = torch.autograd.grad(weight * (made - wanted).abs().mean(), list(head.parameters()))
            with torch.no_grad():
                for place, (parameter, gradient) in enumerate(zip(head.parameters(), gradients, strict=True)):
                    velocity[place] = 0.9 * velocity[place] + gradient + 5e-4 * parameter
                    parameter.sub_(0.1 * velocity[place])
        error, size, count = 0.0, 0.0, 0
        for images, _ in val:
            made, wanted = head(source.features(images)).detach(), target.features(images).detach()
            if normalise:
                made, wanted = units(made), units(wanted)
            made, wanted = made.double().numpy().ravel(), wanted.double().numpy().ravel()
            error += np.abs(made - wanted).sum()
            size += np.abs(wanted).sum()
            count += len(wanted)
        rows.append((error / count, error / size))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["self", "teacher"])
def test_the_table_is_that_of_probes_trained_by_hand(kind):
    networks, teachers = networks_of(4, 4), {"teacher_0": TinyNet(width=6), "teacher_1": TinyNet(width=4)}
    train, val = batches(5), [*batches(2, size=4, seed=1), *batches(1, size=3, seed=2)]
    probe = ReconstructionErrorProbe("features", kind=kind, epochs=2, seed=5, rate=0.25, beta=50.0)
    table = probe.measure(networks, train, val, teachers=teachers)
    everyone = networks | teachers
    if kind == "self":
        pairs = [(name, name) for name in ("net_0", "net_1", "teacher_0", "teacher_1")]
    else:
        pairs = [(network, teacher) for network in networks for teacher in teachers]
    assert [(row["network"], row["target"], row["epoch"]) for row in table] == [
        (*pair, epoch) for epoch in (1, 2) for pair in pairs
    ]
    assert all(list(row) == ["network", "target", "epoch", "absolute", "relative"] for row in table)
    for source, target in pairs:
        torch.manual_seed(5)
        channels = [everyone[name].features[3].out_channels for name in (source, target)]
        head = Paraphraser(channels[0], rate=0.25) if kind == "self" else Translator(*channels)
        expected = naive_rows(
            head, everyone[source], everyone[target], train, val, epochs=2,
            weight=1.0 if kind == "self" else 50.0, normalise=kind == "teacher",
        )  # fmt: skip
        found = [
            (row["absolute"], row["relative"]) for row in table if (row["network"], row["target"]) == (source, target)
        ]
        assert np.array(found) == pytest.approx(np.array(expected), rel=1e-4)
    assert probe.table is table


@pytest.mark.slow
def test_a_probe_on_the_teacher_itself_ends_below_one_on_a_random_network():
    data = TinyDataModule(samples=48)
    teacher, stranger = networks_of(4, 4).values()
    tiny_trainer(max_epochs=5).fit(SupervisedModule(teacher, num_classes=3), datamodule=data)
    data.trainer = None
    probe = ReconstructionErrorProbe("features", kind="teacher")
    loaders = data.train_dataloader(), data.val_dataloader()
    table = probe.measure({"itself": teacher, "random": stranger}, *loaders, teachers={"teacher_0": teacher})
    last = {row["network"]: row for row in table if row["epoch"] == 5}
    first = {row["network"]: row for row in table if row["epoch"] == 1}
    assert last["itself"]["relative"] < last["random"]["relative"]
    assert last["itself"]["absolute"] < last["random"]["absolute"]
    assert last["itself"]["absolute"] < first["itself"]["absolute"]


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("scale", [1e-2, 3.0, 1e4])
def test_the_relative_error_does_not_see_the_scale(scale, unit):
    torch.manual_seed(0)
    made, wanted = torch.randn(2, 5, 3, 4, 4)
    errors = []
    for factor in (1.0, scale):
        probe = _Probe("made", "wanted", nn.Identity(), unit=unit)
        for part in (slice(0, 3), slice(3, 5)):
            probe.observe({"made": factor * made[part], "wanted": factor * wanted[part]})
        errors.append(probe.errors())
    assert errors[1]["relative"] == pytest.approx(errors[0]["relative"], rel=1e-5)
    assert errors[1]["absolute"] == pytest.approx(errors[0]["absolute"] * (1 if unit else scale), rel=1e-5)


def test_zeros_have_a_relative_error_of_one_and_the_feature_itself_of_zero():
    feature = torch.rand(2, 3, 4, 4)
    probe = _Probe("made", "wanted", nn.Identity())
    probe.observe({"made": torch.zeros_like(feature), "wanted": feature})
    assert probe.errors()["relative"] == pytest.approx(1)
    probe.observe({"made": feature, "wanted": feature})
    assert probe.errors() == {"absolute": 0, "relative": 0}


def snapshot(network):
    return (
        {name: value.clone() for name, value in network.state_dict().items()},
        [module.training for module in network.modules()],
        [parameter.requires_grad for parameter in network.parameters()],
        [parameter.grad for parameter in network.parameters()],
        [len(module._forward_hooks) for module in network.modules()],
    )


def require_same(first, second):
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    assert first[1:] == second[1:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["self", "teacher"])
def test_networks_and_random_numbers_are_left_as_they_were(kind):
    networks, teachers = networks_of(4, 4), {"teacher_0": TinyNet()}
    networks["net_0"].train()
    networks["net_1"].eval()
    everyone = [*networks.values(), *teachers.values()]
    before = [snapshot(network) for network in everyone]
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    ReconstructionErrorProbe("features", kind=kind, epochs=1).measure(
        networks, batches(2), batches(1), teachers=teachers
    )
    for network, state in zip(everyone, before, strict=True):
        require_same(state, snapshot(network))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]  # noqa: NPY002


@pytest.mark.slow
def test_the_seed_decides_alone_and_the_company_does_not_matter():
    networks = networks_of(4, 4)
    data = TensorDataset(torch.rand(16, 1, 8, 8), torch.zeros(16).long())
    val = batches(2)

    def curve(names, *, seed=0, spoil=0):
        torch.manual_seed(spoil)
        probe = ReconstructionErrorProbe("features", epochs=2, seed=seed)
        # This loader draws its order from torch's own random state.
        table = probe.measure({name: networks[name] for name in names}, DataLoader(data, 4, shuffle=True), val)
        return [row["absolute"] for row in table if row["network"] == "net_1"]

    alone = curve(["net_1"])
    assert curve(["net_1"], spoil=1) == alone
    assert curve(["net_0", "net_1"], spoil=2) == pytest.approx(alone, rel=1e-6)
    assert curve(["net_1"], seed=1) != alone


def test_every_epoch_reads_the_views_of_its_number_and_the_loader_is_put_back():
    data = TinyDataModule()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(7)
    seen = []

    class Watching:
        sampler = loader.sampler

        def __iter__(self):
            for batch in loader:
                seen.append(batch.view.unique().tolist())
                yield batch

    ReconstructionErrorProbe("features", epochs=2).measure(networks_of(4), Watching(), data.val_dataloader())
    assert seen == [[0]] * 3 + [[1]] * 3
    assert loader.sampler.epoch == 7


def test_the_generator_of_a_loader_is_put_back():
    generator = torch.Generator().manual_seed(4)
    data = TensorDataset(torch.rand(8, 1, 8, 8), torch.zeros(8).long())
    loader = DataLoader(data, 4, shuffle=True, generator=generator)
    before = generator.get_state()
    ReconstructionErrorProbe("features", epochs=1).measure(networks_of(4), loader, batches(1))
    assert torch.equal(generator.get_state(), before)


def test_only_so_many_batches_are_read():
    train, val = batches(4), batches(3, seed=1)
    short = ReconstructionErrorProbe("features", epochs=1).measure(networks_of(4), train[:2], val[:1])
    limited = ReconstructionErrorProbe("features", epochs=1).measure(
        networks_of(4), train, val, train_batches=2, val_batches=1
    )
    assert limited == short


def test_another_optimiser_can_be_given():
    train, val = batches(4), batches(1)
    default = ReconstructionErrorProbe("features", epochs=1).measure(networks_of(4), train, val)
    still = partial(torch.optim.SGD, lr=0.0)
    unmoved = ReconstructionErrorProbe("features", epochs=2, optimizer=still).measure(networks_of(4), train, val)
    assert unmoved[0]["absolute"] == unmoved[1]["absolute"] != default[0]["absolute"]


# In a Trainer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["self", "teacher"])
def test_after_fit_it_holds_the_table_of_measure(kind):
    module, data, control = feed_module(), TinyDataModule(), TinyNet()
    probe = ReconstructionErrorProbe("features", kind=kind, control=control, epochs=2)
    trainer = tiny_trainer(callbacks=[probe])
    trainer.fit(module, datamodule=data)
    teachers = {f"teacher_{number}": network for number, network in enumerate(module.teachers)}
    again = ReconstructionErrorProbe("features", kind=kind, epochs=2)
    data.trainer = None
    networks = {"student": module.student, "control": control}
    expected = again.measure(networks, data.train_dataloader(), data.val_dataloader(), teachers=teachers)
    assert probe.table == expected
    names = {"student", "control", "teacher_0", "teacher_1"} if kind == "self" else {"student", "control"}
    assert {row["network"] for row in probe.table} == names
    labels = [line.get_label() for line in probe.figure.axes[1].lines]
    if kind == "self":
        assert labels == ["student", "control", "teacher_0", "teacher_1"]
    else:
        assert labels == [f"{name} to teacher_{m}" for name in ("student", "control") for m in (0, 1)]
    first = [
        row
        for row in probe.table
        if (row["network"], row["target"]) in (("student", "student"), ("student", "teacher_0"))
    ]
    for axes, key in zip(probe.figure.axes, ("absolute", "relative"), strict=True):
        assert axes.lines[0].get_ydata().tolist() == [row[key] for row in first]


@pytest.mark.slow
def test_the_training_is_the_same_with_and_without_it():
    ends = []
    for callbacks in ([], [ReconstructionErrorProbe("features", kind="teacher", epochs=1)]):
        module = feed_module()
        tiny_trainer(max_epochs=2, callbacks=callbacks).fit(module, datamodule=TinyDataModule())
        ends.append((snapshot(module.student), torch.get_rng_state()))
    require_same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.slow
def test_the_trainers_limits_hold():
    module, data = feed_module(), TinyDataModule()
    probe = ReconstructionErrorProbe("features", epochs=1)
    tiny_trainer(callbacks=[probe], limit_train_batches=1, limit_val_batches=2).fit(module, datamodule=data)
    data.trainer = None
    expected = ReconstructionErrorProbe("features", epochs=1).measure(
        {"student": module.student}, data.train_dataloader(), data.val_dataloader(), train_batches=1, val_batches=2
    )
    assert probe.table[0] == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["self", "teacher"])
def test_the_figure_goes_to_the_logger(kind, tmp_path):
    probe = ReconstructionErrorProbe("features", kind=kind, epochs=1)
    trainer = tiny_trainer(callbacks=[probe], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(feed_module(), datamodule=TinyDataModule())
    assert [path.name for path in tmp_path.rglob("*.png")] == [f"reconstruction_{kind}_3.png"]


class Plain(pl.LightningModule):
    """Nobody's base class: a student and a step."""

    def __init__(self):
        super().__init__()
        self.student = TinyNet()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.student(batch.input), batch.target)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val/loss", F.cross_entropy(self.student(batch.input), batch.target))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
def test_any_module_with_a_student_will_do():
    probe = ReconstructionErrorProbe("features", epochs=1)
    tiny_trainer(callbacks=[probe]).fit(Plain(), datamodule=TinyDataModule())
    assert [row["network"] for row in probe.table] == ["student"]


@pytest.mark.slow
def test_of_two_processes_the_first_measures(tmp_path, start_method):
    probe = ReconstructionErrorProbe("features", epochs=1)
    trainer = tiny_trainer(
        callbacks=[probe], logger=CSVLogger(tmp_path), devices=2, strategy=f"ddp_{start_method}", log_every_n_steps=1
    )
    trainer.fit(feed_module(), datamodule=TinyDataModule(batch_size=4))
    assert [path.name for path in tmp_path.rglob("*.png")] == ["reconstruction_self_3.png"]


class TwoLoaders(TinyDataModule):
    def val_dataloader(self):
        return [super().val_dataloader(), super().val_dataloader()]


class TwoTrainLoaders(TinyDataModule):
    def train_dataloader(self):
        return {"first": super().train_dataloader(), "second": super().train_dataloader()}


class Different(pl.LightningModule):
    def training_step(self, batch, batch_idx):
        raise AssertionError("the training has begun")

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_module", "options", "data", "limits", "message"),
    [
        (feed_module, {"layer": "featurs"}, TinyDataModule, {}, "no layer 'featurs'; similar names: features"),
        (feed_module, {"layer": "head"}, TinyDataModule, {}, r"student's 'head' gives shape \(1, 3\), not \(N"),
        (feed_module, {"teacher_layers": ["features"]}, TinyDataModule, {}, "1 teacher_layers for 2 teachers"),
        (
            feed_module, {"kind": "teacher", "teacher_layers": "features.0"}, TinyDataModule, {},
            r"student's feature is \(8, 4, 4\) and teacher_0's \(4, 8, 8\): tap layers of the same spatial size",
        ),
        (Plain, {"kind": "teacher"}, TinyDataModule, {}, "kind='teacher' needs teachers, and there are none"),
        (Different, {}, TinyDataModule, {}, "Different has no student: call measure"),
        (Plain, {}, TwoLoaders, {}, "needs one val_dataloader, got 2: call measure"),
        (Plain, {}, TwoTrainLoaders, {}, "needs one train_dataloader, got 2: call measure"),
        (Plain, {}, TinyDataModule, {"limit_val_batches": 0}, "measures on validation data, and there are none"),
        (Plain, {"rate": 0.01}, TinyDataModule, {}, "rate 0.01 of 8 channels leaves no factor channel"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_training(make_module, options, data, limits, message):
    module = make_module()
    trainer = tiny_trainer(callbacks=[ReconstructionErrorProbe(**({"layer": "features"} | options))], **limits)
    hooks = sum(len(child._forward_hooks) for child in module.modules())
    with pytest.raises(InputError, match=message):
        trainer.fit(module, datamodule=data())
    assert trainer.global_step == 0
    assert sum(len(child._forward_hooks) for child in module.modules()) == hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "both"}, "kind must be 'self' or 'teacher', got 'both'"),
        ({"epochs": 0}, "epochs and beta must be positive, got 0"),
        ({"beta": 0.0}, "epochs and beta must be positive, got 5 and 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ReconstructionErrorProbe("features", **options)


def test_measure_refuses_a_name_that_stands_twice_and_no_batches():
    networks = networks_of(4)
    with pytest.raises(InputError, match=r"share the names \['net_0'\]"):
        ReconstructionErrorProbe("features").measure(networks, batches(1), batches(1), teachers=networks)
    with pytest.raises(InputError, match="the validation loader has no batch"):
        ReconstructionErrorProbe("features").measure(networks, batches(1), [])
    with pytest.raises(InputError, match="needs teachers"):
        ReconstructionErrorProbe("features", kind="teacher").measure(networks, batches(1), batches(1))


@pytest.mark.slow
def test_batches_go_through_the_hooks_of_the_module_and_the_data():
    stages = []

    class Hooked(TinyDataModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            stages.append((self.trainer.training, self.trainer.validating))
            return batch.replace(input=batch.input + 1)

    class Probe(ReconstructionErrorProbe):
        def measure(self, *args, **options):
            # The training and the validation before it have gone through the hook, too.
            stages.clear()
            return super().measure(*args, **options)

    torch.manual_seed(0)
    module, probe = SupervisedModule(TinyNet(), num_classes=3), Probe("features", epochs=1)
    tiny_trainer(callbacks=[probe], max_epochs=1).fit(module, datamodule=Hooked())
    # The first epoch's batches in its order, shifted by hand.
    data = TinyDataModule()
    data.setup()
    loaders = [
        [b.replace(input=b.input + 1) for b in part] for part in (data.train_dataloader(), data.val_dataloader())
    ]
    table = ReconstructionErrorProbe("features", epochs=1).measure({"student": module.student}, *loaders)
    assert [row["absolute"] for row in probe.table] == pytest.approx([row["absolute"] for row in table], rel=1e-5)
    # First an example's shape, from the validation data.
    training, validating = (True, False), (False, True)
    assert stages == [validating] + [training] * len(loaders[0]) + [validating] * len(loaders[1])


def test_a_network_in_another_precision_is_probed_in_float32():
    network = TinyNet().eval()
    expected = ReconstructionErrorProbe("features", epochs=1).measure({"a": network}, batches(2), batches(1))
    double = copy.deepcopy(network).double()
    assert ReconstructionErrorProbe("features", epochs=1).measure({"a": double}, batches(2), batches(1)) == expected
    assert double.head.weight.dtype == torch.float64


def test_samples_that_do_not_count_are_left_out():
    networks = networks_of(4)
    train, val = batches(2), batches(1, seed=1)
    noise = [Batch(1e3 * torch.rand(2, 1, 8, 8), torch.full((2,), -100))]
    padded = [
        Batch(torch.cat([images, 1e3 * images[:1]]), torch.cat([target, target[:1] - 100])) for images, target in val
    ]
    probe = ReconstructionErrorProbe("features", epochs=2)
    assert probe.measure(networks, train + noise, padded + noise) == probe.measure(networks, train, val)


class Shifted(TinyNet):
    """Of an image and what is added to all its pixels."""

    def forward(self, image, shift):
        return super().forward(image + shift[:, :, None, None])


def test_inputs_by_name_are_probed_like_one_tensor():
    torch.manual_seed(1)
    network, plain = Shifted(width=4), TinyNet(width=4)
    plain.load_state_dict(network.state_dict())

    def by_name(parts, *, counted):
        shifts = [torch.rand(len(images), 1) for images, _ in parts]
        named = [
            Batch({"image": images - shift[:, :, None, None], "shift": shift}, target, counted=counted)
            for (images, target), shift in zip(parts, shifts, strict=True)
        ]
        whole = [Batch(images, target, counted=counted) for images, target in parts]
        return named, whole

    train, val = by_name(batches(2), counted=None), by_name(batches(2, seed=1), counted=torch.tensor([1, 0, 1, 1]) > 0)
    probe = ReconstructionErrorProbe("features", epochs=2)
    told, expected = (
        [row["relative"] for row in probe.measure({"a": one}, *loaders)]
        for one, loaders in ((network, (train[0], val[0])), (plain, (train[1], val[1])))
    )
    assert told == pytest.approx(expected, rel=1e-4)


def test_inputs_by_position_are_refused():
    several = [((images, images), target) for images, target in batches(1)]
    with pytest.raises(InputError, match="one tensor or several by name, got tuple: give them as a dict"):
        ReconstructionErrorProbe("features").measure(networks_of(4), several, several)
