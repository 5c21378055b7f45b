"""Outputs for positions whose classes stand in the second dimension, in the last one, or may stand in either."""

import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from distill_lightning import (
    Batch,
    Categorical,
    CompressionBaseline,
    InputError,
    KDModule,
    PastModel,
    SelfKDModule,
    SupervisedModule,
    TeacherStore,
)
from distill_lightning.data.datamodules import IndexedDataModule
from distill_lightning.testing import tiny_trainer

K = 4


class Segmenter(nn.Module):
    """Logits ``(N, K, H, W)`` of images, or ``(N, K, L)`` of flattened ones; ``(N, H, W, K)`` if ``last``."""

    def __init__(self, *, last=False, flat=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.last, self.flat = nn.Conv2d(1, K, 3, padding=1), last, flat

    def forward(self, images):
        logits = self.conv(images)
        logits = logits[:, :, 0] if self.flat else logits
        return logits.movedim(1, -1) if self.last else logits


def second(**options):
    return Categorical(K, class_dim="second", **options)


def batch_of(size=K, *, flat=False, count=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 1, size, size, generator=generator)
    shape = (count, size) if flat else (count, size, size)
    target = torch.randint(0, K, shape, generator=generator)
    target[0, 0] = -100
    return Batch(images, target)


def places(logits, target):
    """Each position's logits and class, one after another, by plain indexing; ``logits`` is ``(N, K, ...)``."""
    for sample, classes in zip(logits.tolist(), target.tolist(), strict=True):
        rows = (
            [sample]
            if not isinstance(classes[0], list)
            else [[plane[r] for plane in sample] for r in range(len(classes))]
        )
        lines = [classes] if not isinstance(classes[0], list) else classes
        for row, line in zip(rows, lines, strict=True):
            for place, label in enumerate(line):
                if label != -100:
                    yield [values[place] for values in row], label


def log_softmax(row, temperature=1.0):
    total = math.log(sum(math.exp(value / temperature) for value in row))
    return [value / temperature - total for value in row]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_losses_and_metrics_read_the_classes_where_they_stand(flat, last):
    output = Categorical(K, class_dim="last" if last else "second")
    student, teacher = Segmenter(last=last, flat=flat), Segmenter(last=last, flat=flat, seed=1)
    module = KDModule(student, teacher, num_classes=K, output=output, temperature=2.0)
    batch = batch_of(flat=flat)
    ce = kl = hits = count = 0
    with torch.no_grad():
        plain, other = Segmenter(flat=flat)(batch.input), Segmenter(flat=flat, seed=1)(batch.input)
        pairs = zip(places(plain, batch.target), places(other, batch.target), strict=True)
        for (row, label), (wise, _) in pairs:
            ce -= log_softmax(row)[label]
            own, says = log_softmax(row, 2.0), log_softmax(wise, 2.0)
            kl += 4 * sum(math.exp(q) * (q - p) for q, p in zip(says, own, strict=True))
            hits += row.index(max(row)) == label
            count += 1
        terms = module.terms(module.prepared(batch))
        assert terms["ce"].item() == pytest.approx(ce / count, rel=1e-5)
        assert terms["kd"].item() == pytest.approx(kl / count, rel=1e-4)
        scores = module.score([batch])
        assert scores["accuracy"] == pytest.approx(hits / count)
        assert scores["nll"] == pytest.approx(ce / count, rel=1e-5)
        # Who asks the student himself gets what it says.
        assert module(batch.input).shape == student(batch.input).shape


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_self_kd_softens_every_position_by_its_own_past(flat, last):
    output, alpha = Categorical(K, class_dim="last" if last else "second"), 0.3
    module = SelfKDModule(Segmenter(last=last, flat=flat), num_classes=K, output=output, past=PastModel())
    module.alpha = SimpleNamespace(at=lambda _trainer: alpha)
    module._trainer = SimpleNamespace(world_size=1, current_epoch=1, global_rank=0)
    module.past.network.model, module.past.network.ready = Segmenter(last=last, flat=flat, seed=1), True
    batch = batch_of(flat=flat)
    loss = at_label = agree = count = 0
    with torch.no_grad():
        plain, other = Segmenter(flat=flat)(batch.input), Segmenter(flat=flat, seed=1)(batch.input)
        pairs = zip(places(plain, batch.target), places(other, batch.target), strict=True)
        for (row, label), (past, _) in pairs:
            says = [math.exp(value) for value in log_softmax(past)]
            q = [(1 - alpha) * (k == label) + alpha * says[k] for k in range(K)]
            loss -= sum(value * log for value, log in zip(q, log_softmax(row), strict=True))
            at_label += q[label]
            agree += row.index(max(row)) == past.index(max(past))
            count += 1
        assert count < batch.target.numel()
        terms = module.terms(module.prepared(batch))
    assert terms["self_kd"].item() == pytest.approx(loss / count, rel=1e-5)
    assert float(module._observed["target_gt_prob"]) == pytest.approx(at_label / count, rel=1e-5)
    assert float(module._observed["agree_past"]) == pytest.approx(agree / count, rel=1e-5)
    assert float(module._observed["known_fraction"]) == 1


def loaders(size=K):
    batch = batch_of(size, count=8)
    data = torch.utils.data.TensorDataset(batch.input, batch.target)
    return torch.utils.data.DataLoader(data, batch_size=4)


@pytest.mark.parametrize(
    "make",
    [
        lambda network, **options: SupervisedModule(network, num_classes=K, **options),
        lambda network, **options: KDModule(
            network, Segmenter(last=network.last, seed=1), num_classes=K, hard_label_weight=0.0, **options
        ),
        lambda network, **options: CompressionBaseline(network, num_classes=K, steps=[], **options),
    ],
    ids=["supervised", "kd", "compression"],
)
@pytest.mark.filterwarnings("ignore:.* little better than guessing:UserWarning")
def test_what_can_be_read_in_two_ways_is_refused_in_every_method(make):
    for last in (False, True):
        with pytest.raises(
            InputError, match=r"gives \(4, 4, 4, 4\), which has 4 entries.*class_dim='second'"
        ) as caught:
            tiny_trainer().fit(make(Segmenter(last=last)), loaders(), loaders())
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match="which has 4 entries"):
            tiny_trainer().validate(make(Segmenter(last=last)), loaders(), verbose=False)
        output = Categorical(K, class_dim="last" if last else "second")
        found = []
        for network in (Segmenter(last=last), Segmenter(last=not last)):
            other = output if network.last is last else Categorical(K, class_dim="second" if last else "last")
            module = make(network, output=other)
            tiny_trainer(max_epochs=2).fit(module, loaders(), loaders())
            found.append(module.student.conv.weight)
        assert torch.allclose(*found, atol=1e-6)


def test_a_teacher_that_can_be_read_in_two_ways_is_refused():
    module = KDModule(Segmenter(last=True), Segmenter(last=True, seed=1), num_classes=K)
    module.guard._knows_layout = True
    with pytest.raises(InputError, match=r"teacher 0 \(Segmenter\) gives \(6, 4, 4, 4\), which has 4 entries"):
        module.terms(module.prepared(batch_of()))


def test_a_batch_with_as_many_positions_as_classes_is_read_as_those_before():
    module = KDModule(Segmenter(last=True), Segmenter(last=True, seed=1), num_classes=K)
    module.terms(module.prepared(batch_of(5)))
    told = KDModule(
        Segmenter(last=True), Segmenter(last=True, seed=1), num_classes=K, output=Categorical(K, class_dim="last")
    )
    batch = batch_of()
    for name, value in module.terms(module.prepared(batch)).items():
        assert torch.equal(value, told.terms(told.prepared(batch))[name])


def test_classes_in_the_second_dimension_are_named_as_the_way_out():
    with pytest.raises(InputError, match=r"has an output of shape \(1, 4, 6, 6\).*class_dim='second'\), or build it"):
        SupervisedModule(Segmenter(), num_classes=K, input_shape=(1, 6, 6))
    module = SupervisedModule(Segmenter(), num_classes=K, input_shape=(1, 6, 6), output=second())
    assert module.terms(module.prepared(batch_of(6)))["ce"].ndim == 0
    with pytest.raises(InputError, match=r"has an output of shape \(1, 6, 6, 4\) where num_classes=4 is needed: build"):
        SupervisedModule(Segmenter(last=True), num_classes=K, input_shape=(1, 6, 6), output=second())
    with pytest.raises(InputError, match="class_dim must be one of last, second, got 'first'"):
        Categorical(K, class_dim="first")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:'pin_memory' argument is set")
@pytest.mark.parametrize("keep", ["answers", "logits"])
def test_a_store_answers_with_the_classes_where_methods_read_them(keep, tmp_path):
    def module(teachers):
        return KDModule(Segmenter(), teachers, num_classes=K, output=second(), temperature=2.0)

    def fitted(one):
        torch.manual_seed(0)
        data = IndexedDataModule(pl.LightningDataModule.from_datasets(loaders(6).dataset, batch_size=4))
        tiny_trainer(max_epochs=2, limit_val_batches=0).fit(one, datamodule=data)
        return one.student.conv.weight

    store = TeacherStore(tmp_path, Segmenter(seed=1), dtype="float32", keep=keep, data="random images")
    online, stored = fitted(module(Segmenter(seed=1))), fitted(module(store))
    assert store.is_complete
    torch.testing.assert_close(online, stored, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_tells_where_the_classes_stand(tmp_path):
    module = SupervisedModule(Segmenter(), num_classes=K, output=second())
    trainer = tiny_trainer()
    trainer.fit(module, loaders(), loaders())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = SupervisedModule.load_from_checkpoint(tmp_path / "last.ckpt", student=Segmenter())
    assert loaded.output == second()
