"""Predictions as text and as COCO's results: their format, their order, and several processes."""

import json

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from distill_lightning import (
    DetectionModule,
    FashionVOC,
    InputError,
    SupervisedModule,
    TranslationModule,
    VOCDetectionDataModule,
    write_fashion_voc,
)
from distill_lightning.callbacks import DetectionWriter, TranslationWriter, writer_for
from distill_lightning.data.batch import Batch
from distill_lightning.data.detection_batch import DetectionBatch
from distill_lightning.outputs import Boxes
from distill_lightning.testing import (
    TinyDataModule,
    TinyDetectionDataModule,
    TinyEncoderDecoder,
    TinyFasterRCNN,
    TinyNet,
    TinyTranslationDataModule,
    tiny_trainer,
)


class Echo(pl.LightningModule):
    """Translates a number into the word for it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def translate(self, batch):
        return [f"number {number}" for number in batch.input["input_ids"].flatten().tolist()]

    def predict_step(self, batch, batch_idx):
        batch = Batch.of(batch)
        texts = self.translate(batch)
        return texts if batch.counted is None else [texts[row] for row in batch.counted.nonzero().flatten()]


class Numbers(Dataset):
    """The numbers from 0 on."""

    def __init__(self, count, first=0):
        self.count, self.first = count, first

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        return {"input_ids": torch.tensor([self.first + place])}


class Finds(pl.LightningModule):
    """Finds the true boxes of the images that count, with the image's own number as the score."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.output = Boxes(2)

    def predict_step(self, batch, batch_idx):
        batch = DetectionBatch.of(batch)
        counted = [True] * batch.size if batch.counted is None else batch.counted.tolist()
        rows = zip(batch.target, batch.index.tolist(), counted, strict=True)
        return [
            {
                "boxes": target["boxes"],
                "labels": target["labels"],
                "scores": torch.full(target["labels"].shape, number / 64),
            }
            for target, number, counts in rows
            if counts
        ]


def results(dataset):
    """COCO's results of `Finds`, image by image."""
    for number, (label, (left, top, right, bottom)) in enumerate(
        zip(dataset.labels.tolist(), dataset.boxes.tolist(), strict=True)
    ):
        yield {
            "image_id": dataset.first + number,
            "category_id": label,
            "bbox": [left, top, right - left, bottom - top],
            "score": number / 64,
        }


def test_a_line_for_each_sentence_is_what_the_module_translates(tmp_path):
    data = TinyTranslationDataModule(samples=11, batch_size=4)
    module = TranslationModule(TinyEncoderDecoder(), num_classes=12, pad_id=0)
    writer = TranslationWriter(path=tmp_path / "a" / "b.txt")
    tiny_trainer(callbacks=[writer]).predict(module, datamodule=data)
    assert writer.written == [tmp_path / "a" / "b.txt"]
    expected = [text for batch in data.predict_dataloader() for text in module.translate(batch)]
    assert len(expected) == 11
    assert (tmp_path / "a" / "b.txt").read_text() == "".join(f"{text}\n" for text in expected)


def test_a_translation_of_two_lines_is_one_line(tmp_path):
    class Broken(Echo):
        def predict_step(self, batch, batch_idx):
            return ["a\nb", "ä"]

    writer = TranslationWriter(path=tmp_path / "out.txt")
    tiny_trainer(callbacks=[writer]).predict(Broken(), DataLoader(Numbers(2), 2))
    assert (tmp_path / "out.txt").read_bytes() == "a b\nä\n".encode()


def test_samples_stand_where_their_index_says(tmp_path):
    batches = [
        Batch({"input_ids": torch.tensor([[7], [3]])}, index=torch.tensor([7, 3])),
        Batch({"input_ids": torch.tensor([[5], [7]])}, index=torch.tensor([5, 7]), counted=torch.tensor([True, False])),
    ]
    writer = TranslationWriter(path=tmp_path / "out.txt")
    tiny_trainer(callbacks=[writer]).predict(Echo(), DataLoader(batches, batch_size=None))
    assert (tmp_path / "out.txt").read_text() == "number 3\nnumber 5\nnumber 7\n"


def test_a_sentence_without_a_token_that_counts_has_a_line(tmp_path):
    class Translates(Echo):
        def predict_step(self, batch, batch_idx):
            return ["one", "two", "three"]

    target = torch.tensor([[5, -100], [-100, -100], [4, 2]])
    batch = Batch({"input_ids": torch.tensor([[1], [2], [3]])}, target, torch.tensor([2, 1, 0]))
    tiny_trainer(callbacks=[TranslationWriter(path=tmp_path / "out.txt")]).predict(
        Translates(), DataLoader([batch], batch_size=None)
    )
    assert (tmp_path / "out.txt").read_text() == "three\ntwo\none\n"


def test_boxes_are_cocos_results(tmp_path):
    data = TinyDetectionDataModule(samples=7, batch_size=3)
    writer = DetectionWriter(path=tmp_path / "out.json")
    tiny_trainer(callbacks=[writer]).predict(Finds(), datamodule=data)
    assert json.loads((tmp_path / "out.json").read_text()) == list(results(data.dataset("test")))


def test_cocos_own_tools_read_them(tmp_path):
    pycocotools = pytest.importorskip("pycocotools.coco")
    data = TinyDetectionDataModule(samples=5)
    tiny_trainer(callbacks=[DetectionWriter(path=tmp_path / "out.json")]).predict(Finds(), datamodule=data)
    coco = pycocotools.COCO()
    coco.dataset = {"images": [{"id": 2000 + number} for number in range(5)], "categories": [{"id": 1}, {"id": 2}]}
    coco.createIndex()
    found = coco.loadRes(str(tmp_path / "out.json"))
    assert [found.anns[number]["category_id"] for number in sorted(found.anns)] == [1, 2, 1, 2, 1]


def test_images_without_ids_and_without_boxes(tmp_path):
    class Nothing(Finds):
        def predict_step(self, batch, batch_idx):
            boxes = torch.tensor([[1.0, 2.0, 4.0, 8.0]])[: 1 - batch_idx]
            count = len(boxes)
            return [{"boxes": boxes, "labels": torch.ones(count).long(), "scores": torch.full((count,), 0.5)}]

    batches = [[torch.zeros(3, 8, 8)], [torch.zeros(3, 4, 4)]]
    loader = DataLoader([DetectionBatch(images) for images in batches], batch_size=None)
    tiny_trainer(callbacks=[DetectionWriter(path=tmp_path / "out.json")]).predict(Nothing(), loader)
    expected = [{"image_id": 0, "category_id": 1, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5}]
    assert json.loads((tmp_path / "out.json").read_text()) == expected


@pytest.mark.parametrize("collate", [list, torch.stack], ids=["list", "tensor"])
def test_images_without_targets_are_read_as_the_module_reads_them(collate, tmp_path):
    data = TinyDetectionDataModule(samples=3, batch_size=3).dataset("test")
    module = DetectionModule(TinyFasterRCNN(2), num_classes=2)
    loader = DataLoader(list(data.images), 2, collate_fn=collate)
    found = tiny_trainer(callbacks=[DetectionWriter(path=tmp_path / "out.json")]).predict(module, loader)
    counts = [len(one["boxes"]) for batch in found for one in batch]
    assert any(counts)
    written = [line["image_id"] for line in json.loads((tmp_path / "out.json").read_text())]
    assert written == [image for image, count in enumerate(counts) for _ in range(count)]


def test_boxes_of_image_files_have_their_names(tmp_path):
    pycocotools = pytest.importorskip("pycocotools.coco")
    write_fashion_voc(tmp_path / "voc", FashionVOC(items="digits", images=(1, 3, 2), size=64, item_size=(16, 24)))
    names = {"class_names": list("0123456789"), "batch_size": 2, "num_workers": 0}
    data = VOCDetectionDataModule(data_dir=tmp_path / "voc", **names)
    loaders = [data.val_dataloader(), data.test_dataloader()]

    class Two(Finds):
        def predict_step(self, batch, batch_idx, dataloader_idx):
            return super().predict_step(batch, batch_idx)

    writer = DetectionWriter(path=tmp_path / "out.json")
    tiny_trainer(callbacks=[writer]).predict(Two(), loaders)
    for path, split, count in zip(writer.written, ("val", "test"), (3, 2), strict=True):
        files = data.file_names(split)
        assert files == [f"VOC2007/JPEGImages/{split}_{number:06}.jpg" for number in range(count)]
        written = json.loads(path.read_text())
        assert {(line["image_id"], line["file_name"]) for line in written} == set(enumerate(files))
        coco = pycocotools.COCO()
        coco.dataset = {"images": [{"id": place} for place in range(count)], "categories": [{"id": 1}]}
        coco.createIndex()
        assert len(coco.loadRes(str(path)).anns) == len(written)


def test_several_loaders_have_a_file_each(tmp_path):
    writer = TranslationWriter(path=tmp_path / "out.txt")

    class Two(Echo):
        def predict_step(self, batch, batch_idx, dataloader_idx):
            return super().predict_step(batch, batch_idx)

    tiny_trainer(callbacks=[writer]).predict(Two(), [DataLoader(Numbers(2), 1), DataLoader(Numbers(1, first=8), 1)])
    assert [path.name for path in writer.written] == ["out.txt", "out_1.txt"]
    assert [path.read_text() for path in writer.written] == ["number 0\nnumber 1\n", "number 8\n"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["index", "no index", "boxes"])
def test_two_processes_write_one_file_in_the_order_of_the_data(kind, tmp_path, start_method):
    # An odd number: one process has a sample less, or one that is repeated.
    path = tmp_path / ("out.json" if kind == "boxes" else "out.txt")
    writer = (DetectionWriter if kind == "boxes" else TranslationWriter)(path=path)
    trainer = tiny_trainer(callbacks=[writer], devices=2, strategy=f"ddp_{start_method}")
    if kind == "boxes":
        data = TinyDetectionDataModule(samples=7, batch_size=2)
        trainer.predict(Finds(), datamodule=data, return_predictions=False)
        assert json.loads(path.read_text()) == list(results(data.dataset("test")))
    elif kind == "index":
        data = TinyTranslationDataModule(samples=7, batch_size=2)
        module = TranslationModule(TinyEncoderDecoder(), num_classes=12, pad_id=0, decode=data.decode)
        trainer.predict(module, datamodule=data, return_predictions=False)
        data.trainer = None
        expected = [text for batch in data.predict_dataloader() for text in module.translate(batch)]
        assert path.read_text().splitlines() == expected
    else:
        trainer.predict(Echo(), DataLoader(Numbers(7), 2), return_predictions=False)
        assert path.read_text().splitlines() == [f"number {number}" for number in range(7)]


def test_without_a_path_nothing_is_overwritten(tmp_path):
    for _ in range(2):
        writer = TranslationWriter()
        tiny_trainer(callbacks=[writer], default_root_dir=tmp_path).predict(Echo(), DataLoader(Numbers(2), 2))
    assert {path.name for path in tmp_path.glob("*.txt")} == {"predictions.txt", "predictions.2.txt"}


def test_what_was_there_is_kept_if_a_prediction_fails(tmp_path):
    class Fails(Echo):
        def predict_step(self, batch, batch_idx):
            raise ZeroDivisionError

    path = tmp_path / "out.txt"
    path.write_text("before\n")
    with pytest.raises(ZeroDivisionError):
        tiny_trainer(callbacks=[TranslationWriter(path=path)]).predict(Fails(), DataLoader(Numbers(2), 2))
    assert path.read_text() == "before\n"
    assert list(tmp_path.iterdir()) == [path]


def test_another_suffix_is_refused():
    with pytest.raises(InputError, match="DetectionWriter writes .json files, got path=boxes.txt: name it so"):
        DetectionWriter(path="boxes.txt")


@pytest.mark.parametrize("writer", [TranslationWriter, DetectionWriter])
def test_a_module_that_predicts_something_else_is_refused(writer):
    module = SupervisedModule(TinyNet(), num_classes=3)
    assert writer_for(module) is None
    with pytest.raises(InputError, match=f"SupervisedModule predicts nothing that {writer.__name__} can write"):
        tiny_trainer(callbacks=[writer()]).predict(module, datamodule=TinyDataModule())


def test_a_writer_is_found_by_what_a_module_predicts():
    assert isinstance(writer_for(Echo()), TranslationWriter)
    assert isinstance(writer_for(Finds()), DetectionWriter)
