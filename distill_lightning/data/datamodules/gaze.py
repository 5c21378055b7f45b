"""MPIIGaze: where does this eye look, told from its image and the pose of the head?"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Unpack

from torch import Tensor

from distill_lightning.data.batch import Batch
from distill_lightning.data.columns import Columns
from distill_lightning.data.datamodules.gaze_files import SHAPE, SIDES, Eyes, joined, people, read_person
from distill_lightning.data.datamodules.image_data_module import ImageDataModule
from distill_lightning.data.datamodules.in_memory import Images, ImageTensors
from distill_lightning.data.datamodules.options import ViewOptions
from distill_lightning.errors import InputError, check_one_of

_NEXT = "next"


class EyeTensors(ImageTensors):
    """Images of eyes in memory, each with the pose of its head; inputs are ``{"image": ..., "pose": ...}``.

    Args:
        eyes: the samples.
        mean: see `ImageTensors`, as all that follow.
        std: of the pixels.
        seed: of the views.
        padding: pixels of zeros around the image that a random crop may take in; 0 crops nothing.
        partners: whether each view comes with another sample in the same view.
    """

    def __init__(
        self, eyes: Eyes, *, mean: float, std: float, seed: int = 0, padding: int = 0, partners: bool = False
    ) -> None:
        images = Images(eyes.images, eyes.gazes)
        super().__init__(images, mean=mean, std=std, seed=seed, padding=padding, partners=partners)
        self.poses = eyes.poses

    def columns(self) -> Columns:
        """The plain images and the poses, and the targets."""
        return Columns(labels=self.targets, contents=(self.images, self.poses))

    @property
    def views_are_alike(self) -> bool:
        """Whether nothing is cropped."""
        return not self.padding

    def make(self, index: Tensor, view: Tensor) -> Batch:
        """The batch of these views, both ``(N,)``."""
        batch = super().make(index, view)
        return batch.replace(input={"image": batch.input, "pose": self.poses[index]})


class GazeDataModule(ImageDataModule):
    r"""MPIIGaze's normalised eye images: 15 people at their laptops, one of whom is left out for the test.

    An input is ``{"image": (N, 1, 36, 60), "pose": (N, 2)}``, a grey image and the head's pitch and yaw in radians; a
    network gets both by keyword (`GazeNet` does). The target is the direction of the gaze, pitch and yaw in
    **radians**, ``(N, 2)``; ``num_targets`` is 2. `AngularError` is the mean angle in degrees by which these data are
    judged, averaged over 15 trainings, each with a different ``held_out``.

    The files give a direction of gaze ``g`` and the head's rotation vector ``r``, from which the angles are computed as
    usual (see `functional.gaze_to_angles` and `functional.pose_to_angles`):

    .. math:: p_g = \arcsin(-g_y), \quad y_g = \mathrm{atan2}(-g_x, -g_z); \qquad
        p_r = \arcsin z_y, \quad y_r = \mathrm{atan2}(z_x, z_z), \quad z = \exp([r]_\times) \, e_3

    Read are ``Data/Normalized/p00/day01.mat`` and so on and, of each person, the 3,000 samples that are listed in
    ``Evaluation Subset/sample list for eye image/p00.txt``, as the published figures are; a line there names a frame
    and an eye, ``day01/0001.jpg left``. Images of right eyes are mirrored, and the signs of their yaws changed.

    The data are at http://datasets.d2.mpi-inf.mpg.de/MPIIGaze/MPIIGaze.tar.gz (2.1 GB, CC BY-NC-SA 4.0). Zhang, Sugano,
    Fritz, Bulling: *Appearance-Based Gaze Estimation in the Wild*, https://arxiv.org/abs/1504.02863

    ::

        trainer = Trainer(max_epochs=10)
        data = GazeDataModule(data_dir="MPIIGaze", held_out="p03")
        module = RegressionModule(GazeNet(), num_targets=2, metrics=MetricCollection({"angle": AngularError()}))
        trainer.fit(module, datamodule=data)

    Args:
        data_dir: the folder ``MPIIGaze``, or the one that it is in.
        held_out: the person kept for testing only, ``"p00"`` to ``"p14"``.
        val_person: the person kept for validation only; ``"next"``: the one after ``held_out``, after the last one the
            first; ``None``: ``val_size`` samples are drawn by ``seed`` from the others', and nobody else is left out.
        val_size: number of validation samples, the first ones of ``val_person``; ``None``: all of that person's.
        test_size: number of test samples, the first ones; ``None``: all.
        samples: ``"evaluation"``: those of the lists; ``"all"``: every frame, 213,659 with two eyes each.
        eyes: which eyes, ``"both"``, ``"left"`` or ``"right"``.
        mirror_right: whether right eyes are mirrored.
        padding: pixels of zeros around a training image that its random crop may take in; nothing else is changed.
        options: how samples are chosen, ordered and loaded, and which views of them; see `ViewOptions`.

    Raises:
        InputError: an option is unknown or out of range; from ``setup``: there is no such person, a file is missing,
            damaged or of something else, or a size is larger than the data.
    """

    num_classes = None
    num_targets = 2
    input_shape = {"image": (1, *SHAPE), "pose": (2,)}  # type: ignore[assignment]  # noqa: RUF012  # by keyword
    # Of uniform pixels, which equalised histograms come near.
    mean = 0.5
    std = 0.29

    def __init__(
        self,
        *,
        data_dir: str | Path,
        held_out: str = "p00",
        val_person: str | None = _NEXT,
        val_size: int | None = None,
        test_size: int | None = None,
        samples: Literal["evaluation", "all"] = "evaluation",
        eyes: Literal["both", "left", "right"] = "both",
        mirror_right: bool = True,
        padding: int = 0,
        **options: Unpack[ViewOptions],
    ) -> None:
        super().__init__(val_size=val_size, test_size=test_size, **options)
        check_one_of("samples", samples, ("evaluation", "all"))
        check_one_of("eyes", eyes, ("both", *SIDES))
        if padding < 0:
            raise InputError(f"padding cannot be negative, got {padding}")
        if val_person == held_out:
            raise InputError(f"val_person={val_person} is held_out: validate on somebody else, or leave val_person out")
        self.data_dir, self.held_out, self.val_person = Path(data_dir), held_out, val_person
        self.samples, self.eyes, self.mirror_right, self.padding = samples, eyes, mirror_right, padding
        self._splits: dict[str, Eyes] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the files and split them; a second call does nothing."""
        if self._splits:
            return
        folders = people(self.data_dir)
        val_person = self._validated_on(list(folders))
        apart = {self.held_out, val_person}
        if not folders.keys() - apart:
            raise InputError(f"{self.data_dir}: {', '.join(folders)} leave nobody to train on: unpack all people")
        read = {name: self._read(folder) for name, folder in folders.items()}
        rest = joined([eyes for name, eyes in read.items() if name not in apart])
        val, test = rest if val_person is None else read[val_person], read[self.held_out]
        chosen = self.split(len(rest.gazes), len(test.gazes), None if val_person is None else len(val.gazes))
        self._splits = {
            split: eyes.take(chosen[split])
            for split, eyes in (("train", rest), ("val", val), ("test", test), ("rest", rest))
        }

    def dataset(self, split: str, *, augment: bool = False) -> EyeTensors:
        """One split, ``"train"``, ``"val"``, ``"test"``, or ``"rest"``: training samples that ``subset`` leaves out.

        Without ``augment`` every view is the plain image.
        """
        self.setup()
        return EyeTensors(
            self._splits[split],
            mean=self.mean,
            std=self.std,
            seed=self.seed,
            padding=self.padding if augment else 0,
            partners=self.partners and augment,
        )

    def _validated_on(self, names: list[str]) -> str | None:
        for key, name in (("held_out", self.held_out), ("val_person", self.val_person)):
            if name not in (*names, *(() if key == "held_out" else (_NEXT, None))):
                raise InputError(f"{key}={name} is none of the people in {self.data_dir}: {', '.join(names)}")
        return names[(names.index(self.held_out) + 1) % len(names)] if self.val_person == _NEXT else self.val_person

    def _read(self, folder: Path) -> Eyes:
        return read_person(
            folder,
            listed=self.samples == "evaluation",
            sides=SIDES if self.eyes == "both" else (self.eyes,),
            mirror_right=self.mirror_right,
        )
