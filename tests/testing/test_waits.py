"""What waits for a device is found on the CPU, by the line that does it; what does not wait is let pass."""

import inspect
import re

import numpy as np
import pytest
import torch
from torch import nn

from distill_lightning import SupervisedModule
from distill_lightning.testing import CONTRACT, Build, TinyNet, assert_module_contract
from distill_lightning.testing.waits import Waits

POINT = "a_training_step_does_not_wait_for_the_device"


def write_masked(x):
    other = x.clone()
    other[x > 0] = x.new_ones(4)


# What a GPU says of them is below.
WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if (x > 0).all() else 0,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().cpu().numpy(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "to device cpu": lambda x: x.to(device="cpu"),
    "mask": lambda x: x[x > 0].mean(),
    "mask of rows": lambda x: x[x.sum(1) > 0],
    "mask and a slice": lambda x: x[x.sum(1) > 0, 1:],
    "mask written to": write_masked,
    "nonzero": lambda x: (x > 0).nonzero(),
    "where": lambda x: torch.where(x > 0),
    "argwhere": lambda x: torch.argwhere(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique rows": lambda x: x.unique(dim=0),
    "bincount": lambda x: torch.bincount(x.abs().long().flatten()),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x + 1),
    "repeats": lambda x: x[:, 0].repeat_interleave(x[:, 0].abs().long()),
}
PASSING = {
    "sum": lambda x: x.sum() * 2,
    "where with both": lambda x: torch.where(x > 0, x, 0.0).mean(),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0),
    "mask filled": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "index of numbers": lambda x: x[torch.zeros(2, dtype=torch.long, device=x.device)],
    "slice": lambda x: x[1:, None],
    "gather": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    "sort": lambda x: x.sort(dim=1).values.cumsum(1),
    "shape": lambda x: x.mean() / len(x) + x.shape[0],
    "repeats of known length": lambda x: x[:, 0].repeat_interleave(2),
    "to another type": lambda x: x.to(torch.float64),
    "to another device": lambda x: torch.ones(3).to(x.device),
    "made on the host": lambda x: torch.arange(3).sum().item() + float(torch.tensor([1.0, 2.0]).mean()),
    "made on the host, for numpy": lambda x: np.asarray(torch.linspace(0, 1, 3) * 2),
}


def tensor(device="cpu"):
    return torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 0.5]], device=device)


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_found(name):
    given = tensor()
    with Waits() as waits:
        WAITING[name](given)
    assert waits.found
    assert all(__file__ in wait.stack for wait in waits.found)


@pytest.mark.parametrize("name", PASSING)
def test_what_does_not_wait_passes(name):
    given = tensor()
    with Waits() as waits:
        PASSING[name](given)
    assert not waits.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the reference is a GPU")
@pytest.mark.parametrize("name", [*WAITING, *PASSING])
def test_a_gpu_agrees(name):
    given = tensor("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if name in PASSING:
            PASSING[name](given)
        else:
            with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
                WAITING[name](given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_told_to_be_on_the_host_may_be_read_with_all_that_comes_of_it():
    key, other = torch.tensor([3, 4]), torch.tensor([5, 6])
    with Waits() as waits:
        waits.keep_on_host(key)
        key.tolist()
        (key[:1] + 1).numpy()
        assert not waits.found
        (key + other).tolist()
    assert [wait.what for wait in waits.found] == [".tolist()"]


def test_backward_is_looked_at_too():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    given = tensor().requires_grad_()
    with Waits() as waits:
        Reads.apply(given).sum().backward()
    (wait,) = waits.found
    assert "grad * grad.sum().item()" in wait.stack


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_pytorchs_optimisers_read_what_is_on_the_host(kind):
    layer = nn.Linear(3, 2)
    optimizer = kind(layer.parameters(), lr=0.1)
    with Waits() as waits:
        for _ in range(2):
            optimizer.zero_grad()
            layer(tensor()).sum().backward()
            optimizer.step()
    assert not waits.found


# In the contract


class Masked(SupervisedModule):
    def terms(self, batch):
        chosen = batch.target > 0
        logits = self.student(batch.input)[chosen]  # this line waits
        return {"ce": logits.square().mean()}


def masked(student, teachers, num_classes):
    return Masked(student, num_classes=num_classes)


def test_the_contract_names_the_line_that_waits():
    with pytest.raises(AssertionError) as raised:
        CONTRACT[POINT](masked)
    message = str(raised.value)
    # Each of the three steps, forward and backward.
    assert message.startswith("6 hidden synchronisations in a step, indexing with a boolean mask")
    line = next(n for n, text in enumerate(inspect.getsource(Masked).splitlines()) if "this line waits" in text)
    number = inspect.getsourcelines(Masked)[1] + line
    assert re.search(
        rf'test_waits.py", line {number}, in terms\n +logits = self.student\(batch.input\)\[chosen\]', message
    )
    # Neither PyTorch's lines, nor those of the test that calls the contract.
    assert "site-packages" not in message
    assert "raises" not in message


class ReadsTheKey(SupervisedModule):
    def terms(self, batch):
        self.seen = batch.key.index.tolist()
        return super().terms(batch)


class ReadsTheIndex(SupervisedModule):
    def terms(self, batch):
        self.seen = batch.index.tolist()
        return super().terms(batch)


def reads_the_key(student, teachers, num_classes):
    return ReadsTheKey(student, num_classes=num_classes)


def reads_the_index(student, teachers, num_classes):
    return ReadsTheIndex(student, num_classes=num_classes)


def test_the_key_is_on_the_host_and_the_index_is_not():
    CONTRACT[POINT](reads_the_key)
    with pytest.raises(AssertionError, match=r"\.tolist\(\)"):
        CONTRACT[POINT](reads_the_index)


@pytest.mark.parametrize("shown", [assert_module_contract, Build])
def test_help_shows_how_build_looks(shown):
    example = re.search(
        r"def build\(student, teachers, num_classes\):\n +return MyModule\((.*?)\)\n", inspect.getdoc(shown)
    )
    assert example[1] == "student, teachers, num_classes=num_classes"
    assert tuple(inspect.signature(Build.__call__).parameters)[1:] == ("student", "teachers", "num_classes")
    assert isinstance(masked(TinyNet(), [], 3), SupervisedModule)
