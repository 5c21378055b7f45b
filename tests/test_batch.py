"""The batch that data modules yield and methods read."""

import pytest
import torch
from pytorch_lightning.utilities import move_data_to_device

from distill_lightning import Batch, InputError


def test_a_batch_unpacks_as_input_and_target():
    inputs, target = torch.zeros(2, 1), torch.ones(2)
    x, y, *rest = Batch(inputs, target)
    assert x is inputs
    assert y is target
    assert rest == [None, None]


def test_of_returns_a_batch_as_it_is():
    batch = Batch(torch.zeros(2), torch.ones(2), torch.arange(2), torch.arange(2))
    assert Batch.of(batch) is batch


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_of_reads_the_first_two_of_a_sequence(kind, extra):
    parts = [torch.full((2,), float(number)) for number in range(2 + extra)]
    batch = Batch.of(kind(parts))
    assert isinstance(batch, Batch)
    assert batch.input is parts[0]
    assert batch.target is parts[1]
    # What stands behind the target of a foreign batch has no known meaning.
    assert batch.index is None
    assert batch.view is None


@pytest.mark.parametrize(
    ("batch", "name"),
    [
        (torch.zeros(2, 2), "Tensor"),
        ({"input": 1, "target": 2}, "dict"),
        ("xy", "str"),
        ((torch.zeros(1),), "tuple"),
        ([], "list"),
        (None, "NoneType"),
    ],
)
def test_of_refuses_what_is_no_pair(batch, name):
    with pytest.raises(InputError, match=rf"an \(input, target\) pair, got {name}"):
        Batch.of(batch)


def test_moving_a_batch_keeps_its_type_and_its_missing_parts():
    moved = move_data_to_device(Batch(torch.zeros(2), torch.ones(2), torch.arange(2)), torch.device("meta"))
    assert isinstance(moved, Batch)
    assert [part.device.type for part in moved[:3]] == ["meta"] * 3
    assert moved.view is None


def test_an_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)
