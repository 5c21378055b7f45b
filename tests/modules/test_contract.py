"""Every module of the package keeps the contract."""

from dataclasses import replace

import pytest

from distill_lightning import (
    BeamSearch,
    CompressionBaseline,
    DetectionModule,
    FEEDModule,
    KDModule,
    LogitTerm,
    MovingAverage,
    SelfKDDetectionModule,
    SelfKDTranslationModule,
    SupervisedModule,
    TeacherEnsemble,
    TranslationModule,
    translation_transformer,
)
from distill_lightning.compression import (
    L0,
    Cubic,
    HashShare,
    LearnMask,
    LowRank,
    Movement,
    PruneUnits,
    PruneWeights,
    Quantize,
    ShareWeights,
)
from distill_lightning.errors import InputError
from distill_lightning.testing import (
    CONTRACT,
    DetectionKit,
    TinyNet,
    TranslationKit,
    assert_module_contract,
    tiny_trainer,
)

# The contract's trainings are longer than the steps, and its networks are not trained before.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the last step of the compression is over"),
    pytest.mark.filterwarnings("ignore:teacher='dense'. the network has not been trained"),
]


def supervised(student, teachers, num_classes):
    return SupervisedModule(student, num_classes=num_classes)


def kd(student, teachers, num_classes):
    return KDModule(student, TeacherEnsemble(teachers, weights=[1, 3]), num_classes=num_classes)


def feed(student, teachers, num_classes):
    return FEEDModule(
        student, teachers, num_classes=num_classes, student_layer="features", beta=10.0,
        logit_term=LogitTerm(weight=0.5), teacher_weights=[1.0, 2.0], input_shape=(1, 8, 8),
    )  # fmt: skip


def no_steps(student, teachers, num_classes):
    return CompressionBaseline(student, num_classes=num_classes)


def under_dense(student, teachers, num_classes):
    """Masks that grow, under the network itself as it was."""
    steps = [PruneWeights(amount=0.5, schedule=Cubic(), finetune_epochs=1)]
    return CompressionBaseline(student, num_classes=num_classes, steps=steps, teacher="dense", seed=0)


def under_teachers(student, teachers, num_classes):
    steps = [PruneWeights(amount=0.5, schedule=Cubic(), finetune_epochs=1)]
    return CompressionBaseline(student, num_classes=num_classes, steps=steps, teacher=teachers, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("build", [supervised, kd, feed, no_steps, under_dense, under_teachers])
@pytest.mark.parametrize("point", CONTRACT)
def test_contract(point, build):
    CONTRACT[point](build)


def translation(student, teachers, num_classes):
    return TranslationModule(student, num_classes=num_classes, pad_id=0, label_smoothing=0.1)


def self_kd_translation(student, teachers, num_classes):
    return SelfKDTranslationModule(student, num_classes=num_classes, pad_id=0, alpha_T=0.5)


def averaged_translation(student, teachers, num_classes):
    return SelfKDTranslationModule(
        student,
        num_classes=num_classes,
        pad_id=0,
        alpha_unit="step",
        past=MovingAverage(decay=0.9),
        label_smoothing=0.1,
    )


def detection(student, teachers, num_classes):
    return DetectionModule(student, num_classes=num_classes)


def self_kd_detection(student, teachers, num_classes):
    return SelfKDDetectionModule(student, num_classes=num_classes, alpha_T=0.5, objectness=True)


def averaged_detection(student, teachers, num_classes):
    return SelfKDDetectionModule(
        student, num_classes=num_classes, alpha_unit="step", past=MovingAverage(decay=0.9), foreground_only=True
    )


OTHER_BATCHES = {
    TranslationKit(): [translation, self_kd_translation, averaged_translation],
    DetectionKit(): [detection, self_kd_detection, averaged_detection],
}
for kit, builds in OTHER_BATCHES.items():
    for one in builds:
        one.kit = kit


@pytest.mark.slow
@pytest.mark.parametrize("build", [build for builds in OTHER_BATCHES.values() for build in builds])
@pytest.mark.parametrize("point", CONTRACT)
def test_contract_where_a_batch_is_not_an_input_and_a_target(point, build):
    CONTRACT[point](build)


class MarianKit(TranslationKit):
    """A network of the transformers library, without dropout: its draws would be others after resuming."""

    part = "model.encoder.layers.0.final_layer_norm"
    head = "model.decoder.layers.0.fc2.weight"
    waiting = frozenset({"transformers"})

    def network(self, num_classes, *, norm):
        sizes = {"width": 8, "encoder_depth": 1, "decoder_depth": 1, "heads": 2, "feedforward": 8}
        return translation_transformer(num_classes, **sizes, dropout=0.0, max_length=8)


def self_kd_marian(student, teachers, num_classes):
    return SelfKDTranslationModule(student, num_classes=num_classes, pad_id=0, alpha_T=0.5, beam=BeamSearch(size=1))


self_kd_marian.kit = MarianKit()


@pytest.mark.slow
def test_contract_of_a_network_of_the_transformers_library():
    assert_module_contract(self_kd_marian)


# The last layer keeps its name, which a point of the contract looks for.
STEPS = {
    "channels": lambda: PruneUnits(amount=0.5, unit="channel", finetune_epochs=1),
    "low rank": lambda: LowRank(rank=2, targets="features.*", finetune_epochs=1),
    "shared": lambda: ShareWeights(k=4, targets="features.*", finetune_epochs=1),
    "hashed": lambda: HashShare(ratio=4, targets="features.*", finetune_epochs=1),
    "quantized": lambda: Quantize(weight_bits=4, estimator="lsq", targets="features.*", finetune_epochs=1),
    "movement": lambda: LearnMask(Movement(0.5), targets="features.*", finetune_epochs=1),
    "gates": lambda: LearnMask(L0(1e-3), targets="features.*", finetune_epochs=1),
}
OTHER_SIZES = "the file is of the compressed network's sizes, which a freshly built one has not"
TAKEN_OFF = "what is learned about the weights has left them when the fit is over, and the optimiser still has it"
LEFT = "a pruned layer keeps the statistics of the channels that are left"
AVERAGED = "an average of parameters that a step replaces is refused"
EXCLUDED = {
    **{(name, "averages_of_weights_leave_frozen_networks_alone"): AVERAGED for name in STEPS},
    ("channels", "an_exported_student_is_a_plain_network"): OTHER_SIZES,
    ("channels", "a_frozen_part_keeps_its_mode"): LEFT,
    ("low rank", "an_exported_student_is_a_plain_network"): OTHER_SIZES,
    ("movement", "the_optimizer_holds_exactly_what_learns"): TAKEN_OFF,
    ("gates", "the_optimizer_holds_exactly_what_learns"): TAKEN_OFF,
    (
        "movement",
        "a_training_step_does_not_wait_for_the_device",
    ): "exactly so many scores are chosen, which counts them",
}


def compressing(name):
    def build(student, teachers, num_classes):
        return CompressionBaseline(student, num_classes=num_classes, steps=[STEPS[name]()], seed=0)

    return build


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("point", [point for point in CONTRACT if point != "two_processes_equal_one"])
def test_contract_of_a_network_that_changes(point, name):
    if (name, point) in EXCLUDED:
        with pytest.raises((AssertionError, RuntimeError, InputError)):
            CONTRACT[point](compressing(name))
    else:
        CONTRACT[point](compressing(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_network_that_changes_is_refused_in_two_processes(name):
    module = compressing(name)(TinyNet(3), [], 3)
    trainer = tiny_trainer(devices=2, strategy="ddp_spawn")
    # As each of the processes does at the beginning of the fit.
    with pytest.raises(InputError, match=r"several processes cannot agree on: train it in one .devices=1."):
        module.callback.setup(trainer, module, "fit")
    module.callback.steps[0] = replace(module.callback.steps[0], at="end", finetune_epochs=0)
    if module.callback.steps[0].reason_to_train() is None:
        with pytest.raises(
            InputError, match="do not come back from spawned processes: give the Trainer strategy='ddp'"
        ):
            module.callback.setup(trainer, module, "fit")
