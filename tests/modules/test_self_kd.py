"""Self-KD against a hand-written loop, its limits, its past in every form, and its checkpoints."""

import copy
import math
import random
import shutil
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from distill_lightning.modules.parts.progress import is_mixed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from distill_lightning import Batch, IndexedDataModule, InputError, SelfKDModule, SupervisedModule, functional
from distill_lightning.data.mixing import cutout
from distill_lightning.data.samplers import CutMixSampler, MixupSampler
from distill_lightning.data.views import Draws
from distill_lightning.modules.parts.past_network import PastNetwork
from distill_lightning.storage import PredictionStore
from distill_lightning.testing import CONTRACT, TinyDataModule, TinyNet, tiny_trainer

SHAPE = (1, 8, 8)
PASTS = ["stored", "past_model", "ema"]


class Plain(TinyDataModule):
    """Without augmentation: a sample has one view."""

    def __init__(self, **options):
        super().__init__(**options)
        self.padding = 0


def sgd(parameters, lr=0.1):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def module_of(*, norm="group", weights=0, **options):
    torch.manual_seed(weights)
    options = {"num_classes": 3, "optimizer": sgd} | options
    # Other pasts refuse a decay.
    if options.get("past") == "ema":
        options = {"ema_decay": 0.9} | options
    return SelfKDModule(TinyNet(norm=norm), **options)


def fitted(module, data=None, *, ckpt_path=None, **options):
    trainer = tiny_trainer(**options)
    trainer.fit(module, datamodule=data or TinyDataModule(), ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return trainer


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture
def targets(monkeypatch):
    """The target of every training step, as the loss is given it."""
    seen = []
    function = functional.soft_cross_entropy

    def spy(logits, probs):
        seen.append(probs.detach().clone())
        return function(logits, probs)

    monkeypatch.setattr(functional, "soft_cross_entropy", spy)
    return seen


class Logged(pl.Callback):
    """What is logged of every training epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items() if "train" in name})


# The whole method against plain Python


def naive_softmax(row):
    top = max(row)
    exponentials = [math.exp(value - top) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def naive_temperature(row, temperature):
    powers = [p ** (1 / temperature) for p in row]
    return [p / sum(powers) for p in powers]


def naive_mix(rows, first, second, share):
    return [
        [s * a + (1 - s) * b for a, b in zip(rows[i], rows[j], strict=True)]
        for i, j, s in zip(first, second, share, strict=True)
    ]


class NaiveSelfKD:
    """The method in loops: rows in a dictionary, the gradient by its formula, SGD and the past's copies by hand."""

    def __init__(self, student, *, epochs, past="stored", alpha=0.8, eps=0.0, temperature=1.0, cut=0, mixing=None,
                 probability=0.5, decay=0.9, every=1, lr=0.1):  # fmt: skip
        self.student, self.epochs, self.past, self.alpha = student.train(), epochs, past, alpha
        self.eps, self.temperature, self.cut, self.mixing, self.probability = eps, temperature, cut, mixing, probability
        self.decay, self.every, self.lr = decay, every, lr
        self.rows, self.targets, self.logs = {}, [], []
        self.teacher, self.average = None, None
        self.velocity = [torch.zeros_like(parameter) for parameter in student.parameters()]

    def run(self, data):
        data.setup()
        loader = data.train_dataloader()
        for epoch in range(self.epochs):
            loader.sampler.set_epoch(epoch)
            sums = dict.fromkeys(
                ("loss", "self_kd", "alpha", "target_gt_prob", "target_entropy", "agree_past", "known_fraction"), 0.0
            )
            count, coming = 0, {}
            for number, batch in enumerate(loader):
                for name, value in self.step(epoch, number, batch, coming).items():
                    sums[name] += value * len(batch.target)
                count += len(batch.target)
            self.logs.append({f"train/{name}": value / count for name, value in sums.items()})
            self.rows.update(coming)
            if self.past == "past_model" and (epoch + 1) % self.every == 0:
                self.teacher = copy.deepcopy(self.student).eval()
            if self.past == "ema":
                self.teacher = self.average
        return self

    def step(self, epoch, number, batch, coming):
        alpha = self.alpha * (epoch + 1) / self.epochs
        draws = Draws(0x53454C46, batch.index, batch.view)
        x, mixed = batch.input, None
        if self.cut:
            x = cutout(x, self.cut, draws.uniform(2))
        if self.mixing is not None and is_mixed(0, epoch, number, probability=self.probability):
            mixed = self.mixing.mix(x, draws)
            x = mixed.inputs
            pairs = (mixed.first.tolist(), mixed.second.tolist(), mixed.share.tolist())
        logits = self.student(x)
        prediction = [naive_softmax(row) for row in logits.tolist()]
        index, labels, classes = batch.index.tolist(), batch.target.tolist(), logits.shape[1]
        hard = [[(1 - self.eps) * (k == y) + self.eps / classes for k in range(classes)] for y in labels]
        if self.past == "stored":
            known = [i in self.rows for i in index]
            past = [self.rows.get(i, y) for i, y in zip(index, hard, strict=True)]
            past = [naive_temperature(s, self.temperature) if k else s for s, k in zip(past, known, strict=True)]
            if mixed is not None:
                past = naive_mix(past, *pairs)
                known = [known[i] or known[j] for i, j in zip(*pairs[:2], strict=True)]
            else:
                coming.update(zip(index, prediction, strict=True))
        else:
            known = [self.teacher is not None] * len(index)
        if mixed is not None:
            hard = naive_mix(hard, *pairs)
        if self.past != "stored":
            past = hard
            if self.teacher is not None:
                with torch.no_grad():
                    past = [
                        naive_temperature(naive_softmax(row), self.temperature)
                        for row in self.teacher.eval()(x).tolist()
                    ]
        target = [
            [(1 - alpha) * y + alpha * s for y, s in zip(*rows, strict=True)] if k else rows[0]
            for rows, k in zip(zip(hard, past, strict=True), known, strict=True)
        ]
        self.targets.append(target)
        self.descend(logits, prediction, target)
        loss = -sum(
            q * math.log(p) for rows in zip(target, prediction, strict=True) for q, p in zip(*rows, strict=True)
        )
        best = [row.index(max(row)) for row in prediction]
        agree = [k and b == s.index(max(s)) for k, b, s in zip(known, best, past, strict=True)]
        size = len(index)
        return {
            "loss": loss / size, "self_kd": loss / size, "alpha": alpha,
            "target_gt_prob": sum(q[y] for q, y in zip(target, labels, strict=True)) / size,
            "target_entropy": -sum(q * math.log(q) for row in target for q in row if q > 0) / size,
            "agree_past": sum(agree) / max(sum(known), 1), "known_fraction": sum(known) / size,
        }  # fmt: skip

    def descend(self, logits, prediction, target):
        size = len(target)
        slope = [[(p - q) / size for p, q in zip(*rows, strict=True)] for rows in zip(prediction, target, strict=True)]
        parameters = list(self.student.parameters())
        gradients = torch.autograd.grad(logits, parameters, grad_outputs=torch.tensor(slope))
        with torch.no_grad():
            for parameter, velocity, gradient in zip(parameters, self.velocity, gradients, strict=True):
                velocity.mul_(0.9).add_(gradient + 5e-4 * parameter)
                parameter.sub_(self.lr * velocity)
            if self.past == "ema" and self.average is None:
                self.average = copy.deepcopy(self.student)
            elif self.past == "ema":
                for name, value in self.average.state_dict().items():
                    value.copy_(self.decay * value + (1 - self.decay) * self.student.state_dict()[name])


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2, "past_temperature": 3.0, "cutout": 4},
        {"mixing": MixupSampler(), "mixing_probability": 0.6},
        {"mixing": CutMixSampler(), "label_smoothing": 0.1, "past_temperature": 0.5, "cutout": 3},
    ],
    ids=["plain", "smoothed", "mixup", "cutmix"],
)
def test_a_whole_run_is_the_hand_written_loop(past, options, targets):
    module = module_of(past=past, **options)
    naive = NaiveSelfKD(
        copy.deepcopy(module.student), epochs=3, past=past, eps=options.get("label_smoothing", 0.0),
        temperature=options.get("past_temperature", 1.0), cut=options.get("cutout", 0), mixing=options.get("mixing"),
        probability=options.get("mixing_probability", 0.5),
    )  # fmt: skip
    logged = Logged()
    fitted(module, TinyDataModule(samples=20), max_epochs=3, callbacks=[logged])
    naive.run(TinyDataModule(samples=20))
    assert len(targets) == len(naive.targets) == 9
    for got, expected in zip(targets, naive.targets, strict=True):
        assert torch.allclose(got, torch.tensor(expected), atol=2e-5)
        assert torch.allclose(got.sum(1), torch.ones(len(got)), atol=1e-6)
    for got, expected in zip(logged.epochs, naive.logs, strict=True):
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, value in naive.student.state_dict().items():
        assert torch.allclose(module.student.state_dict()[name], value, rtol=1e-4, atol=1e-5), name
    assert 0 < naive.logs[1]["train/known_fraction"] <= 1
    if "mixing" in options:
        kinds = [is_mixed(0, epoch, number, probability=naive.probability) for epoch in range(3) for number in range(3)]
        assert len(set(kinds)) == 2


def test_a_rarely_refreshed_past_is_the_hand_written_loop(targets):
    module = module_of(past="past_model", refresh_epochs=2)
    naive = NaiveSelfKD(copy.deepcopy(module.student), epochs=5, past="past_model", every=2)
    fitted(module, max_epochs=5)
    naive.run(TinyDataModule())
    for got, expected in zip(targets, naive.targets, strict=True):
        assert torch.allclose(got, torch.tensor(expected), atol=2e-5)
    # Epochs 1 and 2 have no past.
    assert [float(got.max(1).values.min()) == 1 for got in targets] == [True] * 6 + [False] * 9


# The limits: plain cross entropy


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize(
    ("options", "epochs"),
    [({"alpha_T": 0.0}, 3), ({"total_epochs": 7, "alpha_T": 0.77}, 1)],
    ids=["alpha 0", "epoch 1"],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_without_a_past_it_is_plain_training_bit_for_bit(past, options, epochs, precision):
    states = []
    for self_kd in (True, False):
        torch.manual_seed(4)
        student, common = TinyNet(), {"num_classes": 3, "optimizer": sgd}
        module = (
            SelfKDModule(student, past=past, **common, **options) if self_kd else SupervisedModule(student, **common)
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "alpha reaches alpha_T")
            trainer = fitted(module, TinyDataModule(samples=37, batch_size=8), max_epochs=epochs, precision=precision)
        state = {name: value for name, value in module.state_dict().items() if name.startswith("student.")}
        states.append(state | {"loss": trainer.callback_metrics["train/loss"].round(decimals=5)})
    assert same(*states)


def test_label_smoothing_alone_is_cross_entropys():
    batch = Batch(torch.rand(6, *SHAPE), torch.arange(6) % 3, torch.arange(6))
    module = module_of(label_smoothing=0.3, past="past_model").eval()
    trainer = tiny_trainer(max_epochs=4)
    trainer.strategy.connect(module)
    module.trainer = trainer
    expected = F.cross_entropy(module.student(batch.input), batch.target, label_smoothing=0.3)
    assert float(module.terms(batch)["self_kd"]) == pytest.approx(float(expected), rel=1e-6)


# alpha


@pytest.mark.parametrize(("epochs", "alpha"), [(1, 0.8), (3, 0.8), (7, 0.3), (12, 1.0)])
def test_alpha_grows_by_equal_steps_to_exactly_alpha_t(epochs, alpha):
    logged = Logged()
    fitted(module_of(alpha_T=alpha), max_epochs=epochs, callbacks=[logged], limit_train_batches=1)
    seen = [line["train/alpha"] for line in logged.epochs]
    assert seen == pytest.approx([alpha * (epoch + 1) / epochs for epoch in range(epochs)], rel=1e-6)
    assert seen[-1] == float(torch.tensor(alpha))
    assert seen == sorted(seen)


class Alphas(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(pl_module.alpha())


@pytest.mark.parametrize(
    ("accumulate", "expected"),
    [(1, [step / 6 for step in (1, 2, 3, 4, 5, 6)]), (2, [step / 4 for step in (1, 1, 2, 3, 3, 4)])],
)
def test_alpha_by_step_follows_the_optimiser(accumulate, expected):
    alphas = Alphas()
    module = module_of(alpha_unit="step", alpha_T=0.7)
    fitted(module, max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[alphas])
    assert alphas.seen == pytest.approx([0.7 * share for share in expected])
    assert alphas.seen[-1] == 0.7


def test_alpha_by_a_function_by_a_constant_and_beyond_its_end():
    def after_warm_up(progress):
        return max(0.0, 2 * progress - 1)

    for options, expected in (
        ({"alpha_schedule": after_warm_up}, [0, 0, 0.4, 0.8]),
        ({"alpha_schedule": "constant"}, [0.8] * 4),
        ({"total_epochs": 2}, [0.4, 0.8, 0.8, 0.8]),
        ({"total_epochs": 2, "alpha_unit": "step"}, [0.4, 0.8, 0.8, 0.8]),
    ):
        alphas = Alphas()
        fitted(module_of(**options), max_epochs=4, callbacks=[alphas], limit_train_batches=1)
        assert alphas.seen == pytest.approx(expected), options


def test_a_function_that_leaves_the_range_is_refused():
    with pytest.raises(InputError, match=r"alpha_schedule\(0.5\) times alpha_T is 1.5: let it stay in \[0, 1\]"):
        fitted(module_of(alpha_T=1.0, alpha_schedule=lambda progress: 3 * progress), max_epochs=2)


def test_a_training_of_unknown_length_is_refused_unless_alpha_is_constant():
    with pytest.raises(InputError, match=r"length is not known: give total_epochs or Trainer\(max_epochs\)"):
        fitted(module_of(), max_epochs=-1, max_steps=4)
    assert fitted(module_of(alpha_schedule="constant"), max_epochs=-1, max_steps=4).global_step == 4
    with pytest.warns(UserWarning, match="max_steps=4"):
        fitted(module_of(total_epochs=2), max_epochs=-1, max_steps=4)


@pytest.mark.parametrize(
    ("options", "trainer", "reason"),
    [
        ({"total_epochs": 3}, {"max_epochs": 2}, "max_epochs=2"),
        ({}, {"max_epochs": 3, "max_steps": 8}, "max_steps=8"),
        ({"alpha_unit": "step"}, {"max_epochs": 3, "max_steps": 8}, "max_steps=8"),
        # Three batches make two steps.
        ({}, {"max_epochs": 2, "max_steps": 3, "accumulate_grad_batches": 2}, "max_steps=3"),
        ({}, {"callbacks": [pl.callbacks.EarlyStopping("val/nll")], "max_epochs": 2}, "EarlyStopping"),
        ({}, {"max_time": "00:01:00:00", "max_epochs": 2}, "a time limit"),
        ({"total_epochs": 4}, {"max_epochs": 2, "max_steps": 4}, "max_epochs=2 and max_steps=4"),
    ],
)
def test_what_keeps_alpha_from_its_end_is_warned_about_once(options, trainer, reason):
    module = module_of(**options)
    with pytest.warns(UserWarning, match=f"alpha_T=0.8 in epoch .* because of {reason}: set total_epochs") as caught:
        fitted(module, **trainer)
    assert len([line for line in caught if "alpha reaches" in str(line.message)]) == 1


@pytest.mark.parametrize(
    ("options", "trainer"),
    [
        ({}, {"max_epochs": 2, "max_steps": 6}),
        ({}, {"max_epochs": 2, "max_steps": 4, "accumulate_grad_batches": 2}),
        ({"total_epochs": 1}, {"max_epochs": 2}),
        ({"alpha_schedule": "constant"}, {"max_epochs": 2, "max_steps": 1}),
        ({}, {"max_epochs": 2, "callbacks": [pl.callbacks.Timer()]}),
    ],
)
def test_a_training_that_comes_to_its_end_is_not_warned_about(options, trainer):
    fitted(module_of(**options), **trainer)


# The stored past


@pytest.mark.parametrize(
    "options",
    [{"seed": 0}, {"seed": 3, "batch_size": 5}, {"batch_size": 1}, {"samples": 23}, {"batch_size": 100}],
    ids=str,
)
def test_with_a_network_that_stands_still_the_store_is_its_prediction(options):
    module = module_of(optimizer=still)
    data = Plain(**options)
    fitted(module, data, max_epochs=1)
    batch = data.dataset("train").__getitems__(range(data.count))
    probs, known = module.store.read(torch.arange(data.count))
    assert known.all()
    with torch.no_grad():
        assert torch.allclose(probs, module.student(batch.input).softmax(1), atol=1e-6)


def test_worker_processes_change_nothing():
    rows = []
    for workers in (0, 2):
        module, data = module_of(), TinyDataModule(samples=20)
        data.num_workers = workers
        fitted(module, data, max_epochs=2)
        rows.append(module.store.read(torch.arange(20))[0])
    assert torch.equal(*rows)


def test_stored_and_past_model_agree_where_nothing_moves(targets):
    for past in ("stored", "past_model"):
        fitted(module_of(past=past, optimizer=still), Plain(), max_epochs=3)
    assert len(targets) == 18
    for one, other in zip(targets[:9], targets[9:], strict=True):
        assert torch.equal(one, other)


class Repeating(pl.LightningDataModule):
    """Six samples, of which an epoch reads some twice and one never."""

    order = (0, 1, 2, 0, 3, 3, 4, 1)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        data = [(image, number % 3) for number, image in enumerate(torch.rand(6, *SHAPE, generator=generator))]
        return DataLoader(data, batch_size=2, sampler=list(self.order))

    def val_dataloader(self):
        return DataLoader([(torch.rand(*SHAPE), 0)])


class Rows(pl.Callback):
    """The store as it is read in every epoch."""

    def __init__(self, samples):
        self.samples, self.epochs = samples, []

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append(pl_module.store.read(torch.arange(self.samples)))


def test_a_sample_that_comes_twice_has_the_past_of_before_the_epoch_both_times(targets):
    module, rows = module_of(alpha_T=1.0, alpha_schedule="constant"), Rows(6)
    fitted(module, IndexedDataModule(Repeating()), max_epochs=3, callbacks=[rows])
    for epoch, (probs, known) in enumerate(rows.epochs):
        assert known.tolist() == [epoch > 0] * 5 + [False]
        for place, index in enumerate(Repeating.order):
            target = targets[4 * epoch + place // 2][place % 2]
            assert torch.equal(target, probs[index] if epoch else torch.eye(3)[index % 3])
    assert not torch.equal(rows.epochs[1][0][0], rows.epochs[2][0][0])


class Foreign(pl.LightningDataModule):
    """Images as anyone would have them, a batch of three left over."""

    def images(self):
        generator = torch.Generator().manual_seed(0)
        return [(image, number % 3) for number, image in enumerate(torch.rand(11, *SHAPE, generator=generator))]

    def train_dataloader(self):
        return DataLoader(self.images(), batch_size=4, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.images(), batch_size=4)


class Seen(pl.Callback):
    """Which samples were trained with."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append(batch.index.tolist())


def test_samples_that_were_left_out_fall_back_to_their_labels(targets):
    seen, before = Seen(), set()
    fitted(module_of(), IndexedDataModule(Foreign()), max_epochs=4, callbacks=[seen])
    fell_back = 0
    for epoch in range(4):
        steps = range(2 * epoch, 2 * epoch + 2)
        for step in steps:
            for index, row in zip(seen.steps[step], targets[step], strict=True):
                assert torch.equal(row, torch.eye(3)[index % 3]) == (index not in before)
                assert float(row.sum()) == pytest.approx(1, abs=1e-6)
                fell_back += epoch > 0 and index not in before
        before |= {index for step in steps for index in seen.steps[step]}
    assert fell_back > 0


def test_the_store_is_of_the_kind_that_was_asked_for():
    for options, kind in (
        ({}, (24, 3, torch.float32, None)),
        ({"num_samples": 100, "store_dtype": "float16"}, (100, 3, torch.float16, None)),
        ({"store_top_k": 2, "store_dtype": "bfloat16"}, (24, 3, torch.bfloat16, 2)),
    ):
        module = module_of(**options)
        fitted(module)
        store = module.store
        assert (store.num_samples, store.num_classes, store.dtype, store.top_k) == kind
        assert store.device == module.device


def test_a_half_precision_store_moves_the_target_by_less_than_its_last_bit(targets):
    for dtype in ("float32", "float16"):
        fitted(module_of(store_dtype=dtype, optimizer=still), Plain(), max_epochs=2)
    differences = [float((one - other).abs().max()) for one, other in zip(targets[:6], targets[6:], strict=True)]
    assert differences[:3] == [0, 0, 0]
    assert 0 < max(differences) <= 0.8 * 2**-11


def test_a_batch_without_an_index_is_refused_but_by_the_other_pasts():
    with pytest.raises(InputError, match=r"have no index: wrap the data in IndexedDataModule\(datamodule\)"):
        fitted(module_of(num_samples=11), Foreign())
    for past in ("past_model", "ema"):
        fitted(module_of(past=past, mixing=MixupSampler(), cutout=2), Foreign(), max_epochs=2)


def test_num_samples_must_fit_the_data():
    with pytest.raises(InputError, match="num_samples=10 does not fit the data's indices"):
        fitted(module_of(num_samples=10))

    class Lengthless(Foreign):
        def train_dataloader(self):
            class Endless(torch.utils.data.IterableDataset):
                def __iter__(self):
                    return iter([Batch(torch.rand(4, *SHAPE), torch.zeros(4, dtype=torch.long), torch.arange(4))])

            return DataLoader(Endless(), batch_size=None)

    with pytest.raises(InputError, match="which the training loader does not tell: give num_samples"):
        fitted(module_of(), Lengthless())
    module = module_of(num_samples=4)
    fitted(module, Lengthless())
    assert module.store.read(torch.arange(4))[1].all()
    with pytest.raises(InputError, match="alpha_unit='step' needs training data with a length"):
        fitted(module_of(num_samples=4, alpha_unit="step"), Lengthless())


# The past as a network: past_model and ema


class Copies(pl.Callback):
    """The student at the end of every epoch, and the past network at the next one's start and after its first step."""

    def __init__(self):
        self.students, self.pasts, self.later = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        network = pl_module.past_network.network
        self.pasts.append(None if network is None else state_of(network))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        network = pl_module.past_network.network
        if network is not None:
            assert not any(child.training for child in network.modules())
            assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())
            self.later.append(state_of(network))

    def on_train_epoch_end(self, trainer, pl_module):
        self.students.append(state_of(pl_module.student))


def test_the_past_model_is_the_student_of_the_epoch_before_bit_for_bit():
    module, copies = module_of(past="past_model", norm="batch"), Copies()
    trainer = fitted(module, max_epochs=3, callbacks=[copies])
    assert copies.pasts[0] is None
    for epoch in (1, 2):
        assert same(copies.pasts[epoch], copies.students[epoch - 1])
        assert all(same(copies.pasts[epoch], later) for later in copies.later[3 * epoch - 3 : 3 * epoch])
    assert not same(*copies.students[:2])
    assert same(state_of(module.past_network.network), copies.students[2])
    held = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    theirs = list(module.past_network.network.parameters())
    assert held.isdisjoint(map(id, theirs))
    assert {id(parameter) for parameter in module.parameters()}.isdisjoint(map(id, theirs))
    assert set(module.state_dict()) == {f"student.{name}" for name in module.student.state_dict()}


@pytest.mark.parametrize("past", PASTS)
def test_no_gradient_flows_into_the_past(past):
    module = module_of(past=past)
    trainer = tiny_trainer(max_epochs=2, callbacks=[Backwards()])
    trainer.fit(module, datamodule=TinyDataModule())
    if module.past_network is not None:
        assert not module.past_network.predict(torch.rand(2, *SHAPE, requires_grad=True)).requires_grad


class Backwards(pl.Callback):
    """The gradient depends on what the past says, and not on how it came to say so."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 0:
            return
        parameters = list(pl_module.student.parameters())
        gradients = [torch.autograd.grad(pl_module.terms(batch)["self_kd"], parameters)]
        assert all(gradient.isfinite().all() for gradient in gradients[0])
        past, known = pl_module._past(batch, batch.input, torch.eye(3)[batch.target], None)
        assert known.all()
        assert not past.requires_grad
        logits = pl_module.student(batch.input)
        target = (1 - pl_module.alpha()) * torch.eye(3)[batch.target] + pl_module.alpha() * past
        gradients.append(torch.autograd.grad(F.cross_entropy(logits, target), parameters))
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


class Steps(pl.Callback):
    """The student after every optimiser step, and the average."""

    def __init__(self):
        self.steps = 0
        self.students, self.averages = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            self.students.append(state_of(pl_module.student))
        self.averages.append(state_of(pl_module.past_network.network) if self.steps else None)


@pytest.mark.parametrize(("accumulate", "moments"), [(1, [0, 1, 2, 3, 4, 5]), (2, [-1, 0, 1, 1, 2, 3])])
def test_the_average_is_taken_after_every_optimiser_step(accumulate, moments):
    module, steps = module_of(past="ema", ema_decay=0.75, norm="batch"), Steps()
    fitted(module, max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[steps])
    averages = steps.students[:1]
    for student in steps.students[1:]:
        averages.append({name: 0.75 * value + 0.25 * student[name] for name, value in averages[-1].items()})
    for moment, got in zip(moments, steps.averages, strict=True):
        assert (got is None) == (moment < 0)
        for name, value in (got or {}).items():
            if value.is_floating_point():
                assert torch.allclose(value, averages[moment][name], atol=1e-6), name


@pytest.mark.parametrize("given", [None, "cpu"])
def test_the_store_is_where_it_is_wanted_and_leaves_the_device_with_the_module(monkeypatch, given):
    moves = []

    def to(store, device):
        moves.append(str(device))
        return store

    monkeypatch.setattr(PredictionStore, "to", to)
    # As if the training were on another device.
    monkeypatch.setattr(SelfKDModule, "device", torch.device("meta"))
    module = module_of(store_device=given)
    module._trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(total_batch_idx=-1), train_dataloader=SimpleNamespace(dataset=range(5)),
        max_epochs=2, max_steps=-1, max_time=None, current_epoch=0, callbacks=[], early_stopping_callbacks=[],
        num_training_batches=1,
    )  # fmt: skip
    module.on_train_start()
    module.on_fit_end()
    assert moves == [given or "meta", "cpu"]


def test_a_loaded_module_says_in_fit_what_its_checkpoint_could_not_hold(tmp_path, recwarn):
    def slowly(progress):
        return progress**2

    options = {"mixing": MixupSampler(), "mixing_probability": 0.4, "alpha_schedule": slowly}
    trainer = fitted(module_of(**options))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    told = {name: options[name] for name in ("mixing", "alpha_schedule")}
    student = partial(TinyNet, norm="group")
    whole = SelfKDModule.load_from_checkpoint(tmp_path / "run.ckpt", student=student(), optimizer=sgd, **told)
    recwarn.clear()
    fitted(whole)
    assert not [warning for warning in recwarn if "cannot hold" in str(warning.message)]
    loaded = SelfKDModule.load_from_checkpoint(tmp_path / "run.ckpt", student=student(), mixing=MixupSampler())
    with pytest.warns(UserWarning, match="cannot hold every argument: optimizer, alpha_schedule are the defaults now"):
        fitted(loaded)
    # To predict, nothing is missing.
    recwarn.clear()
    alone = SelfKDModule.load_from_checkpoint(tmp_path / "run.ckpt", student=student())
    tiny_trainer().predict(alone, datamodule=TinyDataModule())
    assert not [warning for warning in recwarn if "cannot hold" in str(warning.message)]


def test_a_past_network_moves_with_what_it_is_told():
    past = PastNetwork(1)
    past.to("meta")
    past.after_epochs(0, 1, TinyNet())
    past.to("meta")
    assert {parameter.device.type for parameter in past.network.parameters()} == {"meta"}


# Mixing and cutout


def test_a_mix_of_the_whole_first_is_the_unmixed_target(targets):
    class Whole(CutMixSampler):
        def blend(self, first, second, share, draws):
            return first, torch.ones_like(share)

    # Mixed batches are not stored, so those of the first epoch must not be mixed, here by chance.
    for options in ({"seed": 2}, {"mixing": Whole(), "mixing_probability": 0.3, "seed": 2}):
        fitted(module_of(optimizer=still, **options), Plain(), max_epochs=2)
    kinds = [is_mixed(2, epoch, number, probability=0.3) for epoch in range(2) for number in range(3)]
    assert kinds[:3] == [False] * 3
    assert any(kinds[3:])
    for one, other in zip(targets[:6], targets[6:], strict=True):
        assert torch.allclose(one, other, atol=1e-7)


def test_with_partners_labels_and_past_are_mixed_with_the_partners(targets):
    class Quarter(MixupSampler):
        def mix(self, inputs, draws, **pool):
            return super().mix(inputs, draws, **pool)._replace(share=torch.full((len(inputs),), 0.75))

    class Expected(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            epoch = trainer.current_epoch
            alpha, rows = 0.8 * (epoch + 1) / 3, []
            is_mix = is_mixed(2, epoch, batch_idx, probability=0.5)
            for part in (batch, batch.partner):
                for index, target in zip(part.index.tolist(), part.target.tolist(), strict=True):
                    label = [float(k == target) for k in range(3)]
                    past, known = pl_module.store.read(torch.tensor([index]))
                    rows.append((label, past[0].tolist() if known[0] else label, bool(known[0])))
            own, others = rows[: batch.size], rows[batch.size :]
            for (y, s, known), (other_y, other_s, other_known) in zip(own, others, strict=True):
                part = 0.25 if is_mix else 0.0
                label = [(1 - part) * a + part * b for a, b in zip(y, other_y, strict=True)]
                past = [(1 - part) * a + part * b for a, b in zip(s, other_s, strict=True)]
                has_past = known or (is_mix and other_known)
                refined = [(1 - alpha) * a + alpha * b for a, b in zip(label, past, strict=True)]
                wanted.append(refined if has_past else label)

    wanted, data = [], TinyDataModule()
    data.partners = True
    fitted(module_of(mixing=Quarter(), seed=2), data, max_epochs=3, callbacks=[Expected()])
    kinds = [is_mixed(2, epoch, number, probability=0.5) for epoch in range(3) for number in range(3)]
    assert 2 < sum(kinds) < 7
    assert torch.allclose(torch.cat(targets), torch.tensor(wanted), atol=1e-6)


def test_mixed_targets_are_hand_values(targets):
    class Pairs(MixupSampler):
        def mix(self, inputs, draws):
            return super().mix(inputs, draws)._replace(second=torch.tensor([1, 0]), share=torch.tensor([0.75, 0.5]))

    module = module_of(alpha_T=0.5, alpha_schedule="constant", mixing=Pairs(), mixing_probability=0.99)
    batch = Batch(torch.rand(2, *SHAPE), torch.tensor([0, 2]), torch.tensor([0, 1]))
    trainer = tiny_trainer()
    trainer.strategy.connect(module)
    module.trainer = trainer
    module.num_samples = 2
    module.store = module._new_store()
    module.store.write(torch.tensor([0]), torch.tensor([[0.5, 0.25, 0.25]]))
    module.store.advance()
    assert is_mixed(0, 0, trainer.fit_loop.batch_idx, probability=0.99)
    module.terms(batch)
    # Sample 0: label (1, 0, 0), past (1/2, 1/4, 1/4), target (3/4, 1/8, 1/8). Sample 1: label (0, 0, 1), no past.
    # Row 0 is 3/4 and 1/4 of them, row 1 a half of each.
    expected = [[0.5625, 0.09375, 0.34375], [0.375, 0.0625, 0.5625]]
    assert torch.allclose(targets[0], torch.tensor(expected), atol=1e-6)
    module.store.advance()
    assert module.store.read(torch.arange(2))[1].tolist() == [True, False]


def test_the_share_of_mixed_batches_is_the_probability_and_depends_on_seed_epoch_and_number():
    draws = {
        seed: [is_mixed(seed, epoch, number, probability=0.3) for epoch in range(50) for number in range(80)]
        for seed in (0, 1)
    }
    for seed in (0, 1):
        assert sum(draws[seed]) / 4000 == pytest.approx(0.3, abs=0.03)
        by_epoch = [tuple(draws[seed][80 * epoch : 80 * epoch + 80]) for epoch in range(50)]
        assert len(set(by_epoch)) == 50
    assert draws[0] != draws[1]
    random.seed(1)
    assert draws[0][:9] == [is_mixed(0, 0, number, probability=0.3) for number in range(9)]
    assert not any(is_mixed(0, 0, number, probability=0.0) for number in range(100))
    assert all(is_mixed(0, 0, number, probability=1.0) for number in range(100))


class OneBatch(Foreign):
    """No views, no index, always in the same order."""

    def train_dataloader(self):
        return DataLoader(self.images(), batch_size=11)


@pytest.mark.parametrize("data", [lambda: Plain(samples=8), OneBatch, lambda: IndexedDataModule(OneBatch())])
def test_mixed_inputs_change_with_the_epoch_and_not_with_the_global_seed(data):
    class Inputs(pl.Callback):
        def __init__(self):
            self.seen = []

        def setup(self, trainer, pl_module, stage):
            pl_module.student.register_forward_pre_hook(
                lambda network, args: self.seen.append(args[0].clone()) if network.training else None
            )

    runs = []
    for seed in (1, 2):
        inputs = Inputs()
        module = module_of(past="past_model", mixing=MixupSampler(), mixing_probability=1.0, cutout=3)
        torch.manual_seed(seed)
        fitted(module, data(), max_epochs=2, callbacks=[inputs])
        runs.append(inputs.seen)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert len(runs[0]) == 2
    assert not torch.equal(runs[0][0].sort(0).values, runs[0][1].sort(0).values)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_T": 1.1}, r"alpha_T must be in \[0, 1\], got 1.1"),
        ({"alpha_T": math.nan}, "alpha_T must be in"),
        (
            {"alpha_schedule": "cosine"},
            "alpha_schedule must be linear, constant or a function of progress, got 'cosine'",
        ),
        ({"alpha_unit": "batch"}, "alpha_unit must be one of epoch, step, got 'batch'"),
        ({"past": "teacher"}, "past must be one of stored, past_model, ema, got 'teacher'"),
        ({"store_dtype": "int8"}, "store_dtype must be one of float32, float16, bfloat16, got 'int8'"),
        ({"past_temperature": 0}, "past_temperature must be positive, got 0 and 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        (
            {"past": "past_model", "store_top_k": 2, "ema_decay": 0.9},
            "store_top_k would do nothing with past='past_mod",
        ),
        ({"past": "ema", "store_dtype": "float16", "num_samples": 9}, "store_dtype and num_samples would do nothing"),
        ({"past": "ema", "store_dir": "rows", "store_keep": 3}, "store_dir and store_keep would do nothing with past="),
        (
            {"past": "ema", "store_in_checkpoint": 0},
            "store_in_checkpoint would do nothing with past='ema': leave it out",
        ),
        ({"store_in_checkpoint": -1}, "store_in_checkpoint cannot be negative, got -1: 0 keeps every store in files"),
        ({"store_keep": 1}, "store_keep must be at least 2, .* got 1"),
        ({"past": "ema", "store_device": "cpu"}, "store_device would do nothing with past='ema': leave it out"),
        ({"refresh_epochs": 2}, "refresh_epochs would do nothing with past='stored': leave it out"),
        ({"ema_decay": 0.9}, "ema_decay would do nothing with past='stored': leave it out"),
        ({"store_device": "somewhere"}, "store_device='somewhere': "),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"cutout": -1}, "cutout cannot be negative"),
        ({"mixing_probability": -0.5}, r"mixing_probability must be in \[0, 1\], got -0.5"),
        ({"total_epochs": 0}, "total_epochs must be at least 1, got 0"),
        ({"refresh_epochs": 0}, "refresh_epochs must be at least 1, got 0"),
        ({"store_top_k": 0}, "store_top_k must be at least 1, got 0"),
        ({"store_top_k": 4}, "store_top_k cannot be larger than num_classes=3, got 4"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"mixing": MixupSampler(), "mixing_probability": 1.0}, "mixing_probability=1 mixes every one: lower it"),
        ({"num_classes": 4, "input_shape": SHAPE}, r"student \(TinyNet\) has 3 classes where num_classes=4"),
    ],
)
def test_refusals_name_what_is_wrong(options, message):
    with pytest.raises(InputError, match=message):
        module_of(**options)


def test_cutout_needs_images():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 3)

        def forward(self, inputs):
            return self.layer(inputs.flatten(1))

    class Vectors(Foreign):
        def images(self):
            return [(torch.rand(64), 0) for _ in range(11)]

    with pytest.raises(InputError, match="Cutout needs images"):
        fitted(SelfKDModule(Flat(), num_classes=3, cutout=2), IndexedDataModule(Vectors()))
    fitted(SelfKDModule(Flat(), num_classes=3, mixing=MixupSampler()), IndexedDataModule(Vectors()), max_epochs=2)


# Checkpoints


class Resumable(DataLoader):
    """Goes on in the middle of an epoch."""

    begin = done = 0

    def __iter__(self):
        begin, self.begin, self.done = self.begin, 0, 0
        for number, batch in enumerate(super().__iter__()):
            self.done = number + 1
            if number >= begin:
                yield batch

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.begin = state["done"] % len(self)


class ResumableData(TinyDataModule):
    def _loader(self, dataset, **options):
        loader = super()._loader(dataset, **options)
        return Resumable(dataset, batch_size=8, sampler=loader.sampler, collate_fn=loader.collate_fn)


def saver(kind, where, path):
    """Saves in epoch 2, and stops there."""

    class Save(kind):
        def save(self, trainer):
            trainer.save_checkpoint(path)
            trainer.should_stop = True

        def on_train_epoch_end(self, trainer, pl_module):
            if where == "epoch end" and trainer.current_epoch == 1:
                self.save(trainer)

        def on_validation_end(self, trainer, pl_module):
            if where == "validation end" and trainer.current_epoch == 1:
                self.save(trainer)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (where, trainer.current_epoch, batch_idx) in (
                ("batch 1", 1, 0),
                ("batch 2", 1, 1),
                ("last batch", 1, 2),
            ):
                self.save(trainer)

    return Save()


@pytest.mark.parametrize("past", [*PASTS, "every second epoch", "in files"])
@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (pl.callbacks.Checkpoint, "epoch end"),
        (pl.Callback, "epoch end"),
        (pl.Callback, "validation end"),
        (pl.Callback, "batch 1"),
        (pl.Callback, "batch 2"),
        (pl.Callback, "last batch"),
    ],
)
def test_a_run_goes_on_from_wherever_it_was_saved(past, kind, where, tmp_path):
    options = {"past": past, "norm": "batch"}
    if past == "every second epoch":
        options |= {"past": "past_model", "refresh_epochs": 2}
    if past == "in files":
        options |= {"past": "stored", "store_in_checkpoint": 0, "store_dir": str(tmp_path / "rows")}
    trainer = {"max_epochs": 4, "num_sanity_val_steps": 0}
    path, logs = tmp_path / "run.ckpt", [Logged(), Logged()]
    whole, resumed = module_of(**options), module_of(weights=5, **options)
    fitted(whole, ResumableData(), callbacks=[logs[0]], **trainer)
    stopping = {"callbacks": [saver(kind, where, path)], "enable_checkpointing": kind is pl.callbacks.Checkpoint}
    fitted(module_of(**options), ResumableData(), **stopping, **trainer)
    fitted(resumed, ResumableData(), callbacks=[logs[1]], ckpt_path=path, **trainer)
    assert same(state_of(whole), state_of(resumed))
    assert len(logs[0].epochs) == 4
    assert logs[0].epochs[2:] == logs[1].epochs[-2:]
    assert same(past_of(whole), past_of(resumed))
    assert logs[0].epochs[3]["train/known_fraction"] == 1


def test_rows_that_were_saved_in_the_middle_of_an_epoch_are_not_read_in_it(tmp_path):
    path, rows = tmp_path / "run.ckpt", []

    class First(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rows.append(past_of(pl_module)["probs"])

    fitted(module_of(), ResumableData(), max_epochs=3, callbacks=[saver(pl.Callback, "batch 2", path)])
    fitted(module_of(), ResumableData(), max_epochs=3, callbacks=[First()], ckpt_path=path)
    kept = torch.load(path, weights_only=True)["self_kd"]["past"]
    assert len(kept["pending"]) == 16
    assert torch.equal(rows[0], kept["probabilities"])
    assert len(rows) == 4
    assert torch.equal(rows[1][kept["pending"]], kept["pending_probabilities"])


def past_of(module):
    if module.past_network is not None:
        return state_of(module.past_network.network)
    return dict(zip(("probs", "known"), module.store.read(torch.arange(module.store.num_samples)), strict=True))


def saved(folder, *, stop_after=2, data=None, epochs=4, **options):
    """A checkpoint of a module after some of its epochs."""
    path = folder / "run.ckpt"

    class Save(pl.callbacks.Checkpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch + 1 == stop_after:
                trainer.save_checkpoint(path)
                trainer.should_stop = True

    fitted(module_of(**options), data, max_epochs=epochs, callbacks=[Save()], enable_checkpointing=True)
    return path


def test_a_checkpoint_of_another_training_set_is_refused(tmp_path):
    path = saved(tmp_path, data=TinyDataModule(samples=24))
    with pytest.raises(InputError, match="num_samples=24 and not 20: go on with the data"):
        fitted(module_of(), TinyDataModule(samples=20), ckpt_path=path, max_epochs=4)
    with pytest.raises(InputError, match="top_k=None and not 2"):
        fitted(module_of(store_top_k=2), ckpt_path=path, max_epochs=4)


def test_a_checkpoint_of_another_past_is_refused_and_of_another_method_gives_none(tmp_path):
    with pytest.raises(InputError, match="trained with past='stored', not 'ema': set it so"):
        fitted(module_of(past="ema"), ckpt_path=saved(tmp_path), max_epochs=4)
    other = SupervisedModule(TinyNet(norm="group"), num_classes=3, optimizer=sgd)
    trainer = fitted(other, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    for past in PASTS:
        logged = Logged()
        fitted(module_of(past=past), ckpt_path=tmp_path / "other.ckpt", max_epochs=3, callbacks=[logged])
        # What the network was when Self-KD took over is a past model; of predictions and averages there are none yet.
        assert [line["train/known_fraction"] for line in logged.epochs] == [float(past == "past_model"), 1.0]
    trainer = fitted(other, max_epochs=3)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    logged = Logged()
    module = module_of(past="past_model", refresh_epochs=2)
    fitted(module, ckpt_path=tmp_path / "other.ckpt", max_epochs=4, callbacks=[logged])
    assert logged.epochs[0]["train/known_fraction"] == 1


def test_another_length_than_the_checkpoints_is_warned_about(tmp_path):
    path = saved(tmp_path, epochs=4)
    with pytest.warns(UserWarning, match="trained towards 4 epochs, now they are 5: .* set total_epochs to keep it"):
        fitted(module_of(), ckpt_path=path, max_epochs=5)
    fitted(module_of(total_epochs=4), ckpt_path=path, max_epochs=5)


def test_a_training_that_begins_has_no_past_whatever_the_module_was_before(tmp_path, targets):
    for past in PASTS:
        path = saved(tmp_path, past=past)
        targets.clear()
        module = SelfKDModule.load_from_checkpoint(path, student=TinyNet(norm="group"), optimizer=sgd)
        assert module.past == past
        for data in (TinyDataModule(), TinyDataModule(samples=16)):
            fitted(module, data, max_epochs=2)
            assert all(set(row.tolist()) == {0, 1} for row in targets[0])
            assert not any(set(row.tolist()) == {0, 1} for row in targets[-1])
            targets.clear()


def test_a_training_that_goes_on_in_the_same_process_keeps_its_past():
    # Without momentum, which the second call would lose.
    once, twice = (module_of(total_epochs=4, optimizer=plain_sgd) for _ in range(2))
    fitted(once, max_epochs=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "alpha reaches alpha_T")
        trainer = fitted(twice, max_epochs=2)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(twice, datamodule=TinyDataModule())
    assert same(state_of(once), state_of(twice))


def test_a_checkpoint_of_weights_alone_holds_no_past(tmp_path):
    for past in PASTS:
        module = module_of(past=past)
        trainer = fitted(module)
        trainer.save_checkpoint(tmp_path / "all.ckpt")
        trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
        kept = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("all", "weights")]
        assert ["self_kd" in checkpoint for checkpoint in kept] == [True, False]
        assert kept[0]["self_kd"]["length"] == 1


def test_a_checkpoint_that_is_only_passed_on_keeps_its_past(tmp_path):
    path = saved(tmp_path)
    trainer = tiny_trainer()
    trainer.validate(module_of(), datamodule=TinyDataModule(), ckpt_path=str(path), verbose=False)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    first, second = (torch.load(file, weights_only=True)["self_kd"] for file in (path, tmp_path / "again.ckpt"))
    assert torch.equal(first["past"]["probabilities"], second["past"]["probabilities"])
    assert (second["kind"], second["epochs"], second["length"]) == ("stored", 2, 4)
    module = module_of()
    fitted(module, max_epochs=3)
    other = tiny_trainer(max_epochs=None, max_steps=-1, limit_val_batches=1)
    other.validate(module, datamodule=TinyDataModule(), verbose=False)
    other.save_checkpoint(tmp_path / "later.ckpt")
    assert torch.load(tmp_path / "later.ckpt", weights_only=True)["self_kd"]["length"] == 3


# A store in files


def in_files(folder, **options):
    return {"store_in_checkpoint": 0, "store_dir": None if folder is None else str(folder), **options}


def files_of(folder):
    return sorted(path.name.split(".", 1)[1] for path in folder.iterdir())


@pytest.mark.parametrize(
    "options", [{}, {"store_dtype": "float16", "store_top_k": 2}, {"mixing": MixupSampler()}], ids=str
)
def test_a_run_with_its_store_in_files_is_the_run_without_bit_for_bit(tmp_path, options, targets):
    modules = [module_of(**options), module_of(**in_files(tmp_path / "rows", **options))]
    for module in modules:
        fitted(module, max_epochs=4)
    assert same(*map(state_of, modules))
    assert same(*map(past_of, modules))
    assert all(torch.equal(a, b) for a, b in zip(targets[:12], targets[12:], strict=True))
    # A batch that is mixed is not stored: an epoch of such batches leaves the store as it was.
    last = modules[1].store.sidecar.generation
    assert last == 4 or "mixing" in options
    assert files_of(tmp_path / "rows") == [f"{last - 1:06d}.rows", f"{last:06d}.rows"]


@pytest.mark.parametrize(("limit", "beside"), [(24 * 3 * 4, False), (24 * 3 * 4 - 1, True), (2**26, False)])
def test_what_is_larger_than_the_limit_is_in_files_of_the_trainers_folder(tmp_path, limit, beside):
    module = module_of(store_in_checkpoint=limit)
    trainer = fitted(module, max_epochs=2, default_root_dir=str(tmp_path))
    assert (tmp_path / "self_kd_store").exists() == beside
    assert (module.store.sidecar is not None) == beside
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    kept = torch.load(tmp_path / "run.ckpt", weights_only=True)["self_kd"]["past"]
    assert ("probabilities" in kept) != beside
    assert ("sidecar" in kept) == beside
    assert kept["known"].all()


def test_every_training_has_files_of_its_own(tmp_path):
    module, rows = module_of(**in_files(tmp_path)), []
    for _ in range(2):
        fitted(module, max_epochs=1)
        rows.append(past_of(module)["probs"])
    assert files_of(tmp_path) == ["000001.rows"] * 2
    assert not torch.equal(*rows)


def test_a_checkpoint_may_be_moved_with_its_files_and_its_store_into_or_out_of_them(tmp_path):
    whole = module_of()
    fitted(whole, max_epochs=4)
    (tmp_path / "old").mkdir()
    path = saved(tmp_path / "old", **in_files(tmp_path / "old/rows"))
    before = saved(tmp_path)
    shutil.move(tmp_path / "old", tmp_path / "new")
    path = tmp_path / "new" / path.name
    with pytest.raises(InputError, match="000002.rows that .* are not in .*/else or .*/old/rows: name the fold"):
        fitted(module_of(**in_files(tmp_path / "else")), ckpt_path=path, max_epochs=4)
    runs = {
        "moved": (in_files(tmp_path / "new/rows"), path),
        "out of files": ({"store_dir": str(tmp_path / "new/rows")}, path),
        "into files": (in_files(tmp_path / "into"), before),
    }
    for name, (options, ckpt_path) in runs.items():
        resumed = module_of(weights=5, **options)
        fitted(resumed, ckpt_path=ckpt_path, max_epochs=4)
        assert same(state_of(whole), state_of(resumed)), name
        assert same(past_of(whole), past_of(resumed)), name


def test_a_file_that_is_not_kept_any_more_is_refused_but_for_the_last_checkpoints(tmp_path):
    paths = {}

    class Save(pl.callbacks.Checkpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch in (0, 2):
                paths[trainer.current_epoch] = tmp_path / f"{trainer.current_epoch}.ckpt"
                trainer.save_checkpoint(paths[trainer.current_epoch])

    options = in_files(tmp_path / "rows")
    run = {"max_epochs": 6, "num_sanity_val_steps": 0}
    fitted(module_of(**options), ResumableData(), callbacks=[Save()], enable_checkpointing=True, **run)
    assert files_of(tmp_path / "rows") == ["000003.rows", "000005.rows", "000006.rows"]
    with pytest.raises(
        InputError, match="000001.rows .*are not in .*rows: .* a larger store_keep keeps the files of more checkp"
    ):
        fitted(module_of(**options), ResumableData(), ckpt_path=paths[0], **run)
    whole, resumed = module_of(), module_of(weights=5, **options)
    fitted(whole, ResumableData(), **run)
    fitted(resumed, ResumableData(), ckpt_path=paths[2], **run)
    assert same(state_of(whole), state_of(resumed))
    # Its weights need no files.
    shutil.rmtree(tmp_path / "rows")
    SelfKDModule.load_from_checkpoint(paths[0], student=TinyNet(norm="group"), optimizer=sgd)


def test_a_folder_that_cannot_be_mapped_is_refused(tmp_path):
    trainer = SimpleNamespace(default_root_dir="s3://runs", train_dataloader=SimpleNamespace(dataset=range(5)))
    module = module_of(store_in_checkpoint=0)
    module._trainer = trainer
    with pytest.raises(
        InputError, match="cannot be mapped in default_root_dir=s3://runs: name a local folder as store_d"
    ):
        module._new_store()
    trainer.local_rank = 1
    module = module_of(**in_files(tmp_path, store_keep=3))
    module._trainer = trainer
    sidecar = module._new_store().sidecar
    assert (sidecar.folder, sidecar.keep, sidecar.writes) == (tmp_path, 3, False)


# Several processes


class Tell(pl.Callback):
    """Writes down what every process ends with."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        network = pl_module.past_network
        past = past_of(pl_module)
        shared = {} if network is None else dict(network.network.named_buffers())
        told = {"past": past, "state": state_of(pl_module), "buffers": shared}
        torch.save(told, Path(self.folder) / f"{trainer.global_rank}.pt")


def told(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("past", PASTS)
def test_two_processes_have_one_past(past, tmp_path):
    # 23 samples on two processes: one comes twice.
    options = {"optimizer": still} if past == "stored" else {"norm": "batch"}
    data, module = Plain(samples=23, batch_size=4), module_of(past=past, **options)
    # Validation would bring rank 0's statistics to all.
    trainer = {"limit_val_batches": 0, "devices": 2, "strategy": "ddp_spawn", "callbacks": [Tell(str(tmp_path))]}
    fitted(module, data, max_epochs=2, **trainer)
    first, second = told(tmp_path)
    assert same(first["past"], second["past"])
    if past == "stored":
        assert first["past"]["known"].all()
        batch = data.dataset("train").__getitems__(range(23))
        with torch.no_grad():
            assert torch.allclose(first["past"]["probs"], module.student(batch.input).softmax(1), atol=1e-6)
    else:
        # The processes' own statistics differ, so equal ones were shared.
        names = [name for name in first["state"] if name.endswith("running_mean")]
        assert not all(torch.equal(first["state"][name], second["state"][name]) for name in names)
        assert any("running_mean" in name for name in first["buffers"])


@pytest.mark.slow
@pytest.mark.parametrize("files", [False, True])
def test_a_run_of_one_process_goes_on_in_two(tmp_path, files):
    whole, options = module_of(), in_files(tmp_path / "rows") if files else {}
    fitted(whole, max_epochs=4)
    path = saved(tmp_path, **options)
    resumed = module_of(weights=5, **options)
    tell = Tell(str(tmp_path))
    data = TinyDataModule(batch_size=4)
    fitted(resumed, data, ckpt_path=path, max_epochs=4, devices=2, strategy="ddp_spawn", callbacks=[tell])
    for rank in told(tmp_path):
        for name, value in state_of(whole).items():
            assert torch.allclose(rank["state"][name], value, rtol=1e-4, atol=1e-5), name
        assert torch.allclose(rank["past"]["probs"], past_of(whole)["probs"], atol=1e-4)
        assert rank["past"]["known"].all()
    if files:
        # The first are those of the checkpoint.
        assert files_of(tmp_path / "rows") == ["000002.rows", "000003.rows", "000004.rows"]
        number = next((tmp_path / "rows").glob("*.000004.rows"))
        rows = torch.frombuffer(bytearray(number.read_bytes()[4096:-4]), dtype=torch.float32).reshape(24, 3)
        assert torch.equal(rows, told(tmp_path)[1]["past"]["probs"])


def stored(student, teachers, num_classes):
    return SelfKDModule(student, num_classes=num_classes)


def stored_small(student, teachers, num_classes):
    return SelfKDModule(student, num_classes=num_classes, store_dtype="float16", store_top_k=2)


def stored_in_files(student, teachers, num_classes):
    return SelfKDModule(student, num_classes=num_classes, store_dtype="float16", store_in_checkpoint=0)


def past_model(student, teachers, num_classes):
    return SelfKDModule(student, num_classes=num_classes, past="past_model", cutout=2)


def ema(student, teachers, num_classes):
    return SelfKDModule(student, num_classes=num_classes, past="ema", ema_decay=0.9, alpha_unit="step")


def mixed(student, teachers, num_classes):
    return SelfKDModule(student, num_classes=num_classes, mixing=MixupSampler(), cutout=2)


def mixed_with_partners(student, teachers, num_classes):
    return SelfKDModule(student, num_classes=num_classes, mixing=MixupSampler(), cutout=2, past="past_model")


mixed_with_partners.partners = True


@pytest.mark.parametrize("build", [stored, stored_small, stored_in_files, past_model, ema, mixed, mixed_with_partners])
@pytest.mark.parametrize("point", CONTRACT)
def test_contract(point, build, tmp_path, monkeypatch):
    # Where a Trainer that is told nothing else has its files.
    monkeypatch.chdir(tmp_path)
    if build is mixed and point == "two_processes_equal_one":
        pytest.skip("the partners of a mix come from a process's own batch")
    CONTRACT[point](build)
