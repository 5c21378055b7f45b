"""What the contract's points run a module on: networks and data of one kind of task."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import nn

from distill_lightning.data.batch import Batch
from distill_lightning.layers.call import call
from distill_lightning.testing.tiny import TinyDataModule, TinyNet
from distill_lightning.testing.tiny_detection import TinyDetectionDataModule, TinyFasterRCNN
from distill_lightning.testing.tiny_translation import TinyEncoderDecoder, TinyTranslationDataModule

Norm = Literal["batch", "group"]


class Kit:
    """Networks and data for the contract, and the names that its points need to know of them.

    The function that builds a module whose batches are of another kind than `ImageKit`'s has one as an attribute::

        def build(student, teachers, num_classes):
            return MyTranslation(student, num_classes=num_classes, pad_id=0)

        build.kit = TranslationKit()

    A kit of your own is a subclass that defines `network` and `data`, and what differs of the rest.

    Attributes:
        num_classes: of the networks.
        fewest_classes: the smallest number of classes that there can be.
        part: path of a layer in the network that can be frozen: BatchNorm, where it has one.
        head: name of a tensor in the network's state dict.
        waiting: packages whose own lines may wait for the device, because they do so whoever calls them.
        excluded: points that cannot hold in this kit, with the reason.
    """

    num_classes: int = 3
    fewest_classes: int = 2
    part: str = "features.1"
    head: str = "head.weight"
    waiting: ClassVar[frozenset[str]] = frozenset()
    excluded: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def network(self, num_classes: int, *, norm: Norm) -> nn.Module:
        """A student, or a teacher; with ``norm="group"`` one that treats every sample alone."""
        raise NotImplementedError(f"{type(self).__name__} must define network(num_classes, norm=...)")

    def data(self, **options: Any) -> pl.LightningDataModule:
        """Data whose training has 24 samples in batches of 8, or as ``samples``, ``batch_size`` and so on say.

        Args:
            options: any of ``num_classes``, ``samples``, ``batch_size`` and ``val_size``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define data(**options)")

    def examples(self) -> Any:
        """Inputs of a network, as a batch has them."""
        data = self.data()
        data.setup("test")
        return next(iter(data.test_dataloader())).input

    def run(self, network: nn.Module, inputs: Any) -> Any:
        """What is meant of what a network gives for a batch's inputs: tensors, in any nest of lists and dicts."""
        return call(network, inputs)

    def predict(self, network: nn.Module, batch: Batch) -> Any:
        """What a module's ``predict_step`` is to give for a batch, from the network alone."""
        return self.run(network, batch.input)


class ImageKit(Kit):
    """Images ``(N, 1, 8, 8)`` in classes, or with real targets: `TinyNet` and `TinyDataModule`.

    Args:
        num_targets: ``d`` of a regression, in the place of classes.
        partners: whether training views come with partners to be mixed with.
    """

    def __init__(self, *, num_targets: int | None = None, partners: bool = False) -> None:
        self.num_targets, self.partners = num_targets, partners

    def network(self, num_classes: int, *, norm: Norm) -> nn.Module:
        """A `TinyNet`, whose ``features`` can be tapped."""
        return TinyNet(None if self.num_targets else num_classes, num_targets=self.num_targets, norm=norm)

    def data(self, **options: Any) -> pl.LightningDataModule:
        """A `TinyDataModule`."""
        return TinyDataModule(num_targets=self.num_targets, partners=self.partners, **options)

    def examples(self) -> Any:
        """Seeded noise."""
        return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class TranslationKit(Kit):
    """Sentences of one to six words, padded: `TinyEncoderDecoder` and `TinyTranslationDataModule`."""

    num_classes = 12
    fewest_classes = 5
    part = "encoder.2"

    def network(self, num_classes: int, *, norm: Norm) -> nn.Module:
        """A `TinyEncoderDecoder`, which normalises every position alone."""
        return TinyEncoderDecoder(num_classes)

    def data(self, **options: Any) -> pl.LightningDataModule:
        """A `TinyTranslationDataModule`."""
        return TinyTranslationDataModule(**{"num_classes": self.num_classes, **options})

    def predict(self, network: nn.Module, batch: Batch) -> Any:
        """Token ids of the network's own ``generate``, without what they begin with."""
        source = {name: batch.input[name] for name in ("input_ids", "attention_mask")}
        generate: Any = network.generate
        return generate(**source, max_new_tokens=8)[:, 1:]


class DetectionKit(Kit):
    """Images ``(1, 32, 32)`` with one bright square each: `TinyFasterRCNN` and `TinyDetectionDataModule`."""

    num_classes = 2
    fewest_classes = 1
    part = "backbone.1"
    head = "roi_heads.box_predictor.cls_score.weight"
    # Which boxes are looked at depends on their scores.
    waiting = frozenset({"torchvision"})

    def network(self, num_classes: int, *, norm: Norm) -> nn.Module:
        """A `TinyFasterRCNN`."""
        return TinyFasterRCNN(num_classes, norm=norm)

    def data(self, **options: Any) -> pl.LightningDataModule:
        """A `TinyDetectionDataModule`."""
        return TinyDetectionDataModule(**{"num_classes": self.num_classes, **options})

    def run(self, network: nn.Module, inputs: Any) -> Any:
        """Of each image its boxes, labels and scores."""
        return network(inputs)
