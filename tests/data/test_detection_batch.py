"""Batches of images and boxes."""

import pytest
import torch

from distill_lightning import Batch, DetectionBatch
from distill_lightning.errors import InputError


def target(boxes=1):
    return {"boxes": torch.zeros(boxes, 4), "labels": torch.ones(boxes, dtype=torch.int64)}


def images():
    return [torch.zeros(3, 8, 6), torch.zeros(3, 5, 9)]


def test_it_counts_images_whatever_their_sizes_and_boxes():
    batch = DetectionBatch(images(), [target(0), target(5)], index=torch.tensor([4, 2]))
    assert (batch.size, batch.count) == (2, 2)
    assert batch.key.index.tolist() == [4, 2]
    counted = batch.replace(counted=torch.tensor([True, False]))
    assert isinstance(counted, DetectionBatch)
    assert counted.count == 1


def test_it_moves_with_all_its_tensors():
    batch = DetectionBatch(images(), [target(0), target(5)], index=torch.tensor([4, 2])).to("meta")
    assert {image.device.type for image in batch.input} == {"meta"}
    assert {value.device.type for one in batch.target for value in one.values()} == {"meta"}
    assert batch.key.index.device.type == "cpu"
    assert Batch.of(batch) is batch


@pytest.mark.parametrize("images", [tuple(images()), torch.zeros(2, 3, 4, 4)], ids=["list", "stack"])
def test_it_is_read_from_images_and_targets(images):
    batch = DetectionBatch.of((images, (target(), target(2))))
    assert batch.size == 2
    assert isinstance(batch.input, list)
    assert len(batch.target[1]["labels"]) == 2
    assert DetectionBatch.of(batch) is batch
    assert DetectionBatch.of({"image": images}).target is None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(2, 5), [target(), target()]), r"tensors \(C, H, W\), got Tensor"),
        ((images(), torch.zeros(2)), "list of 2 dicts with boxes and labels, got Tensor"),
        ((images(), [target()]), "list of 2 dicts"),
        ((images(), [{"boxes": torch.zeros(0, 4)}] * 2), "list of 2 dicts"),
        (3, "a batch must be a Batch"),
    ],
)
def test_other_batches_are_refused(batch, message):
    with pytest.raises(InputError, match=message):
        DetectionBatch.of(batch)
