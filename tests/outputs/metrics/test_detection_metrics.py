"""Metrics of boxes against loops by hand, difficult objects, and processes with unlike numbers of images."""

import multiprocessing

import numpy as np
import pytest
import torch

from distill_lightning import functional
from distill_lightning.errors import InputError
from distill_lightning.outputs import Boxes
from distill_lightning.outputs.metrics import (
    COCOAveragePrecision,
    DetectionCalibrationError,
    VOC07AveragePrecision,
    detection_metrics,
)

CLASSES = 3


def boxes_of(count, generator):
    corners = torch.rand(count, 2, generator=generator) * 60
    return torch.cat([corners, corners + 8 + torch.rand(count, 2, generator=generator) * 30], dim=1)


def scenes(count=30, *, seed=0, difficult=0.3):
    """Images with detections near their objects, on them twice, of other classes and elsewhere; some have none."""
    generator = torch.Generator().manual_seed(seed)
    found, there = [], []
    for number in range(count):
        objects = number % 4
        boxes = boxes_of(objects, generator)
        labels = torch.randint(1, CLASSES + 1, (objects,), generator=generator)
        copies = torch.cat([boxes, boxes])[torch.rand(2 * objects, generator=generator) < 0.8]
        names = torch.cat([labels, labels])[: len(copies)]
        near = copies + torch.randn(copies.shape, generator=generator) * 2
        other = boxes_of(number % 3, generator)
        names = torch.cat([names, torch.randint(1, CLASSES + 1, (len(other),), generator=generator)])
        # Few different scores, so that some are equal.
        scores = (torch.rand(len(near) + len(other), generator=generator) * 20).ceil() / 20
        found.append({"boxes": torch.cat([near, other]), "scores": scores, "labels": names})
        is_difficult = torch.rand(objects, generator=generator) < difficult
        there.append({"boxes": boxes, "labels": labels, "difficult": is_difficult})
    return found, there


def devkit(found, there, label, *, threshold=0.5):
    """VOCevaldet.m, line by line; its boxes name their first and last pixels, counted from 1."""
    gt, npos = [], 0
    for target in there:
        mine = target["labels"] == label
        diff = target["difficult"][mine].tolist()
        gt.append({"bb": target["boxes"][mine].tolist(), "diff": diff, "det": [False] * len(diff)})
        npos += diff.count(False)
    lines = [
        (float(score), image, box.tolist())
        for image, one in enumerate(found)
        for score, box, name in zip(one["scores"], one["boxes"], one["labels"], strict=True)
        if name == label
    ]
    lines.sort(key=lambda line: -line[0])
    tp, fp, used = [], [], []
    for score, image, bb in lines:
        ovmax, jmax = -np.inf, None
        for j, bbgt in enumerate(gt[image]["bb"]):
            first = [bb[0] + 1, bb[1] + 1, bb[2], bb[3]]
            second = [bbgt[0] + 1, bbgt[1] + 1, bbgt[2], bbgt[3]]
            iw = min(first[2], second[2]) - max(first[0], second[0]) + 1
            ih = min(first[3], second[3]) - max(first[1], second[1]) + 1
            if iw > 0 and ih > 0:
                ua = (first[2] - first[0] + 1) * (first[3] - first[1] + 1)
                ua += (second[2] - second[0] + 1) * (second[3] - second[1] + 1) - iw * ih
                if iw * ih / ua > ovmax:
                    ovmax, jmax = iw * ih / ua, j
        hit = miss = False
        if ovmax >= threshold:
            if not gt[image]["diff"][jmax]:
                hit = not gt[image]["det"][jmax]
                miss = not hit
                gt[image]["det"][jmax] = True
        else:
            miss = True
        tp.append(hit)
        fp.append(miss)
        used.append((score, hit, miss))
    tp, fp = np.cumsum(tp), np.cumsum(fp)
    if npos == 0:
        return np.nan, used
    rec, prec = tp / npos, tp / np.maximum(fp + tp, 1)
    ap = 0.0
    for t in range(11):
        p = prec[10 * tp >= t * npos] if len(rec) else []
        ap += (max(p) if len(p) else 0) / 11
    return ap, used


def distinct(found):
    """The same order of scores, without equal ones."""
    number = 0
    for one in found:
        count = len(one["scores"])
        one["scores"] = one["scores"] - 1e-4 * torch.arange(number, number + count) / 100
        number += count
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_eleven_point_precision_is_that_of_vocs_own_code(seed):
    found, there = scenes(seed=seed)
    found = distinct(found)
    metric = VOC07AveragePrecision(CLASSES)
    for image in range(0, len(found), 4):
        metric.update(found[image : image + 4], there[image : image + 4])
    expected = [devkit(found, there, label)[0] for label in range(1, CLASSES + 1)]
    assert metric.by_class().tolist() == pytest.approx(expected, abs=1e-6)
    assert metric.compute().item() == pytest.approx(np.mean(expected), abs=1e-6)
    assert 0.1 < metric.compute() < 0.95


@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_is_a_mean_over_bins_by_hand(seed):
    found, there = scenes(seed=seed)
    found = distinct(found)
    metric = DetectionCalibrationError(bins=10)
    metric.update(found, there)
    used = [line for label in range(1, CLASSES + 1) for line in devkit(found, there, label)[1]]
    used = [(score, hit) for score, hit, miss in used if hit or miss]
    error = 0.0
    for number in range(10):
        inside = [(score, hit) for score, hit in used if number / 10 < score <= (number + 1) / 10]
        if inside:
            scores, hits = zip(*inside, strict=True)
            error += len(inside) / len(used) * abs(np.mean(hits) - np.mean(scores))
    assert metric.compute().item() == pytest.approx(error, abs=1e-6)


def pycocotools_says(found, there):
    """``map``, ``map_50`` and ``map`` of each class; an image has few objects, so copies of a difficult one do."""
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")

    def as_coco(boxes):
        return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).double().tolist()

    truth, results = coco.COCO(), []
    categories = [{"id": label} for label in range(1, CLASSES + 1)]
    annotations = []
    for image, target in enumerate(there, start=1):
        rows = zip(as_coco(target["boxes"]), target["labels"].tolist(), target["difficult"].tolist(), strict=True)
        for box, label, difficult in rows:
            of_box = {"image_id": image, "category_id": label, "bbox": box, "iscrowd": 0}
            # COCO leaves out what is larger than its largest area.
            area = 1e11 if difficult else box[2] * box[3]
            annotations += [{**of_box, "area": area} for _ in range(20 if difficult else 1)]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    truth.dataset = {"images": [{"id": n + 1} for n in range(len(there))], "annotations": annotations}
    truth.dataset["categories"] = categories
    truth.createIndex()
    for image, one in enumerate(found, start=1):
        rows = zip(as_coco(one["boxes"]), one["labels"].tolist(), one["scores"].tolist(), strict=True)
        results += [{"image_id": image, "category_id": k, "bbox": box, "score": score} for box, k, score in rows]
    run = evaluation.COCOeval(truth, truth.loadRes(results), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    precision = run.eval["precision"][:, :, :, 0, 2]
    return [*run.stats[:2], *(precision[:, :, place].mean() for place in range(CLASSES))]


@pytest.mark.parametrize("difficult", [0.0, 0.3])
def test_cocos_precision_is_that_of_its_own_code_even_at_the_edges_of_its_thresholds(difficult):
    found, there = scenes(100, difficult=difficult)
    # Overlaps of 0.55, 0.6 and so on exactly, recalls of 0.01, 0.02 and so on.
    there = [{**one, "boxes": one["boxes"].round()} for one in there]
    for one in found:
        one["boxes"] = one["boxes"].round()
    exact = torch.tensor([[0.0, 0, 20, 20]])
    for label in range(1, CLASSES + 1):
        for number in range(20):
            inside = exact * torch.tensor([1, 1, 1, (number + 1) / 20])
            some = torch.tensor([label])
            found.append({"boxes": inside, "scores": torch.ones(1), "labels": some})
            there.append({"boxes": exact, "labels": some, "difficult": torch.tensor([False])})
    found = distinct(found)
    metric = COCOAveragePrecision(CLASSES)
    metric.update(found, there)
    values = metric.compute()
    assert list(values) == ["map", "map_50", "map_class_1", "map_class_2", "map_class_3"]
    assert [float(value) for value in values.values()] == pytest.approx(pycocotools_says(found, there), abs=1e-6)


def test_a_class_of_any_name_has_a_value_of_its_own():
    names = ["50", "50_class", "class_50"]
    metrics = detection_metrics(3, class_names=names)
    boxes = torch.tensor([[0.0, 0, 20, 20]])
    found = {"boxes": boxes, "scores": torch.ones(1), "labels": torch.tensor([1])}
    there = {"boxes": boxes.repeat(2, 1), "labels": torch.tensor([1, 2])}
    values = metrics([found], [there])
    assert values["map_50"] == 0.5
    assert [float(values[f"map_class_{name}"]) for name in names] == pytest.approx([1, 0, torch.nan], nan_ok=True)


@pytest.mark.parametrize("kind", [Boxes, COCOAveragePrecision])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("ab", "class_names must be a list of names, one for each class, got the string 'ab'"),
        (["a", "a"], "class_names have 'a' twice"),
        (["a"], "1 class_names for num_classes=2"),
    ],
)
def test_names_that_tell_no_classes_apart_are_refused(kind, names, message):
    with pytest.raises(InputError, match=message):
        kind(2, class_names=names)


def test_difficult_objects_are_neither_found_nor_missed():
    """Two detections on a difficult object, and none on another, change nothing in any metric."""
    easy = torch.tensor([[0.0, 0, 20, 20], [40.0, 0, 60, 20]])
    found = {"boxes": easy[:1], "scores": torch.tensor([0.6]), "labels": torch.tensor([1])}
    there = {"boxes": easy, "labels": torch.tensor([1, 1])}
    hard = torch.tensor([[0.0, 40, 20, 60], [40.0, 40, 60, 60]])
    more = {
        "boxes": torch.cat([easy, hard]),
        "labels": torch.tensor([1, 1, 1, 1]),
        "difficult": torch.tensor([False, False, True, True]),
    }
    twice = {
        "boxes": torch.cat([easy[:1], hard[:1], hard[:1] + 0.2]),
        "scores": torch.tensor([0.6, 0.9, 0.8]),
        "labels": torch.tensor([1, 1, 1]),
    }
    first, second = (detection_metrics(1)([one], [target]) for one, target in ((found, there), (twice, more)))
    assert {name: float(value) for name, value in second.items()} == pytest.approx(
        {name: float(value) for name, value in first.items()}
    )
    assert first["map_50"] == pytest.approx(51 / 101)
    counted = detection_metrics(1)([twice], [{**more, "difficult": torch.zeros(4, dtype=torch.bool)}])
    assert counted["voc07_map_50"] != pytest.approx(float(first["voc07_map_50"]))


def test_the_order_of_images_does_not_matter():
    found, there = scenes()
    order = torch.randperm(len(found)).tolist()
    first = detection_metrics(CLASSES)(found, there)
    second = detection_metrics(CLASSES)([found[place] for place in order], [there[place] for place in order])
    assert {name: float(value) for name, value in first.items()} == {
        name: float(value) for name, value in second.items()
    }


def test_without_objects_or_images_there_is_no_precision():
    metrics = detection_metrics(2, class_names=["a", "b"])
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    one = {"boxes": torch.tensor([[0.0, 0, 4, 4]]), "labels": torch.tensor([1])}
    values = metrics([{**one, "scores": torch.tensor([0.75])}], [nothing])
    assert all(values[name].isnan() for name in ("map", "map_50", "map_class_a", "map_class_b", "voc07_map_50"))
    assert values["ece"] == 0.75
    metrics.reset()
    values = metrics([{**nothing, "scores": torch.zeros(0)}], [one])
    assert [float(values[name]) for name in ("map", "map_class_a", "voc07_map_50")] == [0, 0, 0]
    assert values["map_class_b"].isnan()
    assert values["ece"].isnan()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_before_an_image_there_is_nothing_to_tell():
    values = detection_metrics(2).compute()
    assert len(values) == 6
    assert all(value.isnan() for value in values.values())


def gathered(rank, folder, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    found, there = scenes()
    # All but two images in one process, two in another, none in the third.
    share = (slice(0, -2), slice(-2, None), slice(0, 0))[rank]
    metrics = detection_metrics(CLASSES)
    if found[share]:
        metrics.update(found[share], there[share])
    results.put({name: float(value) for name, value in metrics.compute().items()})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_processes_with_unlike_numbers_of_images_equal_one(start_method, tmp_path):
    context = multiprocessing.get_context(start_method)
    results = context.Queue()
    workers = [context.Process(target=gathered, args=(rank, tmp_path, results)) for rank in range(3)]
    for worker in workers:
        worker.start()
    values = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    expected = {name: float(value) for name, value in detection_metrics(CLASSES)(*scenes()).items()}
    assert values == [expected] * 3


def test_numbers_are_kept_whatever_a_module_is_converted_to():
    found, there = scenes()
    metric = VOC07AveragePrecision(CLASSES).to(torch.bfloat16)
    exact = VOC07AveragePrecision(CLASSES)
    for one in (metric, exact):
        one.update(found, there)
    assert torch.equal(metric.to(torch.bfloat16).compute(), exact.compute())


def test_a_missing_backend_is_named(monkeypatch):
    monkeypatch.setattr("distill_lightning.outputs.metrics.detection.find_spec", lambda name: None)
    metric = COCOAveragePrecision(CLASSES)
    metric.update(*scenes(1))
    with pytest.raises(InputError, match=r"pip install 'distill-lightning\[detection\]'"):
        metric.compute()


def test_overlaps_of_boxes():
    generator = torch.Generator().manual_seed(0)
    first, second = boxes_of(5, generator), boxes_of(4, generator)
    found = functional.intersection_over_union(first, second)
    for row, a in enumerate(first.tolist()):
        for column, b in enumerate(second.tolist()):
            width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
            height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
            assert found[row, column].item() == pytest.approx(width * height / union, abs=1e-6)
    assert functional.intersection_over_union(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_a_soft_binary_target_is_a_mean_of_two():
    logits, probs = torch.randn(5), torch.rand(5)
    rows = functional.soft_binary_cross_entropy_rows(logits, probs)
    p = logits.sigmoid()
    assert torch.allclose(rows, -probs * p.log() - (1 - probs) * (1 - p).log(), atol=1e-6)
