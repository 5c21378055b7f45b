"""What a step of distillation costs elsewhere, where the teachers run online in every step.

Two peers: a loop in plain PyTorch, as one would write it by hand, and torchdistill's own boxes, losses and hooks. Both
compute what `KDModule`, `MEALV2Module` and `FEEDModule` compute, with the same optimiser, from the same networks;
``tests/test_benchmarks_peers.py`` holds them to it. Neither logs, and neither uses Lightning.

    pip install 'distill-lightning[bench]'
    OMP_NUM_THREADS=1 python benchmarks/peers.py

prints the median milliseconds of a step of a ResNet-20 under ResNet-56 teachers, on 32x32 images of 100 classes.

On Linux, most of what lies between the two is glibc, which hands memory back to the system between steps: more of it
after a torchdistill step, which ends by freeing the gradients (about 15,000 page faults in a supervised step, against
10,000 or fewer; torch 2.14.1). With ``MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000`` before the
command there are none in either.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill_lightning import functional, pytorchcv_network
from distill_lightning.errors import InputError
from distill_lightning.layers import Discriminator, Translator, freeze, resolve_layer

Kind = Literal["supervised", "kd", "meal_v2", "feed"]
Loss = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor], None]

TEMPERATURE = 4.0
HARD_LABEL_WEIGHT = 0.1
BETA = 500.0
# Of pytorchcv's CIFAR networks: the feature map after the last ReLU, before pooling.
LAYER = "features.stage3"

_MOMENTUM, _WEIGHT_DECAY = 0.9, 5e-4
_EPS = 1e-6
_CLASSES, _SIZE = 100, 32
_WARM_UP = 2


def plain_step(
    kind: Kind,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    *,
    translators: Sequence[nn.Module] | nn.ModuleList | None = None,
    discriminator: nn.Module | None = None,
    lr: float = 0.1,
    layer: str = LAYER,
) -> Step:
    """One training step in plain PyTorch: forward of the student and all teachers, loss, backward, SGD.

    Args:
        kind: see `plain_loss`.
        student: learns; put in train mode.
        teachers: one or more; frozen (not looked at for ``"supervised"``).
        translators: of ``"feed"`` alone, one per teacher, from the student's to that teacher's channels; they learn.
        discriminator: of ``"meal_v2"`` alone, from logits ``(N, K)`` to scores ``(N, 2)``; it learns.
        lr: learning rate of SGD with momentum 0.9 and weight decay 5e-4.
        layer: of ``"feed"``: dotted path of the feature map, in student and teachers.

    Returns:
        A function of images ``(N, C, H, W)`` and labels ``(N,)`` that does one step.

    Raises:
        InputError: as `plain_loss`.
    """
    loss = plain_loss(kind, student, teachers, translators=translators, discriminator=discriminator, layer=layer)
    learning = nn.ModuleList([student, *_companions(kind, teachers, translators, discriminator)])
    optimizer = torch.optim.SGD(learning.parameters(), lr=lr, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        loss(images, labels).backward()
        optimizer.step()

    return step


def plain_loss(
    kind: Kind,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    *,
    translators: Sequence[nn.Module] | nn.ModuleList | None = None,
    discriminator: nn.Module | None = None,
    layer: str = LAYER,
) -> Loss:
    r"""The loss of `plain_step`, with student logits ``s`` and teachers' logits ``z_m``.

    - ``"supervised"``: the labels' cross entropy.
    - ``"kd"``: 0.1 of it, and 0.9 of :math:`T^2 \, \mathrm{KL}(\bar p \,\|\, \mathrm{softmax}(s / T))` with the mean
      :math:`\bar p` of the teachers' softmaxes at ``T = 4``.
    - ``"meal_v2"``: the cross entropy to :math:`\bar p` at ``T = 1``, and `functional.discriminator_loss` of the
      student's and the teachers' mean logits.
    - ``"feed"``: the labels' cross entropy, and 500 times the sum over teachers of the mean absolute difference between
      the translated feature of the student and that of the teacher, each divided by its L2 norm per sample.

    Returns:
        A function of images ``(N, C, H, W)`` and labels ``(N,)`` that gives a scalar with a graph.

    Raises:
        InputError: an unknown kind or layer, no teacher, not one translator per teacher, or no discriminator.
    """
    companions = _companions(kind, teachers, translators, discriminator)
    student.train()
    if kind == "supervised":
        return lambda images, labels: F.cross_entropy(student(images), labels)
    for teacher in teachers:
        freeze(teacher)
    if kind == "kd":
        return partial(_kd_loss, student, teachers)
    if kind == "meal_v2":
        return partial(_meal_v2_loss, student, teachers, companions[0])
    return partial(_feed_loss, _tapped(student, layer), [_tapped(teacher, layer) for teacher in teachers], companions)


def _kd_loss(student: nn.Module, teachers: Sequence[nn.Module], images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        probs = _mean_softmax(torch.stack([teacher(images) for teacher in teachers]), TEMPERATURE)
    logits = student(images)
    divergence = F.kl_div(F.log_softmax(logits / TEMPERATURE, dim=1), probs, reduction="batchmean")
    soft = TEMPERATURE**2 * divergence
    return HARD_LABEL_WEIGHT * F.cross_entropy(logits, labels) + (1 - HARD_LABEL_WEIGHT) * soft


def _meal_v2_loss(
    student: nn.Module, teachers: Sequence[nn.Module], discriminator: nn.Module, images: Tensor, labels: Tensor
) -> Tensor:
    del labels  # MEAL V2 does without
    with torch.no_grad():
        teacher_logits = torch.stack([teacher(images) for teacher in teachers])
        probs, mean_logits = _mean_softmax(teacher_logits), teacher_logits.mean(dim=0)
    logits = student(images)
    scores = discriminator(torch.cat([logits, mean_logits]))
    return F.cross_entropy(logits, probs) + functional.discriminator_loss(*scores.chunk(2))


def _feed_loss(
    student: Callable[[Tensor], tuple[Tensor, Tensor]],
    teachers: Sequence[Callable[[Tensor], tuple[Tensor, Tensor]]],
    translators: Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    with torch.no_grad():
        targets = [F.normalize(teacher(images)[1].flatten(1), eps=_EPS) for teacher in teachers]
    logits, feature = student(images)
    distances = [
        F.l1_loss(F.normalize(translator(feature).flatten(1), eps=_EPS), target)
        for translator, target in zip(translators, targets, strict=True)
    ]
    return F.cross_entropy(logits, labels) + BETA * torch.stack(distances).sum()


def _mean_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Of the teachers' logits ``(M, N, K)``: ``(N, K)``."""
    return F.softmax(logits / temperature, dim=-1).mean(dim=0)


def _tapped(network: nn.Module, layer: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A forward that gives the output of ``layer``, too."""
    seen: dict[str, Tensor] = {}
    tapped = network.get_submodule(resolve_layer(network, layer))
    tapped.register_forward_hook(lambda _module, _inputs, output: seen.update(feature=output))

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(images)
        return logits, seen.pop("feature")

    return forward


def torchdistill_step(
    kind: Kind,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    *,
    translators: Sequence[nn.Module] | nn.ModuleList | None = None,
    discriminator: nn.Module | None = None,
    lr: float = 0.1,
    layer: str = LAYER,
) -> Step:
    """One training step of torchdistill: ``forward_process`` and ``post_forward_process`` of `torchdistill_box`.

    It is the inner loop of the library's own examples without their metric logger.

    Args:
        kind: what is computed, see `plain_loss`.
        student: learns; put in train mode.
        teachers: one or more; frozen (not looked at for ``"supervised"``).
        translators: as in `plain_step`.
        discriminator: as in `plain_step`.
        lr: as in `plain_step`.
        layer: as in `plain_step`.

    Returns:
        A function of images ``(N, C, H, W)`` and labels ``(N,)`` that does one step.

    Raises:
        InputError: as `plain_loss`, or torchdistill is not installed.
    """
    box = torchdistill_box(
        kind, student, teachers, translators=translators, discriminator=discriminator, lr=lr, layer=layer
    )

    def step(images: Tensor, labels: Tensor) -> None:
        box.pre_forward_process()
        box.post_forward_process(loss=box.forward_process(images, labels))

    return step


def torchdistill_box(
    kind: Kind,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    *,
    translators: Sequence[nn.Module] | nn.ModuleList | None = None,
    discriminator: nn.Module | None = None,
    lr: float = 0.1,
    layer: str = LAYER,
) -> Any:
    """A ``TrainingBox`` (``"supervised"``) or ``DistillationBox`` (the rest) of torchdistill, at the start of an epoch.

    Of the library: the boxes, the forward hooks, the weighted sum, the cross entropies behind ``SimpleLossWrapper``,
    ``KDLoss``, ``FTLoss``, the optimiser. ``"supervised"``, and ``"kd"`` with one teacher, are nothing else.

    A box has one teacher, one translator (in ``Student4FactorTransfer``, always with a paraphraser of the teacher) and
    no MEAL V2. So, by the library's own means of extension:

    - Several teachers are one module that runs them all and then shows the library's hooks what is asked of the
      ensemble. ``KDLoss`` takes the softmax of what it reads: ``T`` times the logarithm of the mean softmax.
    - Several translators are an ``AuxiliaryModelWrapper`` around the student, with one ``FTLoss`` each, which reads the
      teacher's feature map itself in the paraphraser's place.
    - MEAL V2 is a cross entropy to the mean softmax and a loss module for the discriminator, which the student's
      wrapper holds so that the box's optimiser trains it.

    Args:
        kind: what is computed, see `plain_loss`.
        student: learns; put in train mode.
        teachers: one or more; frozen (not looked at for ``"supervised"``).
        translators: as in `plain_step`.
        discriminator: as in `plain_step`.
        lr: as in `plain_step`.
        layer: as in `plain_step`.

    Raises:
        InputError: as `plain_loss`, or torchdistill is not installed.
    """
    companions = _companions(kind, teachers, translators, discriminator)
    if kind == "supervised":
        parts = _Parts(student, {"ce": _labels_term()})
    elif kind == "kd":
        parts = _kd_parts(student, teachers)
    elif kind == "meal_v2":
        parts = _meal_v2_parts(student, teachers, companions)
    else:
        parts = _feed_parts(student, teachers, companions, layer)
    forward = {"forward_proc": "forward_batch_only"}
    learner = forward | {"forward_hook": {"output": parts.student_hooks}}
    config = {
        "num_epochs": 1,
        "optimizer": {"key": "SGD", "kwargs": {"lr": lr, "momentum": _MOMENTUM, "weight_decay": _WEIGHT_DECAY}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": parts.terms}},
    }
    where = (next(student.parameters()).device, None, False, 1.0)  # one device; the learning rate as it is
    if parts.teacher is None:
        box = _torchdistill("core.training").TrainingBox(parts.student, {}, config | {"model": learner}, *where)
    else:
        teacher = forward | {"requires_grad": False, "forward_hook": {"output": parts.teacher_hooks}}
        config |= {"student": learner, "teacher": teacher}
        box_of = _torchdistill("core.distillation").DistillationBox
        box = box_of(freeze(parts.teacher), parts.student, {}, config, *where)
    box.pre_epoch_process()
    return box


class _Parts(NamedTuple):
    """What a box is made of: two networks, the loss terms, and the paths that the loss reads in the networks."""

    student: nn.Module
    terms: dict[str, dict[str, Any]]
    student_hooks: Sequence[str] = ()
    teacher: nn.Module | None = None
    teacher_hooks: Sequence[str] = ()


def _kd_parts(student: nn.Module, teachers: Sequence[nn.Module]) -> _Parts:
    path, hooks, teacher = ".", [], teachers[0]
    if len(teachers) > 1:
        path = "readings.softened_logits"
        hooks, teacher = [path], _Teachers(teachers, softened_logits=_softened_logits)
    options = {"temperature": TEMPERATURE, "alpha": HARD_LABEL_WEIGHT}
    paths = {
        "student_module_path": ".",
        "student_module_io": "output",
        "teacher_module_path": path,
        "teacher_module_io": "output",
    }
    terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": paths | options}, "weight": 1.0}}
    return _Parts(student, terms, teacher=teacher, teacher_hooks=hooks)


def _meal_v2_parts(student: nn.Module, teachers: Sequence[nn.Module], companions: Sequence[nn.Module]) -> _Parts:
    targets, mean_logits = "readings.probabilities", "readings.mean_logits"
    teacher = _Teachers(teachers, probabilities=_mean_softmax, mean_logits=lambda logits: logits.mean(dim=0))
    terms = {
        "similarity": _cross_entropy_term({"is_from_teacher": True, "module_path": targets, "io": "output"}),
        "discriminator": {"criterion": _DiscriminatorLoss(companions[0], mean_logits), "weight": 1.0},
    }
    return _Parts(_student_with(student, companions), terms, teacher=teacher, teacher_hooks=[targets, mean_logits])


def _feed_parts(
    student: nn.Module, teachers: Sequence[nn.Module], companions: Sequence[nn.Module], layer: str
) -> _Parts:
    feature = f"network.{resolve_layer(student, layer)}"
    outputs = [f"companions.{number}" for number in range(len(companions))]
    targets = [f"networks.{number}.{resolve_layer(teacher, layer)}" for number, teacher in enumerate(teachers)]
    terms = {"ce": _labels_term()}
    for number, (output, target) in enumerate(zip(outputs, targets, strict=True)):
        options = {"p": 1, "reduction": "mean", "translator_path": output, "paraphraser_path": target}
        terms[f"feed_{number}"] = {"criterion": {"key": "FTLoss", "kwargs": options}, "weight": BETA}
    wrapped = _student_with(student, companions, feature=feature)
    return _Parts(wrapped, terms, [feature, *outputs], _Teachers(teachers), targets)


def _labels_term() -> dict[str, Any]:
    return _cross_entropy_term({"uses_label": True})


def _cross_entropy_term(target: dict[str, Any]) -> dict[str, Any]:
    logits = {"is_from_teacher": False, "module_path": ".", "io": "output"}
    return {
        "criterion": {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}},
        "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": {"input": logits, "target": target}},
        "weight": 1.0,
    }


class _Reading(nn.Module):
    """A function of all teachers' logits ``(M, N, K)``, as a module, so that a hook can read its value."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor) -> Tensor:
        """The value."""
        return self.function(logits)


class _Teachers(nn.Module):
    """Several teachers in the place of a box's one: gives their logits ``(M, N, K)``, and computes every reading."""

    def __init__(self, networks: Sequence[nn.Module], **readings: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.readings = nn.ModuleDict({name: _Reading(function) for name, function in readings.items()})

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        logits = torch.stack([network(images) for network in self.networks])
        for reading in self.readings.values():
            reading(logits)
        return logits


def _softened_logits(logits: Tensor) -> Tensor:
    """Logits ``(N, K)`` whose softmax at `TEMPERATURE` is the mean of the teachers'."""
    return TEMPERATURE * _mean_softmax(logits, TEMPERATURE).log()


class _DiscriminatorLoss(nn.Module):
    """MEAL V2's second term as one of torchdistill's losses.

    Args:
        discriminator: from logits ``(N, K)`` to scores ``(N, 2)``.
        mean_logits: path of the teachers' mean logits.
    """

    def __init__(self, discriminator: nn.Module, mean_logits: str) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.mean_logits = mean_logits

    def forward(self, student: dict[str, Any], teacher: dict[str, Any], targets: Tensor) -> Tensor:
        """A scalar, from what the hooks have seen in both networks."""
        logits = [student["."]["output"], teacher[self.mean_logits]["output"]]
        return functional.discriminator_loss(*self.discriminator(torch.cat(logits)).chunk(2))


def _student_with(student: nn.Module, companions: Sequence[nn.Module], *, feature: str | None = None) -> nn.Module:
    """The student and what learns beside it; with ``feature``, they are run on that output of the student's."""

    class Student(_torchdistill("models.wrapper").AuxiliaryModelWrapper):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = student
            self.companions = nn.ModuleList(companions)

        def forward(self, images: Tensor) -> Any:
            return self.network(images)

        def secondary_forward(self, io_dict: dict[str, Any]) -> None:
            if feature is not None:
                for companion in self.companions:
                    companion(io_dict[feature]["output"])

    return Student()


def _torchdistill(name: str) -> Any:
    """A module of torchdistill, which the other peer does without."""
    try:
        return importlib.import_module(f"torchdistill.{name}")
    except ModuleNotFoundError as error:
        if error.name != "torchdistill":
            raise
        raise InputError("torchdistill is not installed: pip install 'distill-lightning[bench]'") from error


def _companions(
    kind: str,
    teachers: Sequence[nn.Module],
    translators: Sequence[nn.Module] | nn.ModuleList | None,
    discriminator: nn.Module | None,
) -> list[nn.Module]:
    """What learns beside the student: the translators, the discriminator, or nothing."""
    if kind not in get_args(Kind):
        raise InputError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if kind != "supervised" and not teachers:
        raise InputError(f"teachers is empty: {kind} needs at least one network")
    if kind == "meal_v2":
        if discriminator is None:
            raise InputError("meal_v2 needs a discriminator: give layers.Discriminator(num_classes)")
        return [discriminator]
    if kind != "feed":
        return []
    given = list(translators or [])
    if len(given) != len(teachers):
        raise InputError(f"feed: {len(given)} translators for {len(teachers)} teachers: give one each")
    return given


def milliseconds(steps: Mapping[str, Step], images: Tensor, labels: Tensor, *, repeats: int) -> dict[str, float]:
    """Median time of each step, in milliseconds.

    The steps take turns, and every second round runs backwards, so that a machine that slows down slows all alike.

    Args:
        steps: by name; on the CPU.
        images: ``(N, C, H, W)``.
        labels: ``(N,)``.
        repeats: rounds that are timed, after two that are not.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(_WARM_UP + repeats):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            steps[name](images, labels)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[_WARM_UP:]) for name, values in times.items()}


def networks(kind: Kind, count: int) -> dict[str, Any]:
    """A step's arguments: a ResNet-20, ``count`` ResNet-56 as teachers, translators and a discriminator, all random.

    Args:
        kind: what the step computes.
        count: of teachers.
    """
    torch.manual_seed(0)
    teachers = [pytorchcv_network("resnet56_cifar100", num_classes=_CLASSES) for _ in range(count)]
    for teacher in teachers:
        _settle(teacher)
    return {
        "kind": kind,
        "student": pytorchcv_network("resnet20_cifar100", num_classes=_CLASSES),
        "teachers": teachers,
        # 64 channels in both networks' last stage.
        "translators": [Translator(64, 64) for _ in teachers],
        "discriminator": Discriminator(_CLASSES, kind="fixed"),
    }


@torch.no_grad()
def _settle(network: nn.Module) -> None:
    """Let BatchNorm see data: the activations of a random deep network in eval mode would grow from block to block."""
    for _ in range(10):
        network.train()(torch.randn(16, 3, _SIZE, _SIZE))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table.

    Args:
        arguments: the command line's, without the program; see ``--help``.

    Raises:
        InputError: torchdistill or pytorchcv is not installed.
    """
    parser = argparse.ArgumentParser(description="What a step costs in plain PyTorch and in torchdistill, on the CPU.")
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=get_args(Kind))
    parser.add_argument("--teachers", nargs="+", type=int, default=[1, 3, 5], help="how many")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args(arguments)
    images = torch.randn(options.batch_size, 3, _SIZE, _SIZE)
    labels = torch.randint(_CLASSES, (options.batch_size,))
    print(
        f"CPU, {torch.get_num_threads()} OMP threads, batch {options.batch_size}, median of {options.repeats} steps; "
        f"torch {torch.__version__}, torchdistill {_version()}"
    )
    print("| kind | teachers | plain PyTorch, ms | torchdistill, ms |\n|---|---|---|---|")
    for kind in options.kinds:
        for count in [0] if kind == "supervised" else options.teachers:
            # Twice the same networks: each peer trains its own, and hooks into its own.
            steps = {"plain": plain_step(**networks(kind, count)), "td": torchdistill_step(**networks(kind, count))}
            medians = milliseconds(steps, images, labels, repeats=options.repeats)
            print(f"| {kind} | {count} | {medians['plain']:.1f} | {medians['td']:.1f} |", flush=True)


def _version() -> str:
    _torchdistill("core")
    return importlib.metadata.version("torchdistill")


if __name__ == "__main__":
    main()
