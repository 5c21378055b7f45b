"""What a comparison of translations, or of detectors, measures: what its modules log in a test."""

from __future__ import annotations

from collections.abc import Mapping

from distill_lightning.errors import InputError
from distill_lightning.pages import fixed
from distill_lightning.studies.compare.task import Column, Task


class ScoredTask(Task):
    """Reads what ``trainer.test`` logs under ``test/``, which a run keeps in the place of its outputs."""

    def scores_of(self, who: str, logged: Mapping[str, float]) -> dict[str, float]:
        """The values of all columns by name, and whatever else was logged under ``test/``.

        Args:
            who: names the module, for the message.
            logged: by the names under which they were logged.

        Raises:
            InputError: the headline is not among them.
        """
        found = {name.removeprefix("test/"): value for name, value in logged.items() if name.startswith("test/")}
        key = self.headline.name.removeprefix("test_")
        if key not in found:
            raise InputError(f"{who} logged no test/{key} in its test, only {', '.join(logged)}: let it log that")
        first = {self.headline.name: found.pop(key)}
        columns = {column.name: found.pop(column.name, float("nan")) for column in self.columns}
        return {**first, **columns, **found}


class Translation(ScoredTask):
    """Translations of the test sentences, and the probabilities of the tokens of their references."""

    headline = Column("test_bleu", "BLEU", 1, 2)
    quantity = "BLEU"
    columns = (
        Column("chrf", "chrF", 1, 2),
        Column("nll", "NLL", mode="min"),
        Column("ece", "ECE %", 100, 2, mode="min", of_confidence=True),
        Column("perplexity", mode="min"),
        Column("accuracy"),
    )
    # BLEU needs a beam search, which is too dear for every epoch.
    monitor = "val/nll"
    mode = "min"
    watched = "NLL (nats per token)"
    samples = "test sentences"
    module = "TranslationModule"
    _legend = """\
BLEU: on the test sentences with the weights after the last epoch, which all columns but the next describe
sel.: BLEU with the weights of the epoch whose NLL was best on the validation sentences
chrF: character n-gram F-score; NLL: mean negative log-likelihood of the references' tokens (nats per token)"""
    _confidence_legend = "ECE: expected calibration error of the tokens' probabilities"

    def validation_score(self, metrics: Mapping[str, float]) -> str:
        """The negative log-likelihood."""
        return f"validation NLL {fixed(metrics[self.monitor], 3)}"


class Detection(ScoredTask):
    """Boxes on the test images."""

    headline = Column("test_map", "mAP %", 100, 2)
    quantity = "mAP"
    columns = (
        Column("map_50", "mAP@50 %", 100, 2),
        Column("voc07_map_50", "VOC07 mAP@50 %", 100, 2),
        Column("ece", "ECE %", 100, 2, mode="min", of_confidence=True),
    )
    monitor = "val/map_50"
    mode = "max"
    watched = "mAP@50"
    watched_scale = 100
    module = "DetectionModule"
    _legend = """\
mAP: mean average precision over overlaps from 0.5 to 0.95, on the test images with the weights after the last epoch,
which all columns but the next describe; sel.: with the weights of the epoch whose mAP@50 was best in validation
mAP@50: at an overlap of 0.5; VOC07: the 11-point figure of that challenge"""
    _confidence_legend = "ECE: expected calibration error of the class scores of the detected boxes"

    def validation_score(self, metrics: Mapping[str, float]) -> str:
        """The mean average precision at an overlap of one half."""
        return f"validation mAP@50 {100 * metrics[self.monitor]:.1f} %"
