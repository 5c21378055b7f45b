"""CompressionBaseline: its loss, its checkpoints, optimiser and schedule in every phase, and what is measured."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from distill_lightning import (
    CompressionBaseline,
    KDModule,
    OneCycle,
    Pretrained,
    SmallCNN,
    SmallResNet,
    SupervisedModule,
    TeacherEnsemble,
)
from distill_lightning.callbacks import CompressionCallback, Measurements
from distill_lightning.choices import plain
from distill_lightning.compression import (
    Cubic,
    Encode,
    LearnMask,
    LowRank,
    Movement,
    PruneUnits,
    PruneWeights,
    Quantize,
    Regularise,
    ShareWeights,
    load_compressed,
)
from distill_lightning.compression.mask.penalties import l1
from distill_lightning.compression.structure.changes import plain_copy
from distill_lightning.errors import InputError
from distill_lightning.networks.weights import write_weights
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

# A run can be resumed and evaluated without the callbacks that have written its checkpoints.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    # Some train on after the last step.
    pytest.mark.filterwarnings("ignore:the last step of the compression is over"),
    pytest.mark.filterwarnings("ignore:teacher='dense'. the network has not been trained"),
]

sgd = partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)
tiny_cnn = partial(SmallCNN, 3, width=2)


def baseline(steps, seed=0, network=tiny_cnn, **options):
    torch.manual_seed(seed)
    return CompressionBaseline(network(), num_classes=3, steps=steps, **{"optimizer": sgd, "seed": 5, **options})


def fit(module, *, epochs=4, data=None, **options):
    trainer = tiny_trainer(max_epochs=epochs, **options)
    trainer.fit(module, datamodule=data or TinyDataModule())
    return trainer


def weights_of(network):
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert not [name for name, value in first.items() if not torch.equal(value, second[name])]


class Rates(Callback):
    """Keeps the learning rate of every step, by epoch."""

    def __init__(self):
        self.rates = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer, *_):
        self.rates.setdefault(trainer.current_epoch, []).append(optimizer.param_groups[0]["lr"])


def one_cycle(steps, peak=0.05):
    """`OneCycle`'s defaults, written down once more."""
    rates = []
    for step in range(steps):
        progress = step / (steps - 1)
        if progress < 0.3:
            factor = 0.04 + 0.96 * (1 - math.cos(math.pi * progress / 0.3)) / 2
        else:
            factor = 1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi * (progress - 0.3) / 0.7)) / 2
        rates.append(peak * factor)
    return rates


# Optimiser and schedule


@pytest.mark.slow
def test_every_phase_has_a_cycle_of_its_own_length():
    steps = [PruneWeights(amount=0.5, finetune_epochs=2), ShareWeights(k=4, finetune_epochs=1), Encode()]
    rates = Rates()
    # One epoch before the first phase and one after the last.
    fit(baseline(steps, dense_epochs=1, lr_scheduler=OneCycle), epochs=5, callbacks=[rates])
    assert rates.rates[0] == pytest.approx(one_cycle(3))
    assert rates.rates[1] + rates.rates[2] == pytest.approx(one_cycle(6))
    assert rates.rates[3] == pytest.approx(one_cycle(3))
    assert rates.rates[4] == pytest.approx(one_cycle(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [PruneWeights(amount=0.5, finetune_epochs=2), LowRank(rank=2, finetune_epochs=2)], ids=repr
)
def test_without_restart_one_cycle_goes_on(step):
    rates = Rates()
    fit(baseline([step], dense_epochs=1, lr_scheduler=OneCycle, restart=False), callbacks=[rates])
    assert [rate for epoch in rates.rates.values() for rate in epoch] == pytest.approx(one_cycle(12))


@pytest.mark.slow
def test_accumulated_batches_count_as_one_step_of_the_cycle():
    rates = Rates()
    module = baseline([PruneWeights(amount=0.5, finetune_epochs=2)], dense_epochs=1, lr_scheduler=OneCycle)
    fit(module, epochs=3, callbacks=[rates], accumulate_grad_batches=2)
    # Three batches are two steps.
    assert rates.rates[0] == pytest.approx(one_cycle(2))
    assert rates.rates[1] + rates.rates[2] == pytest.approx(one_cycle(4))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [sgd, partial(AdamW, lr=0.01)])
@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize(
    "step",
    [
        PruneUnits(amount=0.5, unit="channel", finetune_epochs=2),
        LowRank(rank=2, finetune_epochs=2),
        ShareWeights(k=4, finetune_epochs=2),
        Quantize(weight_bits=4, estimator="lsq", finetune_epochs=2),
        LearnMask(Movement(0.5), finetune_epochs=2),
    ],
    ids=repr,
)
def test_the_optimiser_trains_exactly_what_there_is_now(step, restart, optimizer):
    before, moved = {}, []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            held = [id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
            assert held == [id(parameter) for parameter in pl_module.student.parameters()]
            before.update({name: p.detach().clone() for name, p in pl_module.student.named_parameters()})

        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.current_epoch >= 1:
                moved.append(
                    {n: float((p != before[n]).float().mean()) for n, p in pl_module.student.named_parameters()}
                )

    fit(
        baseline([step], dense_epochs=1, restart=restart, optimizer=optimizer, network=partial(TinyNet, 3)),
        epochs=3,
        callbacks=[Look()],
    )
    assert len(moved) == 6
    names = moved[0].keys()
    assert all(any(step_[name] > 0.5 for step_ in moved) for name in names), moved


# Penalties


@pytest.mark.slow
def test_a_penalty_is_as_if_it_stood_in_the_loss():
    """Under accumulation, clipping and weight decay, against a loop that has it there."""
    steps = [Regularise(penalty="l1", weight=0.01, finetune_epochs=2)]
    trainer = fit(
        baseline(steps, network=partial(TinyNet, 3)), epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.5
    )
    module = trainer.lightning_module
    torch.manual_seed(0)
    network = TinyNet(3)
    optimizer = sgd(network.parameters())
    data = TinyDataModule()
    data.setup("fit")
    loader = data.train_dataloader()
    paths = [name for name, p in network.named_parameters() if p.dim() > 1]
    penalties = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        for pair in (batches[:2], batches[2:]):
            optimizer.zero_grad()
            # Lightning divides by two also where an epoch ends after one batch.
            losses = [F.cross_entropy(network(batch.input), batch.target) / 2 for batch in pair]
            penalty = 0.01 * sum(network.get_parameter(path).abs().sum() for path in paths)
            (sum(losses) + penalty).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
            penalties.append((epoch, float(penalty)))
    for name, value in network.state_dict().items():
        assert torch.allclose(value.float(), module.student.state_dict()[name].float(), rtol=1e-4, atol=1e-6), name
    assert l1(network, paths) > 0
    logged = float(trainer.callback_metrics["train/penalty"])
    assert logged == pytest.approx(sum(value for epoch, value in penalties if epoch == 1) / 2, rel=1e-4)


# The best checkpoint


def better_dense(**options):
    steps = [PruneWeights(amount=0.95, finetune_epochs=3)]
    return baseline(steps, dense_epochs=5, network=partial(TinyNet, 3), lr_scheduler=None, **options)


class Scores(Callback):
    def __init__(self):
        self.scores = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.scores.append(float(trainer.callback_metrics["val/accuracy"]))


@pytest.mark.slow
@pytest.mark.parametrize("top", [1, 3, -1])
def test_the_best_checkpoint_is_no_dense_epoch(tmp_path, top):
    scores = Scores()
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val/accuracy", mode="max", save_top_k=top)
    module = better_dense()
    trainer = fit(module, epochs=8, callbacks=[kept, scores], enable_checkpointing=True)
    assert len(scores.scores) == 8
    assert max(scores.scores[:5]) > max(scores.scores[5:])
    best = 5 + scores.scores[5:].index(max(scores.scores[5:]))
    assert kept.best_model_path == str(tmp_path / f"epoch={best}.ckpt")
    assert kept.best_model_score == max(scores.scores[5:])
    inputs = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        last = module.eval()(inputs)
    own = load_compressed(tmp_path / "compressed.ckpt", TinyNet(3))
    assert torch.equal(own(inputs), last)
    (tested,) = trainer.test(module, datamodule=TinyDataModule(), ckpt_path="best", verbose=False)
    (validated,) = trainer.validate(module, datamodule=TinyDataModule(), ckpt_path=kept.best_model_path, verbose=False)
    assert validated["val/accuracy"] == pytest.approx(max(scores.scores[5:]))
    assert 0 <= tested["test/accuracy"] <= 1
    masks = module.callback.compressor.masks
    state = torch.load(kept.best_model_path, weights_only=True)["state_dict"]
    assert not any(state[f"student.{path}"][~keeps].any() for path, keeps in masks.kept.items())


@pytest.mark.slow
def test_an_epoch_of_a_schedule_that_still_prunes_is_not_the_best_either(tmp_path):
    steps = [PruneWeights(amount=0.95, schedule=Cubic(end=0.75), finetune_epochs=4)]
    module = baseline(steps, dense_epochs=3, network=partial(TinyNet, 3))
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val/accuracy", mode="max")
    scores = Scores()
    fit(module, epochs=7, callbacks=[kept, scores], enable_checkpointing=True)
    # The last update is the ninth of twelve steps, in the third of the four epochs.
    assert max(scores.scores[:5]) > max(scores.scores[5:])
    assert kept.best_model_path in (str(tmp_path / "epoch=5.ckpt"), str(tmp_path / "epoch=6.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps",
    [
        [PruneWeights(amount=0.9, at="end")],
        [PruneUnits(amount=0.5, unit="channel", at="end"), Encode()],
        [Quantize(weight_bits=2, at="end")],
        [PruneWeights(amount=0.5, finetune_epochs=1), ShareWeights(k=2)],
    ],
    ids=repr,
)
def test_what_is_done_at_the_end_is_the_best(tmp_path, steps):
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val/accuracy", mode="max")
    trainer = fit(
        baseline(steps, dense_epochs=2), epochs=3 if steps[0].finetune_epochs else 2, callbacks=[kept],
        enable_checkpointing=True,
    )  # fmt: skip
    assert kept.best_model_path == str(tmp_path / "compressed.ckpt")
    module = trainer.lightning_module
    expected = weights_of(module.student)
    trainer.test(module, datamodule=TinyDataModule(), ckpt_path="best", verbose=False)
    assert_same(expected, weights_of(module.student))


@pytest.mark.slow
def test_encoding_alone_keeps_the_best_epoch(tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val/accuracy", mode="max")
    steps = [PruneWeights(amount=0.5, finetune_epochs=2), Encode()]
    fit(baseline(steps, dense_epochs=1), epochs=3, callbacks=[kept], enable_checkpointing=True)
    assert kept.best_model_path in (str(tmp_path / "epoch=1.ckpt"), str(tmp_path / "epoch=2.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(("monitor", "mode"), [("val/accuracy", "max"), ("val/nll", "min")])
def test_early_stopping_does_not_compare_with_the_dense_network(monitor, mode):
    scores = Scores()
    stop = EarlyStopping(monitor, mode=mode, patience=5)
    # Five dense epochs and six of another network, none of which is as good.
    module = baseline([PruneWeights(amount=0.95, finetune_epochs=6)], dense_epochs=5, network=partial(TinyNet, 3))
    fit(module, epochs=11, callbacks=[stop, scores])
    assert max(scores.scores[:5]) > max(scores.scores[5:])
    assert len(scores.scores) == 11
    assert module.callback.compressor.masks.pruned


# Reloading


@pytest.mark.slow
def test_a_checkpoint_opens_without_any_argument(tmp_path, elsewhere):
    steps = [
        PruneUnits(amount=0.5, unit="channel", finetune_epochs=1),
        PruneWeights(amount=0.5, finetune_epochs=1),
        Quantize(weight_bits=4, act_bits=8, finetune_epochs=1),
        Encode("deflate"),
    ]
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    # Another interval, so that Lightning can tell the two apart.
    light = ModelCheckpoint(tmp_path, filename="light-{epoch}", every_n_epochs=2, save_top_k=-1, save_weights_only=True)
    module = baseline(steps, dense_epochs=1, teacher="dense")
    fit(module, callbacks=[kept, light], enable_checkpointing=True)
    inputs = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        expected = module.eval()(inputs)
    torch.save(inputs, tmp_path / "inputs.pt")
    elsewhere(reload, tmp_path)
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    for name in ("compressed.ckpt", "epoch=3.ckpt", "light-epoch=3.ckpt"):
        assert torch.equal(outputs[name], expected), name
    assert torch.equal(outputs["module"], expected)
    assert torch.equal(outputs["dense"], module.teachers.ensemble.logits(inputs)[0])
    # Its steps stand in it as plain values.
    given = torch.load(tmp_path / "compressed.ckpt", weights_only=True)["hyper_parameters"]["steps"]
    assert given[0]["class_path"].endswith(".PruneUnits")
    loaded = CompressionBaseline.load_from_checkpoint(tmp_path / "compressed.ckpt", teacher="none")
    assert [plain(step) for step in loaded.callback.steps] == given == [plain(step) for step in steps]
    # The first epoch was that of the dense network, which fits what is compressed by now, too.
    tiny_trainer().validate(
        module, datamodule=TinyDataModule(), ckpt_path=str(tmp_path / "epoch=0.ckpt"), verbose=False
    )
    assert module.student.features[0].weight.shape == (2, 1, 3, 3)


@torch.no_grad()
def reload(folder):
    torch.set_num_threads(1)
    inputs = torch.load(folder / "inputs.pt", weights_only=True)
    names = ("compressed.ckpt", "epoch=3.ckpt", "light-epoch=3.ckpt")
    outputs = {name: load_compressed(folder / name)(inputs) for name in names}
    module = CompressionBaseline.load_from_checkpoint(folder / "compressed.ckpt")
    outputs["module"] = module.eval()(inputs)
    outputs["dense"] = module.teachers.ensemble.logits(inputs)[0]
    torch.save(outputs, folder / "outputs.pt")


@pytest.mark.slow
def test_a_checkpoint_builds_given_teachers_again(tmp_path):
    teachers = [SmallCNN(3, width=2), SmallCNN(3, width=3)]
    module = baseline([PruneWeights(amount=0.5)], teacher=TeacherEnsemble(teachers, weights=[1, 3]), temperature=2.0)
    trainer = fit(module)
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    with pytest.warns(UserWarning, match="teachers: the weights are not those that this checkpoint was trained with"):
        loaded = CompressionBaseline.load_from_checkpoint(tmp_path / "module.ckpt")
    assert [teacher.head.in_features for teacher in loaded.teachers] == [8, 12]
    assert_same(weights_of(module.student), weights_of(loaded.student))
    given = CompressionBaseline.load_from_checkpoint(tmp_path / "module.ckpt", teacher=teachers)
    assert_same(weights_of(given.teachers.ensemble), weights_of(TeacherEnsemble(teachers)))


@pytest.mark.slow
def test_an_ordinary_modules_checkpoint_holds_nothing_of_compression(tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="{epoch}")
    torch.manual_seed(0)
    fit(SupervisedModule(tiny_cnn(), num_classes=3, optimizer=sgd), callbacks=[kept], enable_checkpointing=True)
    assert "compression" not in torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)


# The loss


def test_the_loss_is_the_labels_and_the_teachers():
    teachers = [TinyNet(3) for _ in range(2)]
    module = baseline([], network=partial(TinyNet, 3), teacher=teachers, temperature=3.0, hard_label_weight=0.3)
    data = TinyDataModule()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    terms = module.eval().terms(batch)
    logits = module.student(batch.input)
    probs = torch.stack([F.softmax(teacher(batch.input) / 3, dim=1) for teacher in teachers]).mean(0)
    own = F.log_softmax(logits / 3, dim=1)
    expected = 9 * (probs * (probs.log() - own)).sum(1).mean()
    assert torch.allclose(terms["kd"], expected, rtol=1e-4)
    assert torch.equal(terms["ce"], F.cross_entropy(logits, batch.target))
    assert module.weights() == {"ce": 0.3, "kd": 0.7}


@pytest.mark.slow
def test_the_dense_network_teaches_from_the_first_step_on():
    """Its weights are those at the end of the dense epochs, and they never move."""
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            known = None if not pl_module.teachers else weights_of(next(iter(pl_module.teachers)))
            seen.append((weights_of(pl_module.student), known))

    trainer = fit(
        baseline([PruneWeights(amount=0.6, finetune_epochs=2)], dense_epochs=1, teacher="dense"),
        epochs=3,
        callbacks=[Look()],
    )
    module = trainer.lightning_module
    assert [teacher is not None for _, teacher in seen] == [False] * 3 + [True] * 6
    for _, teacher in seen[3:]:
        assert_same(teacher, weights_of(next(iter(module.teachers))))
    plain = baseline([], seed=0)
    fit(plain, epochs=1)
    trained = {name: value for name, value in weights_of(plain.student).items() if "running" not in name}
    assert_same(trained, {name: weights_of(next(iter(module.teachers)))[name] for name in trained})
    assert {"train/ce", "train/kd", "val/agreement"} <= trainer.callback_metrics.keys()


@pytest.mark.slow
def test_given_teachers_are_those_of_kd():
    torch.manual_seed(3)
    teachers = [TinyNet(3) for _ in range(2)]
    own = baseline([], network=partial(TinyNet, 3), teacher=TeacherEnsemble(copy.deepcopy(teachers)), temperature=2.0)
    torch.manual_seed(0)
    kd = KDModule(TinyNet(3), TeacherEnsemble(teachers), num_classes=3, temperature=2.0, optimizer=sgd)
    kd.hard_label_weight = 0.5
    fit(own)
    fit(kd)
    assert_same(weights_of(own.student), weights_of(kd.student))


# What is measured


@pytest.mark.slow
def test_the_rows_of_a_report_are_recomputed():
    steps = [
        PruneUnits(amount=0.5, unit="channel", finetune_epochs=1),
        PruneWeights(amount=0.5, targets="Conv2d", finetune_epochs=1),
        Encode("deflate"),
    ]
    module = baseline(steps, dense_epochs=1, report=Measurements(batch_sizes=()))
    networks = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            networks.append(copy.deepcopy(pl_module.student))

    trainer = fit(module, epochs=3, callbacks=[Look()])
    stages = module.callback.stages
    names = [
        "dense",
        "1 PruneUnits channel, before fine-tuning",
        "1 PruneUnits channel",
        "2 PruneWeights, before fine-tuning",
    ]
    assert [stage.name for stage in stages] == [*names, "2 PruneWeights", "3 Encode deflate", "final"]
    assert [stage.kind for stage in stages] == ["dense", "before", "after", "before", "after", "after", "after"]
    dense, before, after, masked, final = (stages[n] for n in (0, 1, 2, 3, -1))
    assert dense.parameters == sum(p.numel() for p in tiny_cnn().parameters())
    # Convolutions of 2, 4 and 8 channels on 8x8, 4x4 and 2x2 pixels, each with 3x3 weights, and the last layer.
    assert dense.macs == 64 * 9 * 1 * 2 + 16 * 9 * 2 * 4 + 4 * 9 * 4 * 8 + 8 * 3
    one, two, three = (layer.out_channels for layer in module.student.features if isinstance(layer, nn.Conv2d))
    assert one + two + three == 7
    small = 64 * 9 * one + 16 * 9 * one * two + 4 * 9 * two * three + three * 3
    parameters = 9 * (one + one * two + two * three) + 2 * 7 + 3 * three + 3
    for stage in (before, after, masked, final):
        assert (stage.parameters, stage.macs) == (parameters, small)
    nonzero = sum(int(p.count_nonzero()) for p in module.student.parameters())
    pruned = round(0.5 * 9 * (one + one * two + two * three))
    assert final.nonzero == nonzero == parameters - pruned
    weights = [layer.weight for layer in module.student.features if isinstance(layer, nn.Conv2d)]
    pixels = [64, 16, 4]
    effective = sum(int(w.count_nonzero()) * n for w, n in zip(weights, pixels, strict=True)) + 3 * three
    assert final.effective_macs == effective
    (tested,) = trainer.test(module, datamodule=TinyDataModule(), verbose=False)
    assert final.scores["accuracy"] == tested["test/accuracy"]
    assert final.scores["nll"] == pytest.approx(tested["test/nll"], rel=1e-6)
    assert set(final.differences.values()) == {0.0}


@pytest.mark.slow
def test_the_bytes_of_a_report_are_sizes_of_files(tmp_path):
    module = baseline(
        [PruneWeights(amount=0.5, finetune_epochs=1), Encode("huffman")], report=Measurements(batch_sizes=())
    )
    fit(module, epochs=1)
    final = module.callback.stages[-1]
    assert module.callback.compressor.write(tmp_path / "network.dlpk") == final.nbytes["artefact"]
    assert (tmp_path / "network.dlpk").stat().st_size == final.nbytes["artefact"]
    torch.save(module.student.state_dict(), tmp_path / "state.pt")
    assert abs((tmp_path / "state.pt").stat().st_size - final.nbytes["state_dict"]) <= 1024


class Dropping(TinyNet):
    """Draws random numbers in training, and so notices whoever draws some."""

    def forward(self, images):
        return super().forward(F.dropout(images, 0.1, self.training))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["test", "val"])
def test_measuring_does_not_touch_the_training(split):
    def steps():
        return [PruneUnits(amount=0.5, unit="channel", finetune_epochs=1), Quantize(weight_bits=4, finetune_epochs=1)]

    options = {"network": partial(Dropping, 3), "dense_epochs": 1, "lr_scheduler": OneCycle}
    silent = baseline(steps(), **options)
    told = baseline(steps(), **options, report=Measurements(split=split, batch_sizes=(1,), rounds=50))
    torch.manual_seed(0)
    silent_trainer = fit(silent)
    torch.manual_seed(0)
    told_trainer = fit(told)
    assert_same(weights_of(silent.student), weights_of(told.student))
    for name, value in silent_trainer.callback_metrics.items():
        assert torch.equal(value, told_trainer.callback_metrics[name]), name
    assert [row.batch for row in told.callback.stages[-1].latency] == [1]


@pytest.mark.lightning(since=(2, 5))
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_stages_survive_a_resume(tmp_path):
    def make(seed):
        steps = [PruneWeights(amount=0.5, finetune_epochs=2), Encode()]
        return baseline(steps, seed=seed, dense_epochs=1, report=Measurements(batch_sizes=()))

    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    whole, resumed = make(0), make(9)
    fit(whole, epochs=3, callbacks=[kept], enable_checkpointing=True)
    trainer = tiny_trainer(max_epochs=3, callbacks=[copy.deepcopy(kept)], enable_checkpointing=True)
    trainer.fit(resumed, datamodule=TinyDataModule(), ckpt_path=str(tmp_path / "step=5.ckpt"))
    assert whole.callback.stages
    assert [stage.as_plain() for stage in resumed.callback.stages] == [
        stage.as_plain() for stage in whole.callback.stages
    ]
    report = resumed.callback.report()
    written = {path.name: path for path in report.write(tmp_path / "report")}
    assert json.loads(written["report.json"].read_text())


def test_a_report_without_measurements_is_refused():
    module = baseline([PruneWeights(amount=0.5)])
    with pytest.raises(InputError, match="nothing was measured: give CompressionCallback report=Measurements"):
        module.callback.report()


# What cannot be


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"steps": [Quantize(finetune_epochs=1), PruneWeights(amount=0.5)]},
            "step 2 .PruneWeights. cannot come after step 1",
        ),
        (
            {"steps": [PruneWeights(amount=0.5, finetune_epochs=1), LowRank(rank=2)]},
            "LowRank.* cannot come after step 1",
        ),
        ({"steps": [Encode(), PruneWeights(amount=0.5)]}, "encoding comes last"),
        (
            {"steps": [PruneWeights(amount=0.5, at=3, finetune_epochs=2)]},
            "lasts from epoch 3 to 5.* train for 5 epochs",
        ),
        ({"steps": [PruneWeights(amount=0.5, at=9)]}, "lasts from epoch 9 to 9, and the training ends at 4"),
        (
            {"steps": [PruneWeights(amount=0.5, finetune_epochs=2), Quantize(at=1)]},
            "begins at epoch 1, and step 1 .* ends at 2",
        ),
        (
            {"steps": [PruneWeights(amount=0.5, schedule=Cubic())]},
            "prunes while the network trains: give it finetune_epochs",
        ),
        ({"steps": [Quantize(mode="qat")]}, "trains the network with its quantizers: give it finetune_epochs"),
        (
            {"steps": [PruneWeights(amount=0.5)], "dense_epochs": 5},
            "dense_epochs=5 of 4 epochs: train for more",
        ),
        ({"steps": [PruneWeights(amount=0.5, targets="nowhere")]}, "targets 'nowhere' matches none of SmallCNN's"),
        ({"steps": [PruneWeights(amount=0.5, exclude="nowhere")]}, "exclude 'nowhere' matches none of SmallCNN's"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as refusal:
        fit(baseline(**options))
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0, "teacher": "dense"}, "temperature must be positive"),
        ({"hard_label_weight": 1.5, "teacher": "dense"}, r"hard_label_weight must be in \[0, 1\]"),
        ({"teacher": "nobody"}, "teacher must be 'none', 'dense' or networks, got 'nobody'"),
        ({"temperature": 2.0}, "temperature=.* would do nothing without a teacher"),
        ({"calibration_batches": 0}, "calibration_batches must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        baseline([], **options)


def test_nothing_is_trained_after_the_end():
    with pytest.raises(InputError, match="nothing is trained after at='end': leave finetune_epochs out"):
        PruneWeights(amount=0.5, at="end", finetune_epochs=1)


@pytest.mark.slow
def test_what_a_trainer_cannot_do_is_refused():
    steps = [PruneWeights(amount=0.5, finetune_epochs=1)]
    module = baseline(steps)
    with pytest.raises(InputError, match="compression needs the number of epochs: give the Trainer max_epochs"):
        tiny_trainer(max_epochs=-1, max_steps=3).fit(module, datamodule=TinyDataModule())
    torch.manual_seed(0)
    plain = SupervisedModule(TinyNet(3), num_classes=3, optimizer=sgd)
    with pytest.raises(InputError, match="SupervisedModule has no network 'network' to compress: give attribute="):
        fit(plain, callbacks=[CompressionCallback(steps, attribute="network")])
    compiled = SupervisedModule(TinyNet(3), num_classes=3, optimizer=sgd, compile=True)
    with pytest.raises(InputError, match="cannot be compressed while it is compiled: leave compile out"):
        fit(compiled, callbacks=[CompressionCallback(steps)])
    told = baseline(steps, report=Measurements())
    data = TinyDataModule()
    data.setup("fit")
    with pytest.raises(InputError, match="test samples needs a data module: give one, or split='val'"):
        tiny_trainer().fit(told, data.train_dataloader(), data.val_dataloader())


@pytest.mark.slow
def test_channels_that_leave_at_once_are_chosen_once():
    """Once more at the first update, half of the half went, too."""
    module = baseline([PruneUnits(amount=0.5, unit="channel", scope="layer", finetune_epochs=2)], network=tiny_cnn)
    fit(module, epochs=2)
    assert [layer.out_channels for layer in module.student.features if isinstance(layer, nn.Conv2d)] == [1, 2, 4]


@pytest.mark.slow
def test_the_networks_docs_name_what_writes_a_quantized_one(tmp_path):
    """PyTorch pickles no parametrized layer; a copy of plain weights can be."""
    module = baseline([Quantize(weight_bits=4)], dense_epochs=1)
    fit(module, epochs=1)
    plain = plain_copy(module.student)
    torch.save(plain, tmp_path / "plain.pt")
    inputs = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        again = torch.load(tmp_path / "plain.pt", weights_only=False)
        assert torch.equal(again(inputs), module.student.eval()(inputs))


@pytest.mark.slow
def test_a_schedule_after_the_last_step_begins_anew():
    """Its length is not that of the last phase and of what follows."""
    rates = Rates()
    module = baseline([PruneWeights(amount=0.5, finetune_epochs=2)], dense_epochs=1, lr_scheduler=OneCycle)
    fit(module, epochs=5, callbacks=[rates])
    assert rates.rates[1] + rates.rates[2] == pytest.approx(one_cycle(6))
    assert rates.rates[3] + rates.rates[4] == pytest.approx(one_cycle(6))


@pytest.mark.slow
def test_a_checkpoint_holds_the_weights_of_a_pretrained_network(tmp_path):
    """The file that it began with may be gone."""
    write_weights(SmallResNet(3, width=2), tmp_path / "begin.safetensors")
    network = Pretrained(SmallResNet(3, width=2), tmp_path / "begin.safetensors")
    module = CompressionBaseline(network, num_classes=3, steps=[PruneWeights(amount=0.5, finetune_epochs=1)])
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(module, datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "begin.safetensors").unlink()
    loaded = CompressionBaseline.load_from_checkpoint(tmp_path / "last.ckpt")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())
