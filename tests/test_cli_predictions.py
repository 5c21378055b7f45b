"""``predict`` on the command line: translations as text and boxes as COCO's results, by the configuration alone."""

import json

import pytest
import yaml

from distill_lightning import SelfKDDetectionModule, SelfKDTranslationModule
from distill_lightning.cli import main
from distill_lightning.testing import (
    TinyDetectionDataModule,
    TinyEncoderDecoder,
    TinyFasterRCNN,
    TinyTranslationDataModule,
)

MODELS = {
    "translation": ("SelfKDTranslationModule", "TinyEncoderDecoder", {"pad_id": 0}),
    "detection": ("SelfKDDetectionModule", "TinyFasterRCNN", {}),
}
DATA = {"translation": TinyTranslationDataModule, "detection": TinyDetectionDataModule}


@pytest.fixture
def fitted(tmp_path, monkeypatch):
    """Trains for an epoch, and returns the arguments of ``predict``, with callbacks in the configuration or not."""
    monkeypatch.chdir(tmp_path)

    def trained(task, callbacks):
        module, network, options = MODELS[task]
        student = {"class_path": f"distill_lightning.testing.{network}"}
        config = {
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": "out"},
            "model": {"class_path": module, "init_args": {"student": student, **options}},
            "data": {"class_path": f"distill_lightning.testing.{DATA[task].__name__}", "init_args": {"samples": 7}},
        }
        config["trainer"]["callbacks"] = callbacks
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        assert main(["fit", "--config", "config.yaml"]) == 0
        (checkpoint,) = tmp_path.rglob("*.ckpt")
        return ["predict", "--config", "config.yaml", "--ckpt_path", str(checkpoint)], checkpoint

    return trained


def translations(checkpoint):
    data = TinyTranslationDataModule(samples=7)
    module = SelfKDTranslationModule.load_from_checkpoint(
        checkpoint, student=TinyEncoderDecoder(), decode=data.decode
    ).eval()
    return [text for batch in data.test_dataloader() for text in module.translate(batch)]


def boxes(checkpoint):
    module = SelfKDDetectionModule.load_from_checkpoint(checkpoint, student=TinyFasterRCNN()).eval()
    images = [
        (number, image)
        for batch in TinyDetectionDataModule(samples=7).test_dataloader()
        for image, number in zip(batch.input, (int(target["image_id"]) for target in batch.target), strict=True)
    ]
    return [
        (number, int(label), [left, top, right - left, bottom - top], score)
        for number, image in images
        for found in module([image])
        for label, (left, top, right, bottom), score in zip(
            found["labels"], found["boxes"].tolist(), found["scores"].tolist(), strict=True
        )
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", [None, "here/translations.txt"])
def test_translations_are_written_as_text(path, fitted, tmp_path, capsys):
    callbacks = [{"class_path": "TranslationSamples", "init_args": {"samples": 2}}]
    if path is not None:
        callbacks.append({"class_path": "TranslationWriter", "init_args": {"path": path}})
    arguments, checkpoint = fitted("translation", callbacks)
    (table,) = (tmp_path / "out").rglob("val_translations_1.csv")
    assert len(table.read_text().splitlines()) == 3
    assert main(arguments) == 0
    written = path or "out/lightning_logs/version_1/predictions.txt"
    assert f"Written: {written}" in capsys.readouterr().out
    assert (tmp_path / written).read_text().splitlines() == translations(checkpoint)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("path", [None, "here/boxes.json"])
def test_boxes_are_written_as_cocos_results(path, fitted, tmp_path, capsys):
    callbacks = [{"class_path": "DetectionFigures", "init_args": {"samples": 2, "threshold": 0.1}}]
    if path is not None:
        callbacks.append({"class_path": "DetectionWriter", "init_args": {"path": path}})
    arguments, checkpoint = fitted("detection", callbacks)
    assert list((tmp_path / "out").rglob("val_detections_1.png"))
    assert main(arguments) == 0
    written = path or "out/lightning_logs/version_1/predictions.json"
    assert f"Written: {written}" in capsys.readouterr().out
    found = json.loads((tmp_path / written).read_text())
    expected = boxes(checkpoint)
    assert len(found) == len(expected) > 7
    for row, (number, label, box, score) in zip(found, expected, strict=True):
        assert (row["image_id"], row["category_id"]) == (number, label)
        assert row["bbox"] == pytest.approx(box, rel=1e-4, abs=1e-4)
        assert row["score"] == pytest.approx(score, rel=1e-4)
