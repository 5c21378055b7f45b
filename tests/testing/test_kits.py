"""The contract where batches are of another kind: what its networks and data promise, and that it still catches."""

from types import MappingProxyType

import pytest
import torch

from distill_lightning import DetectionModule, SupervisedModule
from distill_lightning.testing import (
    CONTRACT,
    DetectionKit,
    TinyDetectionDataModule,
    TinyEncoderDecoder,
    TinyFasterRCNN,
    TinyTranslationDataModule,
    TranslationKit,
    assert_module_contract,
)


def some(data):
    return next(iter(data.train_dataloader()))


def test_the_tiny_detector_draws_nothing_and_weighs_all_images_alike():
    torch.manual_seed(0)
    network, batch = TinyFasterRCNN(norm="group"), some(TinyDetectionDataModule())
    state = torch.get_rng_state()
    whole = network(batch.input, batch.target)
    halves = [network(batch.input[half], batch.target[half]) for half in (slice(4), slice(4, 8))]
    torch.manual_seed(7)
    assert all(torch.equal(loss, whole[name]) for name, loss in network(batch.input, batch.target).items())
    torch.set_rng_state(state)
    for name, loss in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, loss)


def test_each_true_box_is_where_the_square_is():
    data = TinyDetectionDataModule(samples=5)
    for image, target in zip(*list(some(data))[:2], strict=True):
        ((left, top, right, bottom),) = target["boxes"].int().tolist()
        inside = torch.zeros_like(image, dtype=torch.bool)
        inside[:, top:bottom, left:right] = True
        assert not (image[~inside] > 0.5).any()
        assert (image[:, [top, bottom - 1]][:, :, left:right] == 1).all()


def test_padding_does_not_change_what_the_tiny_encoder_decoder_gives():
    torch.manual_seed(0)
    network, data = TinyEncoderDecoder().eval(), TinyTranslationDataModule()
    batch = some(data)
    logits = network(**batch.input)
    for row in range(batch.size):
        source, target = int(batch.input["attention_mask"][row].sum()), int((batch.target[row] != data.pad_id).sum())
        alone = {name: value[row : row + 1, :source] for name, value in batch.input.items() if name[0] != "d"}
        given = network(**alone, decoder_input_ids=batch.input["decoder_input_ids"][row : row + 1, :target])
        torch.testing.assert_close(logits[row, :target], given[0])
        # Nor does what comes later.
        assert torch.equal(batch.input["decoder_input_ids"][row, 1:target], batch.target[row, : target - 1])


def test_a_translation_is_the_source_backwards():
    data = TinyTranslationDataModule()
    batch = some(data)
    for source, target in zip(batch.input["input_ids"].tolist(), batch.target.tolist(), strict=True):
        assert data.decode(target).split() == data.decode(source).split()[::-1]


# What the contract catches


def counts_padding(student, teachers, num_classes):
    return SupervisedModule(student, num_classes=num_classes)


counts_padding.kit = TranslationKit()


class WaitsBeside(DetectionModule):
    def terms(self, batch):
        terms = super().terms(batch)
        self.last = terms["classifier"].item()
        return terms


def waits_beside(student, teachers, num_classes):
    return WaitsBeside(student, num_classes=num_classes)


waits_beside.kit = DetectionKit()


def test_a_module_that_gives_logits_for_translations_is_caught():
    with pytest.raises(AssertionError, match="predict is not the student's output"):
        CONTRACT["prediction_is_the_students_alone"](counts_padding)


@pytest.mark.slow
def test_tokens_that_weigh_otherwise_in_another_process_are_caught():
    with pytest.raises(AssertionError, match="two processes log another"):
        CONTRACT["two_processes_equal_one"](counts_padding)


def test_only_the_detectors_own_waiting_is_overlooked():
    with pytest.raises(AssertionError, match=r"^3 hidden synchronisations in a step, \.item\(\)"):
        CONTRACT["a_training_step_does_not_wait_for_the_device"](waits_beside)


def test_points_that_a_kit_leaves_out_are_not_checked(monkeypatch):
    class Kit(TranslationKit):
        excluded = MappingProxyType(dict.fromkeys(CONTRACT, "nothing is checked here"))

    monkeypatch.setattr(counts_padding, "kit", Kit())
    assert_module_contract(counts_padding)
