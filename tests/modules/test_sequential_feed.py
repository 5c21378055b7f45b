"""Sequential FEED: what every stage begins with, who teaches it, and what it leaves."""

import copy
import itertools
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from distill_lightning import FEEDModule, HintDistance, InputError, KDModule, SupervisedModule, sequential_feed
from distill_lightning.layers import Translator, fingerprint
from distill_lightning.modules import Stage
from distill_lightning.testing import TinyDataModule, TinyNet, tiny_trainer

SHAPE = (1, 8, 8)


def snapshot(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def require_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def run(*, stages=2, make_student=TinyNet, make_trainer=tiny_trainer, **options):
    defaults = {"num_classes": 3, "student_layer": "features", "beta": 10.0, "input_shape": SHAPE}
    if "make_module" in options:
        del defaults["student_layer"], defaults["beta"]
    return sequential_feed(make_student, make_trainer, TinyDataModule(), stages=stages, **(defaults | options))


class Recorder(pl.Callback):
    """What each stage's module was when its training began, and what its student was when it ended."""

    seen = None

    def on_fit_start(self, trainer, pl_module):
        teachers = getattr(pl_module, "teachers", None)
        self.seen.append(
            {
                "kind": type(pl_module),
                "module": pl_module,
                "student": fingerprint(pl_module.student),
                "teachers": [] if teachers is None else [fingerprint(network) for network in teachers],
                "translators": fingerprint(pl_module.translators) if hasattr(pl_module, "translators") else None,
            }
        )

    def on_fit_end(self, trainer, pl_module):
        self.seen[-1]["end"] = fingerprint(pl_module.student)


def recorded(**options):
    recorder = Recorder()
    recorder.seen = []
    stages = run(make_trainer=lambda: tiny_trainer(callbacks=[recorder]), **options)
    return stages, recorder.seen


@pytest.mark.slow
def test_every_stage_has_a_new_student_and_the_student_before_it_as_its_only_teacher():
    stages, seen = recorded(stages=3)
    assert [stage.number for stage in stages] == [0, 1, 2, 3]
    assert [line["kind"] for line in seen] == [SupervisedModule, FEEDModule, FEEDModule, FEEDModule]
    assert seen[0]["teachers"] == []
    for before, line in itertools.pairwise(seen):
        assert line["teachers"] == [before["end"]]
    assert len({line["student"] for line in seen}) == 4
    assert len({line["translators"] for line in seen[1:]}) == 3
    assert not {line["student"] for line in seen} & {line["end"] for line in seen}
    assert all(len(line["module"].translators) == 1 for line in seen[1:])


@pytest.mark.slow
def test_later_stages_do_not_touch_an_earlier_student():
    stages, seen = recorded(stages=3)
    assert [fingerprint(stage.student) for stage in stages] == [line["end"] for line in seen]
    assert len({id(stage.student) for stage in stages}) == 4
    for stage in stages:
        assert not any(module.training for module in stage.student.modules())
        assert all(parameter.requires_grad for parameter in stage.student.parameters())
    for line, stage in zip(seen[1:], stages, strict=False):
        assert not any(network is stage.student for network in line["module"].teachers)


@pytest.mark.slow
def test_stage_0_is_plain_training():
    (first, *_) = run(stages=1, seed=5)
    torch.manual_seed(5)
    module = SupervisedModule(TinyNet(), num_classes=3, input_shape=SHAPE)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    require_same(snapshot(first.student), snapshot(module.student))
    assert first.metrics["val/nll"] == float(trainer.callback_metrics["val/nll"])


@pytest.mark.slow
def test_stage_1_is_parallel_feed_with_one_teacher():
    first, second = run(stages=1, seed=5)
    torch.manual_seed(6)
    student = TinyNet()
    module = FEEDModule(
        student, copy.deepcopy(first.student), num_classes=3, student_layer="features", beta=10.0, input_shape=SHAPE
    )
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    require_same(snapshot(second.student), snapshot(student))
    assert second.metrics == {
        name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
    }


def test_the_loss_of_stage_1_is_the_formula():
    _, seen = recorded(stages=1)
    module = seen[1]["module"].eval()
    batch = next(iter(TinyDataModule().val_dataloader()))
    made = module.translators[0](module.student.features(batch.input)).detach().flatten(1).double()
    wanted = module.teachers[0].features(batch.input).flatten(1).double()
    distance = (made / made.norm(dim=1, keepdim=True) - wanted / wanted.norm(dim=1, keepdim=True)).abs().mean()
    terms, weights = module.terms(batch), module.weights()
    assert isinstance(module.translators[0], Translator)
    assert float(terms["feed"]) == pytest.approx(float(distance), rel=1e-4)
    assert sum(weights[name] * float(term) for name, term in terms.items()) == pytest.approx(
        float(F.cross_entropy(module.student(batch.input), batch.target)) + 10.0 * float(distance), rel=1e-4
    )


@pytest.mark.slow
def test_the_seed_decides_and_none_leaves_the_random_state_alone():
    first, second, other = (run(stages=1, seed=seed) for seed in (3, 3, 4))
    for one, two in zip(first, second, strict=True):
        require_same(snapshot(one.student), snapshot(two.student))
        assert one.metrics == two.metrics
    assert fingerprint(first[1].student) != fingerprint(other[1].student)
    # Stage 1 of seed 3 begins where stage 0 of seed 4 does, with a teacher more.
    assert fingerprint(first[1].student) != fingerprint(other[0].student)
    torch.manual_seed(3)
    free, seen = recorded(stages=2, seed=None)
    require_same(snapshot(free[0].student), snapshot(first[0].student))
    assert len({line["student"] for line in seen}) == 3


@pytest.mark.slow
def test_metrics_are_those_of_validation_and_where_asked_of_test():
    plain, tested = run(stages=1), run(stages=1, test=True)
    for stage, with_test in zip(plain, tested, strict=True):
        names = {name.removeprefix("val/") for name in stage.metrics}
        assert {"accuracy", "nll"} <= names
        assert all(name.startswith("val/") for name in stage.metrics)
        assert with_test.metrics.keys() == {f"{part}/{name}" for part in ("val", "test") for name in names}
        require_same(snapshot(stage.student), snapshot(with_test.student))
        assert all(type(value) is float for value in with_test.metrics.values())
    module = SupervisedModule(tested[0].student, num_classes=3)
    (expected,) = tiny_trainer().test(module, datamodule=TinyDataModule(), verbose=False)
    assert tested[0].metrics["test/nll"] == pytest.approx(expected["test/nll"])
    assert isinstance(tested[0], Stage)


def test_beta_beside_a_module_of_ones_own_is_refused():
    with pytest.raises(InputError, match="beta is for FEED as it is: let make_module give it"):
        run(make_module=partial(KDModule, num_classes=3), beta=5.0)


@pytest.mark.slow
def test_another_method_makes_generations_of_it():
    stages, seen = recorded(make_module=partial(KDModule, num_classes=3, temperature=1.0))
    assert [line["kind"] for line in seen] == [SupervisedModule, KDModule, KDModule]
    assert seen[2]["teachers"] == [fingerprint(stages[1].student)]
    _, seen = recorded(
        make_module=partial(FEEDModule, num_classes=3, student_layer="features", distance=HintDistance())
    )
    assert seen[1]["module"].distance == HintDistance()


@pytest.mark.slow
def test_options_reach_every_stage():
    optimizer = partial(torch.optim.SGD, lr=0.02)
    schedule = partial(StepLR, step_size=1, gamma=0.5)
    _, seen = recorded(stages=1, optimizer=optimizer, lr_scheduler=schedule, beta=7.0)
    for line in seen:
        assert (line["module"].optimizer, line["module"].lr_scheduler) == (optimizer, schedule)
        assert (line["module"].input_shape, line["module"].num_classes) == (SHAPE, 3)
    assert seen[1]["module"].beta == 7.0
    _, seen = recorded(stages=1)
    assert seen[1]["module"].beta == 10.0


def test_an_interrupted_stage_ends_it_all():
    class Interrupted(pl.Trainer):
        def fit(self, *args, **options):
            super().fit(*args, **options)
            self.state.status = "interrupted"

    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with pytest.raises(KeyboardInterrupt, match="stage 0 was interrupted"):
        run(make_trainer=lambda: Interrupted(max_epochs=1, enable_model_summary=False, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 0}, "stages must be at least 1, got 0"),
        ({"student_layer": None}, "needs student_layer, for FEED as it is, or make_module, and not both"),
        ({"make_module": KDModule, "student_layer": "features"}, "make_module, and not both"),
        ({"student_layer": "featurs"}, "TinyNet has no layer 'featurs'"),
    ],
)
def test_refusals_name_what_is_wrong(options, message):
    with pytest.raises(InputError, match=message):
        run(**options)


def test_a_student_or_a_trainer_that_is_not_new_is_refused():
    student, trainer = TinyNet(), tiny_trainer()
    with pytest.raises(InputError, match="make_student returned the same object twice"):
        run(make_student=lambda: student)
    with pytest.raises(InputError, match="make_trainer returned the same object twice"):
        run(make_trainer=lambda: trainer)
