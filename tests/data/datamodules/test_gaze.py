"""MPIIGaze's files: the samples, the folds, the views, and what is refused."""

import math
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from scipy.io import savemat
from scipy.spatial.transform import Rotation

from distill_lightning import GazeDataModule, InputError, UnlabelledSampler
from distill_lightning.data.datamodules.gaze_files import read_day
from distill_lightning.data.views import Draws

NORMALISED, LISTS = "Data/Normalized", "Evaluation Subset/sample list for eye image"
DAYS, FRAMES = 2, 6


def struct_of(frames, generator):
    """One side of a file of a day."""
    gaze = generator.normal(size=(frames, 3)) * [0.3, 0.3, 0.1] + [0, 0, -1]
    return {
        "gaze": gaze / np.linalg.norm(gaze, axis=1, keepdims=True),
        "image": generator.integers(0, 256, (frames, 36, 60), dtype=np.uint8),
        "pose": generator.normal(size=(frames, 3)) * 0.3,
    }


def write_day(path, frames=FRAMES, seed=0, **changes):
    """As MATLAB saves it: structs in a struct, names in a cell."""
    generator = np.random.default_rng(seed)
    data = {side: struct_of(frames, generator) for side in ("left", "right")}
    names = np.array([[f"{number + 1:04}.jpg"] for number in range(frames)], dtype=object)
    content = {"data": data, "filenames": names} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {name: value for name, value in content.items() if value is not None}, do_compression=True)
    return data


def write_people(root, people=4):
    """The files of a few people, whose list names each frame once, with the one eye or the other."""
    written = {}
    for person in range(people):
        lines = []
        for day in range(1, DAYS + 1):
            path = root / NORMALISED / f"p{person:02}" / f"day{day:02}.mat"
            written[f"p{person:02}", f"day{day:02}"] = write_day(path, seed=10 * person + day)
            lines += [f"day{day:02}/{n + 1:04}.jpg {('left', 'right')[n % 2]}\n" for n in reversed(range(FRAMES))]
        (root / LISTS).mkdir(parents=True, exist_ok=True)
        (root / LISTS / f"p{person:02}.txt").write_text("".join(lines))
    return written


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("gaze") / "MPIIGaze"
    return root, write_people(root)


def naive_sample(struct, row, *, mirrored):
    """Image, pose and gaze of one frame, by matrices and arc sines."""
    image = struct["image"][row][:, ::-1] if mirrored else struct["image"][row]
    sign = -1 if mirrored else 1
    x, y, z = struct["gaze"][row]
    axis = Rotation.from_rotvec(struct["pose"][row]).as_matrix()[:, 2]
    pose = [math.asin(axis[1]), sign * math.atan2(axis[0], axis[2])]
    return image.copy(), pose, [math.asin(-y), sign * math.atan2(-x, -z)]


def check(dataset, expected):
    images, poses, gazes = zip(*expected, strict=True)
    assert torch.equal(dataset.images[:, 0], torch.from_numpy(np.stack(images)))
    torch.testing.assert_close(dataset.poses, torch.tensor(poses))
    torch.testing.assert_close(dataset.targets, torch.tensor(gazes))


# Samples


@pytest.mark.parametrize("mirror", [True, False])
def test_the_samples_are_those_of_the_lists_in_their_order(written, mirror):
    root, content = written
    data = GazeDataModule(data_dir=root, held_out="p02", mirror_right=mirror)
    expected = []
    for line in (root / LISTS / "p02.txt").read_text().splitlines():
        image, side = line.split()
        day, name = image.split("/")
        struct = content["p02", day][side]
        expected.append(naive_sample(struct, int(name[:4]) - 1, mirrored=mirror and side == "right"))
    check(data.dataset("test"), expected)


def test_all_frames_have_two_eyes(written):
    root, content = written
    data = GazeDataModule(data_dir=root, samples="all")
    expected = [
        naive_sample(content["p00", day][side], row, mirrored=side == "right")
        for day in ("day01", "day02")
        for side in ("left", "right")
        for row in range(FRAMES)
    ]
    check(data.dataset("test"), expected)


@pytest.mark.parametrize("samples", ["evaluation", "all"])
def test_one_eye_is_half_of_both(written, samples):
    root, _ = written
    both, left, right = (
        GazeDataModule(data_dir=root.parent, samples=samples, eyes=eyes).dataset("test")
        for eyes in ("both", "left", "right")
    )
    assert len(left) == len(right) == len(both) / 2
    images = [{bytes(image.flatten().tolist()) for image in part.images} for part in (both, left, right)]
    assert images[0] == images[1] | images[2]
    assert not images[1] & images[2]


def test_a_day_of_one_frame_and_names_in_a_matrix_are_read(tmp_path):
    data = write_day(tmp_path / "day01.mat", frames=1)
    day = read_day(tmp_path / "day01.mat")
    assert day.frames == ["0001.jpg"]
    assert torch.equal(day.eyes["left"].images[:, 0], torch.from_numpy(data["left"]["image"]))
    write_day(tmp_path / "day02.mat", frames=2, filenames=np.array(["0001.jpg", "0002.jpg"]))
    assert read_day(tmp_path / "day02.mat").frames == ["0001.jpg", "0002.jpg"]


# Folds


def images_of(data, split):
    return {bytes(image.flatten().tolist()) for image in data.dataset(split).images}


def test_each_person_is_left_out_once_and_the_next_one_is_validated_on(written):
    root, _ = written
    people = ["p00", "p01", "p02", "p03"]
    own = {name: images_of(GazeDataModule(data_dir=root, held_out=name), "test") for name in people}
    assert sum(map(len, own.values())) == len(set.union(*own.values())) == 4 * DAYS * FRAMES
    for number, name in enumerate(people):
        data, val = GazeDataModule(data_dir=root, held_out=name), people[(number + 1) % 4]
        assert images_of(data, "val") == own[val]
        assert images_of(data, "train") == set.union(*(own[other] for other in people if other not in (name, val)))
    assert images_of(GazeDataModule(data_dir=root, held_out="p00", val_person="p03"), "val") == own["p03"]


def test_a_validation_by_number_leaves_nobody_else_out(written):
    root, _ = written
    data = GazeDataModule(data_dir=root, val_person=None, val_size=10, test_size=5, subset=20)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [20, 10, 5]
    assert not images_of(data, "train") & images_of(data, "val")
    assert not images_of(data, "val") & images_of(GazeDataModule(data_dir=root), "test")
    other = GazeDataModule(data_dir=root, val_person=None, val_size=10, seed=1)
    assert images_of(data, "val") != images_of(other, "val")


def test_the_rest_is_what_the_subset_leaves(written):
    root, _ = written
    data = GazeDataModule(data_dir=root, subset=20)
    whole, rest = images_of(GazeDataModule(data_dir=root), "train"), images_of(data, "rest")
    assert rest
    assert rest == whole - images_of(data, "train")
    draws = Draws(0, torch.arange(3), torch.zeros(3, dtype=torch.int64))
    drawn = UnlabelledSampler(data)(next(iter(data.train_dataloader())).input, draws)
    assert {name: tuple(part.shape) for name, part in drawn.items()} == {"image": (3, 1, 36, 60), "pose": (3, 2)}


# Views


def test_a_batch_has_two_inputs_and_knows_its_samples(written):
    root, _ = written
    data = GazeDataModule(data_dir=root, batch_size=8)
    batch, plain = next(iter(data.train_dataloader())), data.dataset("train")
    assert {name: tuple(part.shape) for name, part in batch.input.items()} == {"image": (8, 1, 36, 60), "pose": (8, 2)}
    assert {name: part.dtype for name, part in batch.input.items()} == dict.fromkeys(batch.input, torch.float32)
    torch.testing.assert_close(batch.input["image"], (plain.images[batch.index] / 255 - 0.5) / 0.29)
    assert torch.equal(batch.input["pose"], plain.poses[batch.index])
    assert torch.equal(batch.target, plain.targets[batch.index])
    assert data.input_shape == {name: tuple(part.shape[1:]) for name, part in batch.input.items()}
    assert (data.num_classes, data.num_targets) == (None, 2)


def test_a_crop_moves_the_image_alone(written):
    root, _ = written
    data = GazeDataModule(data_dir=root, padding=4, partners=True)
    views, plain = data.dataset("train", augment=True), data.dataset("train")
    assert not views.views_are_alike
    assert plain.views_are_alike
    first, second = (views.__getitems__([(index, view) for index in range(8)]) for view in (0, 1))
    assert (first.input["image"] != second.input["image"]).flatten(1).any(dim=1).sum() > 5
    assert torch.equal(first.input["pose"], second.input["pose"])
    assert torch.equal(first.target, second.target)
    assert first.partner.input.keys() == first.input.keys()
    assert torch.equal(first.input["image"], views.__getitems__([(index, 0) for index in range(8)]).input["image"])


def test_poses_and_crops_are_part_of_the_fingerprint(written, tmp_path):
    root, _ = written
    copy = shutil.copytree(root, tmp_path / "MPIIGaze")
    given = GazeDataModule(data_dir=root).fingerprint()
    assert GazeDataModule(data_dir=copy).fingerprint() == given
    assert GazeDataModule(data_dir=root, padding=1).fingerprint()["data"] == given["data"]
    assert GazeDataModule(data_dir=root, padding=1).fingerprint() != given
    generator = np.random.default_rng(31)
    data = {side: struct_of(FRAMES, generator) for side in ("left", "right")}
    data["left"]["pose"][2] += 0.1
    write_day(copy / NORMALISED / "p03" / "day01.mat", data=data)
    assert GazeDataModule(data_dir=copy).fingerprint()["data"] != given["data"]


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": "p09"}, "held_out=p09 is none of the people in .*: p00, p01, p02, p03$"),
        ({"val_person": "nobody"}, "val_person=nobody is none of the people in"),
        ({"val_person": "p00"}, "val_person=p00 is held_out: validate on somebody else"),
        ({"val_person": None}, "give val_size"),
        ({"val_person": None, "val_size": 36}, "val_size=36 leaves none of 36 images to train on"),
        ({"val_size": 13}, "val_size=13 is larger than the 12 validation images"),
        ({"test_size": 13}, "test_size=13 is larger than the 12 test images"),
        ({"subset": 25}, "subset=25 is larger than the 24 training images"),
        ({"padding": -1}, "padding cannot be negative, got -1"),
        ({"samples": "some"}, "samples must be one of evaluation, all, got 'some'"),
        ({"eyes": "third"}, "eyes must be one of both, left, right, got 'third'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_used_are_one_line(written, options, message):
    with pytest.raises(InputError, match=message) as refused:
        GazeDataModule(data_dir=written[0], **options).setup()
    assert "\n" not in str(refused.value)


def changed_day(change):
    generator = np.random.default_rng(0)
    data = {side: struct_of(FRAMES, generator) for side in ("left", "right")}
    change(data)
    return {"data": data}


def set_row(field, row, value):
    def change(data):
        data["right"][field][row] = value

    return change


def set_field(field, value):
    def change(data):
        data["left"][field] = value

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "data is no struct with left"),
        ({"data": np.zeros((2, 2))}, "data is no struct with left"),
        ({"data": {"left": 1.0}}, "data.left is no struct with image"),
        (changed_day(lambda data: data.pop("right")), "data is no struct with right"),
        (changed_day(lambda data: data["left"].pop("pose")), "data.left is no struct with pose"),
        (changed_day(set_field("image", np.zeros((FRAMES, 36, 60)))), r"is \(6, 36, 60\) of float64 where 6 filenames"),
        (changed_day(set_field("image", np.zeros((FRAMES, 36, 60), np.uint16))), r"is \(6, 36, 60\) of uint16 where"),
        (changed_day(set_field("image", np.zeros((FRAMES, 60, 36), np.uint8))), r"is \(6, 60, 36\) of uint8 where"),
        (changed_day(set_field("gaze", np.zeros((FRAMES, 2)))), r"data.left.gaze is \(6, 2\)"),
        (changed_day(set_field("pose", "text")), "data.left.pose is"),
        (changed_day(set_row("gaze", 2, np.nan)), r"data.right.gaze of frame 0003.jpg is \[nan, nan, nan\]"),
        (changed_day(set_row("gaze", 2, 0.0)), r"data.right.gaze of frame 0003.jpg is \[0.0, 0.0, 0.0\]"),
        (changed_day(set_row("pose", 0, np.inf)), "data.right.pose of frame 0001.jpg is"),
        ({"filenames": None}, r"where 0 filenames need \(0, 36, 60\)"),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_one_line(tmp_path, changes, message):
    path = tmp_path / "day01.mat"
    write_day(path, **changes)
    with pytest.raises(InputError, match=message) as refused:
        read_day(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_a_damaged_file_is_one_line(tmp_path):
    path = tmp_path / "day01.mat"
    write_day(path, frames=2)
    whole = path.read_bytes()
    contents = [b"", b"text\n" * 50, b"\x89HDF\r\n\x1a\n" + bytes(600), *(whole[:size] for size in (4, 100, 130, 900))]
    generator = np.random.default_rng(0)
    for _ in range(20):
        broken = bytearray(whole)
        broken[generator.integers(len(whole))] ^= 1 << generator.integers(8)
        contents.append(bytes(broken))
    refused = []
    for content in contents:
        path.write_bytes(content)
        with suppress(InputError):
            read_day(path)
            continue
        refused.append(InputError.latest)
    assert all(str(path) in line and "\n" not in line for line in refused)
    # In the header's text and the like nothing tells.
    assert len(refused) > 20


@pytest.fixture
def own(tmp_path):
    write_people(tmp_path, people=3)
    return tmp_path


def test_missing_files_say_where_to_get_them(tmp_path, own):
    with pytest.raises(InputError, match=r"no Data/Normalized/p00 in .*: unpack MPIIGaze\.tar\.gz there, from http"):
        GazeDataModule(data_dir=tmp_path / "elsewhere").setup()
    (own / LISTS / "p01.txt").unlink()
    with pytest.raises(
        InputError, match=r"no .*p01\.txt: unpack the whole of MPIIGaze\.tar\.gz, or give samples='all'"
    ):
        GazeDataModule(data_dir=own).setup()
    assert len(GazeDataModule(data_dir=own, samples="all").dataset("train")) == 2 * DAYS * FRAMES
    for path in (own / NORMALISED / "p01").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"p01 has no day01\.mat"):
        GazeDataModule(data_dir=own, samples="all").setup()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("day01/0099.jpg left", r"p01\.txt, line 2: 'day01/0099\.jpg left' names no sample of"),
        ("day09/0001.jpg left", "'day09/0001.jpg left' names no sample"),
        ("day01/0001.jpg middle", "'day01/0001.jpg middle' names no sample"),
        ("0001.jpg", "'0001.jpg' names no sample"),
    ],
)
def test_a_list_that_names_something_else_is_one_line(own, line, message):
    (own / LISTS / "p01.txt").write_text(f"day01/0001.jpg left\n{line}\n")
    with pytest.raises(InputError, match=message):
        GazeDataModule(data_dir=own).setup()


def test_a_frame_that_is_there_twice_moves_no_other(own):
    """What a list says of it is refused; the frames after it are still those of their names."""
    names = np.array([[f"{max(number, 1):04}.jpg"] for number in range(FRAMES)], dtype=object)
    second = write_day(own / NORMALISED / "p00" / "day02.mat", seed=2)["left"]
    first = write_day(own / NORMALISED / "p00" / "day01.mat", seed=1, filenames=names)["right"]
    path = own / LISTS / "p00.txt"
    path.write_text("day01/0005.jpg right\nday02/0001.jpg left\n")
    later = GazeDataModule(data_dir=own).dataset("test")
    check(later, [naive_sample(first, 5, mirrored=True), naive_sample(second, 0, mirrored=False)])
    path.write_text("day01/0001.jpg left\n")
    with pytest.raises(InputError, match=r"p00\.txt, line 1: 'day01/0001\.jpg left' names 2 samples of"):
        GazeDataModule(data_dir=own).setup()


def test_nobody_left_to_train_on_is_refused(own):
    shutil.rmtree(own / NORMALISED / "p02")
    with pytest.raises(InputError, match="p00, p01 leave nobody to train on: unpack all people"):
        GazeDataModule(data_dir=own).setup()
    assert len(GazeDataModule(data_dir=own, val_person=None, val_size=2).dataset("train")) == DAYS * FRAMES - 2
