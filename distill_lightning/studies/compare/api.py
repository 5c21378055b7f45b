"""``compare`` as a function."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_lightning.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from distill_lightning.studies.compare.comparison import Comparison
    from distill_lightning.studies.compare.config import CompareConfig


def compare(
    config: str | Path | Mapping[str, Any] | CompareConfig | None = None,
    /,
    *,
    console: Console | None = None,
    **keys: Any,
) -> Comparison | None:
    r"""Compare methods on one's own data: teachers, then every method with every seed, one table and its figures.

    This is ``distill-lightning compare``, with the same numbers. What is in the output folder is not made again: after
    an interrupt the same call goes on where it stopped, with more ``seeds`` or ``methods`` it makes these, and with
    nothing new it only reads.

    Where a YAML file names a class, Python may give

    - the class, or a ``functools.partial`` of it with options, which is what the file would say: what the data tell
      (``num_classes``, ``input_shape``, ...), ``optimizer`` and ``lr_scheduler`` need not be repeated;
    - a function that makes one: ``data=lambda: MyDataModule(...)``, ``student=lambda: MyNetwork(10)``, and for
      ``methods`` a function of the student, or of the student and the list of teachers: ``lambda student, teachers:
      KDModule(student, teachers, num_classes=10)``. It is called for every run, after PyTorch's seed is set. A module
      whose optimiser is the default one gets the comparison's ``optimizer`` and ``lr_scheduler``;
    - a data module: every run gets a copy;
    - a network, as ``student`` or as the teachers' ``network``: every run gets one like it, with weights drawn anew
      from its seed. One that is trained, or whose constructor draws weights in another way than its layers do by
      themselves, is refused; a function says what is meant, ``lambda: MyNetwork(10)`` for fresh weights and ``lambda:
      copy.deepcopy(network)`` for its own;
    - networks as ``teachers=[first, second]``: these are trained already, and stay as they are.

    ``compare.yaml`` in the output folder says of these that they were given in Python, with a digest of their code: a
    folder goes on only with what it was begun with.

    Args:
        config: a YAML file, its keys as a dict, or the configuration itself; ``None``: ``keys`` say everything.
        console: where the progress is shown; ``None``: the terminal or the notebook; ``Console(quiet=True)``: nowhere.
        keys: the keys of the file, see ``distill-lightning compare --help``: ``data``, ``student``, ``methods``,
            ``epochs`` and ``seeds`` are needed. They win over ``config``.

    Returns:
        The table, the runs and the figures; a notebook shows it. ``None`` where ``only`` has asked for a part of the
        runs, or other calls in the same folder are making some, and these are not finished.

    Raises:
        InputError: the configuration cannot be used, or the output folder belongs to another one, or to other data.
        KeyboardInterrupt: after Ctrl-C, or the stop button; the finished runs and epochs are kept.

    Example:
        >>> import tempfile
        >>> from functools import partial
        >>> from rich.console import Console
        >>> from torch.optim import SGD
        >>> from distill_lightning import DigitsDataModule, KDModule, OneCycle, SmallResNet, compare
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     comparison = compare(
        ...         data=DigitsDataModule(subset=32, val_size=32, test_size=32, image_size=8),
        ...         teachers={"network": partial(SmallResNet, width=4), "number": 1},
        ...         student=partial(SmallResNet, width=2),
        ...         methods={
        ...             "kd": partial(KDModule, temperature=4.0),
        ...             "hot": lambda student, teachers: KDModule(student, teachers, num_classes=10, temperature=9.0),
        ...         },
        ...         optimizer=partial(SGD, lr=0.1, momentum=0.9),
        ...         lr_scheduler=OneCycle,
        ...         epochs=1,
        ...         seeds=[0],
        ...         accelerator="cpu",
        ...         output=folder,
        ...         console=Console(quiet=True),
        ...     )
        >>> list(comparison.table.index)
        ['teacher_1', 'ensemble', 'alone', 'kd', 'hot']
    """
    # What makes a comparison loads the drawing of figures and more, which importing this package's names need not.
    from distill_lightning.studies.compare import command  # noqa: PLC0415
    from distill_lightning.studies.compare.comparison import Comparison  # noqa: PLC0415
    from distill_lightning.studies.compare.from_python import config_from  # noqa: PLC0415
    from distill_lightning.studies.error_line import one_line  # noqa: PLC0415
    from distill_lightning.studies.progress import INTERRUPTED  # noqa: PLC0415
    from distill_lightning.studies.quiet import quietly  # noqa: PLC0415

    try:
        with quietly():
            described = config_from(config, keys)
            report = command.run(described, None, console=console, shows=False)
    except ArgumentError as error:
        raise InputError(one_line(error)) from error
    except SystemExit as stop:
        if stop.code != INTERRUPTED:
            raise
        # Which does not end a notebook's kernel.
        raise KeyboardInterrupt(f"compare(..., output={described.output!r}) goes on when it is called again") from None
    return None if report is None else Comparison(report, Path(described.output))
