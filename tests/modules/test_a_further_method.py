"""README's further method: one file that works everywhere a method of the package does."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from distill_lightning import Batch, TeacherStore
from distill_lightning.data.transforms import LabelSmoothing, Mixup
from distill_lightning.teachers.recorder import record
from distill_lightning.testing import CONTRACT, TinyDataModule, TinyNet, tiny_trainer

README = (Path(__file__).parents[2] / "README.md").read_text()
SCOPE = {}
# It ends with an example of its use, on other networks.
exec(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0].rpartition("\n\n\nmodule =")[0], SCOPE)
DKDModule = SCOPE["DKDModule"]


def build(student, teachers, num_classes):
    return DKDModule(student, teachers, num_classes=num_classes, beta=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("point", [name for name in CONTRACT if name != "two_processes_equal_one"])
def test_contract(point):
    CONTRACT[point](build)


def naive_terms(logits, teacher_logits, target, temperature):
    """Zhao et al., equations 4 to 7, class by class; the ensemble's prediction is the mean of the softmaxes."""
    tckd = nckd = 0.0
    for row, (z, label) in enumerate(zip(logits, target.tolist(), strict=True)):
        q = F.softmax(z / temperature, dim=0)
        p = torch.stack([F.softmax(t[row] / temperature, dim=0) for t in teacher_logits]).mean(dim=0)
        tckd += p[label] * (p[label] / q[label]).log() + (1 - p[label]) * ((1 - p[label]) / (1 - q[label])).log()
        for k in range(len(z)):
            if k != label:
                p_hat, q_hat = p[k] / (1 - p[label]), q[k] / (1 - q[label])
                nckd += p_hat * (p_hat / q_hat).log()
    return temperature**2 * tckd / len(logits), temperature**2 * nckd / len(logits)


def test_its_terms_are_the_papers():
    torch.manual_seed(0)
    teachers = [TinyNet(4), TinyNet(4)]
    module = DKDModule(TinyNet(4), teachers, num_classes=4, temperature=3.0).eval()
    batch = Batch(torch.rand(6, 1, 8, 8), torch.arange(6) % 4)
    terms = module.terms(batch)
    with torch.no_grad():
        logits = module.student(batch.input)
        tckd, nckd = naive_terms(logits, [teacher(batch.input) for teacher in teachers], batch.target, 3.0)
    assert torch.allclose(terms["tckd"], tckd, rtol=1e-4, atol=1e-6)
    assert torch.allclose(terms["nckd"], nckd, rtol=1e-4, atol=1e-6)
    assert torch.allclose(terms["ce"], F.cross_entropy(logits, batch.target))


def test_samples_that_do_not_count_change_nothing():
    module = DKDModule(TinyNet(4), [TinyNet(4)], num_classes=4).eval()
    images, target = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, -100, -100])
    alone, padded = module.terms(Batch(images[:4], target[:4])), module.terms(Batch(images, target))
    assert all(torch.allclose(alone[name], padded[name], rtol=1e-5) for name in ("ce", "tckd", "nckd"))


def test_it_takes_the_shared_transforms():
    transforms = [Mixup(probability=0.5), LabelSmoothing(0.1)]
    module = DKDModule(TinyNet(), [TinyNet()], num_classes=3, transforms=transforms)
    trainer = tiny_trainer()
    trainer.fit(module, datamodule=TinyDataModule())
    assert torch.isfinite(trainer.callback_metrics["train/nckd"])


@pytest.mark.slow
def test_a_store_takes_its_teachers_place(tmp_path):
    def trained(teachers):
        torch.manual_seed(0)
        module = build(TinyNet(3), teachers, 3)
        tiny_trainer(max_epochs=2).fit(module, datamodule=TinyDataModule(views=2))
        return module.student.state_dict()

    torch.manual_seed(1)
    networks = [TinyNet(3), TinyNet(3)]
    live = trained(networks)
    store = TeacherStore(tmp_path / "store", networks, dtype="float32")
    record(tiny_trainer(), build(TinyNet(3), store, 3), TinyDataModule(views=2))
    read = trained(TeacherStore(tmp_path / "store", dtype="float32"))
    assert all(torch.allclose(live[name].float(), value.float(), atol=1e-5) for name, value in read.items())
