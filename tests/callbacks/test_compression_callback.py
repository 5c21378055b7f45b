"""Compression inside a Lightning training: masks, averages, resuming, and every method that can be compressed."""

import copy
import itertools
import pickle
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning import callbacks as lightning_callbacks
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW

from distill_lightning import (
    CompressionBaseline,
    ExtracurricularModule,
    FEEDModule,
    FixedDiscriminator,
    KDModule,
    MEALV2Module,
    MixupSampler,
    OneCycle,
    SelfKDModule,
    SupervisedModule,
)
from distill_lightning.callbacks import CompressionCallback, Measurements
from distill_lightning.compression import (
    L0,
    Cubic,
    Encode,
    HashShare,
    Iterative,
    LearnMask,
    LowRank,
    Movement,
    OneShot,
    PruneUnits,
    PruneWeights,
    Quantize,
    Regularise,
    ShareWeights,
    SoftMovement,
    load_compressed,
)
from distill_lightning.errors import InputError
from distill_lightning.lightning_internals import refuse_reshaping
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

# A run can be resumed without the callbacks that have written its checkpoints.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    # Some train on after the last step.
    pytest.mark.filterwarnings("ignore:the last step of the compression is over"),
]

sgd = partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)


def supervised(seed=0, **options):
    torch.manual_seed(seed)
    return SupervisedModule(TinyNet(3), num_classes=3, **{"optimizer": sgd, **options})


def baseline(steps, seed=0, network=TinyNet, **options):
    torch.manual_seed(seed)
    return CompressionBaseline(network(3), num_classes=3, steps=steps, **{"optimizer": sgd, "seed": 5, **options})


def fit(module, *, epochs=4, data=None, ckpt_path=None, **options):
    trainer = tiny_trainer(max_epochs=epochs, **options)
    trainer.fit(module, datamodule=data or TinyDataModule(), ckpt_path=ckpt_path)
    return trainer


def weights_of(network):
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert not different


def under_masks(compressor, values):
    """All entries of tensors by path that the masks prune, in one vector."""
    return torch.cat([values[path][~kept] for path, kept in compressor.masks.kept.items()])


class Seen(Callback):
    """Calls a function before every batch, which is after everything that belongs to the one before."""

    def __init__(self, look):
        self.look = look

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.look(trainer, pl_module)


# Masks


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [sgd, partial(Adam, lr=0.01, weight_decay=1e-2), partial(AdamW, lr=0.01)])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}]
)
@pytest.mark.parametrize("schedule", [OneShot(), Cubic(end=0.5)])
def test_pruned_weights_stay_zero_and_so_does_what_the_optimiser_remembers(optimizer, options, schedule):
    step = PruneWeights(amount=0.6, schedule=schedule, finetune_epochs=3)
    # The momentum of the dense epoch must not come back, either.
    module = baseline([step], dense_epochs=1, optimizer=optimizer, restart=False)
    looked = []

    def look(trainer, pl_module):
        compressor = module.callback.compressor
        if not compressor.masks.kept:
            return
        parameters = dict(compressor.network.named_parameters())
        looked.append(int((under_masks(compressor, parameters) != 0).sum()))
        for path, kept in compressor.masks.kept.items():
            state = trainer.optimizers[0].state[parameters[path]]
            moments = [value for value in state.values() if value.shape == kept.shape]
            assert moments or not state
            looked.extend(int((moment[~kept] != 0).sum()) for moment in moments)

    kept = {}
    hold = Seen(lambda trainer, pl_module: kept.update(weights_of(module.student)) if trainer.current_epoch == 3 else 0)
    fit(module, callbacks=[Seen(look), hold], **options)
    assert len(looked) > 10
    assert not any(looked)
    masks = module.callback.compressor.masks
    assert masks.pruned == round(0.6 * masks.total)
    final = weights_of(module.student)
    assert not under_masks(module.callback.compressor, final).any()
    if "accumulate_grad_batches" not in options:
        for path, mask in masks.kept.items():
            # The weights that stay have moved in the last epoch, and none of them is zero.
            assert final[path][mask].all()
            assert (final[path] != kept[path])[mask].float().mean() > 0.9


EMAWeightAveraging = getattr(lightning_callbacks, "EMAWeightAveraging", None)
WeightAveraging = getattr(lightning_callbacks, "WeightAveraging", None)
SINCE_26 = pytest.mark.lightning(since=(2, 6))
AVERAGES = [
    pytest.param(EMAWeightAveraging, marks=SINCE_26),
    partial(StochasticWeightAveraging, swa_lrs=0.01),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "averaging",
    [
        pytest.param(lambda: EMAWeightAveraging(decay=0.9), marks=SINCE_26),
        pytest.param(WeightAveraging, marks=SINCE_26),
        partial(StochasticWeightAveraging, swa_lrs=0.01, swa_epoch_start=1),
    ],
)
def test_averaged_weights_are_pruned_too(tmp_path, averaging):
    validated = []

    class Look(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            compressor = module.callback.compressor
            if compressor.masks.kept:
                validated.append(int(under_masks(compressor, weights_of(module.student)).count_nonzero()))

    # The average begins among dense weights.
    module = baseline([PruneWeights(amount=0.6, finetune_epochs=2)], dense_epochs=2)
    callbacks = [averaging(), Look(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)]
    plain = supervised()
    fit(module, callbacks=callbacks, enable_checkpointing=True)
    compressor = module.callback.compressor
    assert validated
    assert not any(validated)
    assert not under_masks(compressor, weights_of(module.student)).any()
    fit(plain, callbacks=[averaging()])
    assert not torch.equal(plain.student.head.weight, module.student.head.weight)
    state = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)["state_dict"]
    assert not under_masks(compressor, {name.removeprefix("student."): value for name, value in state.items()}).any()


@pytest.mark.slow
@pytest.mark.parametrize("averaging", AVERAGES)
@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_the_callbacks_does_not_matter(averaging, first):
    module, callback = supervised(), CompressionCallback([PruneWeights(amount=0.6, finetune_epochs=2)], dense_epochs=2)
    callbacks = [callback, averaging()]
    fit(module, callbacks=callbacks if first else callbacks[::-1])
    assert callback.compressor.masks.pruned == round(0.6 * callback.compressor.masks.total)
    assert not under_masks(callback.compressor, weights_of(module.student)).any()


@pytest.mark.slow
@pytest.mark.parametrize("averaging", AVERAGES)
@pytest.mark.parametrize(
    "steps",
    [
        [PruneUnits(amount=0.5, unit="channel", finetune_epochs=1)],
        [LowRank(rank=2, finetune_epochs=1)],
        [ShareWeights(k=4, finetune_epochs=1)],
        [Quantize(weight_bits=4, finetune_epochs=1)],
        [LearnMask(Movement(0.5), finetune_epochs=1)],
        [LearnMask(L0(1e-3), finetune_epochs=1)],
    ],
    ids=lambda steps: steps[0].title,
)
def test_averages_of_other_parameters_are_refused_before_the_training(averaging, steps):
    module, began = baseline(steps, dense_epochs=1), []
    with pytest.raises(InputError, match="keeps no average: leave one of them out"):
        fit(module, callbacks=[averaging(), Seen(lambda *_: began.append(1))])
    assert not began


@pytest.mark.slow
@pytest.mark.parametrize("averaging", AVERAGES)
def test_a_teacher_that_comes_later_is_no_part_of_averages(averaging):
    """The dense network stands beside the module, so an average of what learns can go on."""
    module = baseline([PruneWeights(amount=0.5, finetune_epochs=1)], dense_epochs=1, teacher="dense")
    trainer = fit(module, callbacks=[averaging()])
    assert len(module.teachers) == 1
    assert not any("teachers" in name for name in module.state_dict())
    assert {"train/ce", "train/kd"} <= trainer.callback_metrics.keys()


# Resuming

STEPS = {
    "masks": lambda: [PruneWeights(amount=0.6, schedule=Cubic(), finetune_epochs=3)],
    "lottery": lambda: [PruneWeights(amount=0.6, schedule=Iterative(2), rewind="start", finetune_epochs=3)],
    "channels": lambda: [PruneUnits(amount=0.5, unit="channel", finetune_epochs=3)],
    "masked channels": lambda: [PruneUnits(amount=0.5, unit="channel", schedule=Cubic(), finetune_epochs=3)],
    "low rank": lambda: [LowRank(rank=2, finetune_epochs=3)],
    "shared": lambda: [ShareWeights(k=4, finetune_epochs=3)],
    "hashed": lambda: [HashShare(ratio=4, finetune_epochs=3)],
    "qat": lambda: [Quantize(weight_bits=4, act_bits=4, mode="qat", estimator="lsq", finetune_epochs=3)],
    "movement": lambda: [LearnMask(Movement(0.6), finetune_epochs=3)],
    "soft movement": lambda: [LearnMask(SoftMovement(), finetune_epochs=3)],
    "lasso": lambda: [
        Regularise(penalty="group_lasso", granularity="channel", weight=1e-2, threshold=0.05, finetune_epochs=3)
    ],
    "chain": lambda: [
        PruneUnits(amount=0.5, unit="channel", finetune_epochs=1),
        PruneWeights(amount=0.5, finetune_epochs=1),
        ShareWeights(k=4, finetune_epochs=1),
        Encode("huffman"),
    ],
}
"""Kinds of phases. Not among them: L0's random gates, which like dropout draw from random states that Lightning does
not put into checkpoints."""


def resumable(kind, seed=0):
    # One more epoch than the phases have: training without a phase can be interrupted, too.
    return baseline(STEPS[kind](), seed=seed, dense_epochs=1, lr_scheduler=OneCycle)


def uninterrupted(kind, folder):
    module = resumable(kind)
    middles = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    ends = ModelCheckpoint(folder, filename="end-{epoch}", save_top_k=-1)
    fit(module, epochs=5, callbacks=[middles, ends], enable_checkpointing=True)
    return module


def resumed(kind, path):
    # Other weights: everything that matters must come from the checkpoint.
    module = resumable(kind, seed=9)
    fit(module, epochs=5, ckpt_path=str(path))
    return weights_of(module.student)


@pytest.mark.lightning(since=(2, 5))
@pytest.mark.slow
@pytest.mark.parametrize("kind", STEPS)
def test_a_resumed_run_ends_bit_for_bit_like_the_uninterrupted_one(tmp_path, kind):
    whole = uninterrupted(kind, tmp_path)
    # Steps 6 and 12 are the last ones of their epochs, of which Lightning begins the next ones silently.
    names = ["step=2", "end-epoch=0", "step=4", "step=6", "end-epoch=2", "step=10", "step=12", "end-epoch=3", "step=14"]
    for name in names if kind in ("masks", "chain", "qat") else ["end-epoch=0", "step=8", "step=12", "step=14"]:
        assert_same(weights_of(whole.student), resumed(kind, tmp_path / f"{name}.ckpt"))


def resume_all(folder):
    torch.set_num_threads(1)
    ends = {}
    for kind in STEPS:
        for name in ("end-epoch=1", "step=8"):
            ends[f"{kind}, {name}"] = resumed(kind, folder / kind / f"{name}.ckpt")
        own = load_compressed(folder / kind / "compressed.ckpt", TinyNet(3))
        ends[f"{kind}, output"] = {"output": own(torch.ones(2, 1, 8, 8)).detach()}
    torch.save(ends, folder / "ends.pt")


@pytest.mark.lightning(since=(2, 5))
@pytest.mark.slow
def test_a_fresh_process_resumes_and_reloads_bit_for_bit(tmp_path, elsewhere):
    whole = {kind: uninterrupted(kind, tmp_path / kind) for kind in STEPS}
    elsewhere(resume_all, tmp_path)
    ends = torch.load(tmp_path / "ends.pt", weights_only=True)
    for kind, module in whole.items():
        assert_same(weights_of(module.student), ends[f"{kind}, end-epoch=1"])
        assert_same(weights_of(module.student), ends[f"{kind}, step=8"])
        with torch.no_grad():
            output = module.student.eval()(torch.ones(2, 1, 8, 8))
        assert torch.equal(output, ends[f"{kind}, output"]["output"])


@pytest.mark.lightning(since=(2, 5))
@pytest.mark.slow
def test_a_fit_in_the_same_process_goes_on_from_an_earlier_checkpoint(tmp_path):
    """Also into a network that was compressed since; it stays the same object."""
    module = uninterrupted("channels", tmp_path)
    network, whole = module.student, weights_of(module.student)
    for name in ("end-epoch=0", "step=8"):
        fit(module, epochs=5, ckpt_path=str(tmp_path / f"{name}.ckpt"))
        assert module.student is network
        assert_same(whole, weights_of(network))


@pytest.mark.slow
def test_other_steps_than_the_checkpoints_are_refused(tmp_path):
    uninterrupted("chain", tmp_path)
    with pytest.raises(InputError, match="made with the steps 1 PruneUnits channel, .* give the steps that"):
        fit(resumable("masks"), epochs=5, ckpt_path=str(tmp_path / "end-epoch=3.ckpt"))


# Nothing to do


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [None, OneCycle])
def test_without_steps_it_is_ordinary_training(schedule):
    plain, empty = supervised(lr_scheduler=schedule), baseline([], lr_scheduler=schedule)
    with_callback = supervised(lr_scheduler=schedule)
    fit(plain)
    fit(empty)
    fit(with_callback, callbacks=[CompressionCallback([])])
    assert_same(weights_of(plain.student), weights_of(empty.student))
    assert_same(weights_of(plain.student), weights_of(with_callback.student))


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        PruneWeights(amount=0.0, finetune_epochs=2),
        PruneWeights(amount=0.0, schedule=Cubic(), finetune_epochs=2),
        PruneUnits(amount=0.0, unit="channel", finetune_epochs=2),
        Regularise(penalty="l1", weight=0.0, finetune_epochs=2),
        LearnMask(L0(0.0), finetune_epochs=2),
        LowRank(rank=10_000, finetune_epochs=2),
        Quantize(weight_bits=None, finetune_epochs=2),
        Encode("huffman"),
    ],
    ids=repr,
)
def test_a_step_that_does_nothing_changes_nothing(step):
    step = replace(step, at=1 if step.finetune_epochs else None)
    plain, compressed = supervised(lr_scheduler=OneCycle), baseline([step], lr_scheduler=OneCycle, restart=False)
    fit(plain)
    fit(compressed)
    assert_same(weights_of(plain.student), weights_of(compressed.student))


# Other modules


def networks(count, seed=1):
    torch.manual_seed(seed)
    return [TinyNet(3) for _ in range(count)]


def compressed_by(make, steps, **options):
    torch.manual_seed(0)
    module = make(TinyNet(3))
    callback = CompressionCallback(steps, dense_epochs=1, seed=5, **options)
    fit(module, callbacks=[callback])
    return module, callback


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masks", "channels", "low rank", "qat", "chain"])
def test_the_callback_on_ordinary_training_is_the_baseline(kind):
    module, _ = compressed_by(
        lambda student: SupervisedModule(student, num_classes=3, optimizer=sgd, lr_scheduler=OneCycle), STEPS[kind]()
    )
    own = baseline(STEPS[kind](), dense_epochs=1, lr_scheduler=OneCycle)
    fit(own)
    assert_same(weights_of(module.student), weights_of(own.student))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masks", "channels"])
def test_the_callback_on_distillation_is_the_baseline_under_teachers(kind):
    module, _ = compressed_by(
        lambda student: KDModule(
            student, networks(2), num_classes=3, temperature=2.0, hard_label_weight=0.3, optimizer=sgd
        ),
        STEPS[kind](),
    )
    own = baseline(STEPS[kind](), dense_epochs=1, teacher=networks(2), temperature=2.0, hard_label_weight=0.3)
    fit(own)
    assert_same(weights_of(module.student), weights_of(own.student))


OTHERS = {
    "self_kd": lambda student: SelfKDModule(student, num_classes=3, optimizer=sgd),
    "meal": lambda student: MEALV2Module(
        student, networks(2), num_classes=3, discriminator=FixedDiscriminator(), optimizer=sgd
    ),
    "extra": lambda student: ExtracurricularModule(
        student, networks(2), num_classes=3, samplers=[MixupSampler()], optimizer=sgd
    ),
    "feed": lambda student: FEEDModule(
        student, networks(2), num_classes=3, student_layer="features", beta=10.0, input_shape=(1, 8, 8), optimizer=sgd
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["masks", "channels", "low rank", "shared"])
def test_other_methods_train_what_is_compressed(tmp_path, name, kind):
    steps = STEPS[kind]()
    if name == "feed" and kind == "channels":
        steps = [replace(steps[0], exclude="features.3")]
    moved = []

    def look(trainer, pl_module):
        moved.append(torch.cat([p.detach().flatten() for p in pl_module.student.parameters()]))

    torch.manual_seed(0)
    module = OTHERS[name](TinyNet(3))
    callbacks = [CompressionCallback(steps, dense_epochs=1), Seen(look), ModelCheckpoint(tmp_path)]
    fit(module, callbacks=callbacks, enable_checkpointing=True)
    # In each step of the phase nearly everything that is not pruned moves.
    in_phase = [values for values in moved if len(values) == len(moved[-1])][1:]
    share = 0.3 if kind == "masks" else 0.8
    assert all((now != next_).float().mean() > share for now, next_ in itertools.pairwise(in_phase))
    inputs = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_compressed(tmp_path / "compressed.ckpt", TinyNet(3))(inputs), module.eval()(inputs))


@pytest.mark.slow
def test_a_tap_whose_channels_leave_is_named():
    torch.manual_seed(0)
    steps = [PruneUnits(amount=0.5, unit="channel", finetune_epochs=1)]
    message = r"'features' gives 5 channels, and the translators read 8: .*exclude"
    with pytest.raises(InputError, match=message):
        fit(OTHERS["feed"](TinyNet(3)), callbacks=[CompressionCallback(steps, dense_epochs=1)])


# What goes otherwise than planned


class Elsewhere(LightningModule):
    """A module that knows nothing of this package."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = TinyNet(3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch.input), batch.target)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self.net(batch.input), batch.target))

    def configure_optimizers(self):
        return sgd(self.net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["channels", "chain"])
def test_a_module_from_elsewhere_is_resumed_and_validated(tmp_path, kind):
    def callbacks(*others):
        return [CompressionCallback(STEPS[kind](), attribute="net", dense_epochs=1, seed=5), *others]

    whole, resumed, fresh = Elsewhere(), Elsewhere(9), Elsewhere(9)
    # Lightning 1.9 writes a path as it is, and PyTorch reads none from a file of weights.
    kept = ModelCheckpoint(str(tmp_path), filename="{epoch}", save_top_k=-1)
    fit(whole, callbacks=callbacks(kept), enable_checkpointing=True)
    fit(resumed, callbacks=callbacks(), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert_same(weights_of(whole.net), weights_of(resumed.net))
    trainer = tiny_trainer(callbacks=callbacks())
    trainer.validate(fresh, datamodule=TinyDataModule(), ckpt_path=str(tmp_path / "compressed.ckpt"), verbose=False)
    assert_same(weights_of(whole.net), weights_of(fresh.net))
    assert "on_load_checkpoint" not in vars(fresh)


@pytest.mark.slow
@pytest.mark.parametrize("report", [None, Measurements(batch_sizes=())])
def test_a_resume_after_the_last_epoch_does_the_steps_that_are_left(tmp_path, report):
    def make(seed):
        steps = [PruneWeights(amount=0.5, finetune_epochs=2), Quantize(weight_bits=4)]
        return baseline(steps, seed=seed, report=report)

    whole, resumed = make(0), make(9)
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, epochs=2, callbacks=[kept], enable_checkpointing=True)
    fit(resumed, epochs=2, ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert not resumed.callback.compressor.waiting
    assert_same(weights_of(whole.student), weights_of(resumed.student))
    stages = [[stage.as_plain() for stage in module.callback.stages] for module in (whole, resumed)]
    assert stages[0] == stages[1]
    assert len(stages[0]) == (0 if report is None else 5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masks", "channels"])
def test_a_second_fit_of_what_is_compressed_is_refused(kind):
    module = baseline(STEPS[kind](), dense_epochs=1, report=Measurements(batch_sizes=()))
    trainer = fit(module)
    expected, stages = weights_of(module.student), list(module.callback.stages)
    with pytest.raises(InputError, match="student is compressed already: make the module anew, or .*ckpt_path"):
        fit(module)
    with pytest.raises(InputError, match="is compressed already"):
        trainer.fit(module, datamodule=TinyDataModule())
    assert_same(expected, weights_of(module.student))
    assert module.callback.stages == stages
    assert module.callback.report()


@pytest.mark.slow
def test_a_fit_that_broke_before_the_first_step_can_begin_again():
    def explode(trainer, pl_module):
        raise RuntimeError("broken")

    module = baseline(STEPS["channels"](), dense_epochs=1)
    with pytest.raises(RuntimeError, match="broken"):
        fit(module, callbacks=[Seen(explode)])
    assert "on_load_checkpoint" not in vars(module)
    assert module.callback._fit is None
    fit(module)
    assert module.student.features[0].out_channels < 4


@pytest.mark.lightning(since=(2, 0))
@pytest.mark.slow
def test_a_module_is_copied_and_pickled_while_it_is_trained():
    copies = []

    def look(trainer, pl_module):
        if trainer.current_epoch == 2 and not copies:
            copies.extend([copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))])
            assert_same(weights_of(pl_module), weights_of(copies[0]))
            assert_same(weights_of(pl_module), weights_of(copies[1]))

    fit(baseline(STEPS["channels"](), dense_epochs=1, lr_scheduler=OneCycle), callbacks=[Seen(look)])
    assert len(copies) == 2


@pytest.mark.slow
def test_a_training_that_ends_before_its_steps_says_so():
    def stop(trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 1

    steps = [PruneWeights(amount=0.5, finetune_epochs=2), ShareWeights(k=4, finetune_epochs=2)]
    module = baseline(steps, report=Measurements(batch_sizes=()))
    with pytest.warns(UserWarning, match="ended after 2 epochs: not fine-tuned were 2 ShareWeights"):
        fit(module, callbacks=[Seen(stop)])
    notes = [note for stage in module.callback.stages for note in stage.notes]
    assert sum("not fine-tuned were 2 ShareWeights" in note for note in notes) == 1
    assert not module.callback.compressor.waiting


@pytest.mark.slow
def test_early_stopping_waits_for_the_last_step():
    # A metric that never gets better.
    stop = EarlyStopping("val/loss", patience=1, min_delta=1e9)
    epochs = []
    steps = [PruneWeights(amount=0.5, finetune_epochs=3), PruneWeights(amount=0.7, finetune_epochs=4)]
    callbacks = [stop, CompressionCallback(steps, attribute="net", dense_epochs=3)]
    callbacks.append(Seen(lambda trainer, _: epochs.append(trainer.current_epoch)))
    fit(Elsewhere(), epochs=10, callbacks=callbacks)
    assert callbacks[1].compressor.masks.pruned == round(0.7 * callbacks[1].compressor.masks.total)
    # Its patience counts again in the last phase.
    assert max(epochs) == 7


@pytest.mark.slow
def test_epochs_after_the_last_step_are_told():
    module = baseline([PruneWeights(amount=0.5, finetune_epochs=1)], report=Measurements(batch_sizes=()))
    with pytest.warns(UserWarning, match="over after 1 epochs, and the training goes on to max_epochs=3"):
        fit(module, epochs=3)
    assert module.callback.stages[-1].name == "final"
    assert "trained for 2 epochs after the last step" in module.callback.stages[-1].notes


@pytest.mark.slow
def test_a_second_run_leaves_the_first_ones_network(tmp_path):
    for name, others in (("compressed.ckpt", 0), ("compressed-v1.ckpt", 1)):
        # Two that save into one folder write one.
        callbacks = [ModelCheckpoint(tmp_path, filename="{epoch}"), ModelCheckpoint(tmp_path, every_n_train_steps=5)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            fit(
                baseline([PruneWeights(amount=0.5, finetune_epochs=1)]),
                epochs=1,
                callbacks=callbacks,
                enable_checkpointing=True,
            )
        assert len(list(tmp_path.glob("compressed*.ckpt"))) == others + 1
        assert callbacks[0].best_model_path
        assert (tmp_path / name).exists()


def test_what_would_end_too_early_or_twice_is_refused():
    steps = STEPS["masks"]()
    with pytest.raises(InputError, match=r"1 PruneUnits channel gives .*DDPStrategy holds on .*: leave strategy out"):
        # A fit would leave the process in its group.
        refuse_reshaping(tiny_trainer(strategy="ddp"), "1 PruneUnits channel")
    with pytest.raises(InputError, match="fast_dev_run ends before the steps .*limit_train_batches"):
        fit(baseline(steps, dense_epochs=1), fast_dev_run=True)
    with pytest.raises(InputError, match="max_steps=5 may end the training before the steps"):
        fit(baseline(steps, dense_epochs=1), max_steps=5)
    two = [CompressionCallback(STEPS["masks"](), attribute=name, dense_epochs=1) for name in ("net", "other")]
    with pytest.raises(InputError, match="two CompressionCallbacks at once, of 'net' and 'other'"):
        fit(Elsewhere(), callbacks=two)
    with pytest.raises(InputError, match="CompressionBaseline does its own steps"):
        fit(baseline(steps, dense_epochs=1), callbacks=[CompressionCallback(steps)])
    with pytest.raises(InputError, match="cannot come after step 1"):
        CompressionCallback([Quantize(), PruneWeights(amount=0.5)])
    with pytest.raises(InputError, match="dense_epochs must not be negative, got -1"):
        CompressionCallback(steps, dense_epochs=-1)


@pytest.mark.slow
def test_a_callback_beside_a_baseline_without_steps_compresses():
    module, callback = baseline([]), CompressionCallback(STEPS["channels"](), dense_epochs=1)
    fit(module, callbacks=[callback])
    assert module.student.features[0].out_channels < 4


@pytest.mark.slow
def test_a_report_on_validation_samples_needs_some():
    module = baseline([PruneWeights(amount=0.5, finetune_epochs=1)], report=Measurements(split="val", batch_sizes=()))
    with pytest.raises(InputError, match="split='val' needs validation batches"):
        fit(module, epochs=1, limit_val_batches=0)
    # Before the first of them was read.
    fit(module, epochs=1, num_sanity_val_steps=0)
    assert module.callback.stages[0].scores.keys() >= {"accuracy"}


@pytest.mark.slow
def test_an_untrained_network_that_would_teach_is_told():
    steps = [PruneWeights(amount=0.5, finetune_epochs=1)]
    with pytest.warns(UserWarning, match="has not been trained when the first step begins"):
        fit(baseline(steps, teacher="dense"), epochs=1)
    trained = baseline([])
    fit(trained, epochs=1)
    fit(CompressionBaseline(trained.student, num_classes=3, steps=steps, teacher="dense", optimizer=sgd), epochs=1)
