"""The entry point of the command line: run a verb, and report bad input in one line."""

from __future__ import annotations

import difflib
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import distill_lightning
from distill_lightning.errors import InputError, disk_line, is_of_the_disk
from distill_lightning.studies.compare import config as compare
from distill_lightning.studies.compress import config as compress
from distill_lightning.studies.doctor import config as doctor
from distill_lightning.studies.error_line import one_line, own_lines, refusal
from distill_lightning.studies.export import config as export
from distill_lightning.studies.quiet import quiet_down

if TYPE_CHECKING:
    from distill_lightning.studies.compress.runs import Setup


VERBS = ("fit", "validate", "test", "predict", "record", "compare", "compress", "export", "doctor")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: what follows the program's name; ``None``: the process's own arguments, and the working directory is put
            on the path of modules.

    Returns:
        The exit status: 0; 1 where ``doctor`` found something wrong, or code of the user's own has failed; 2 after bad
        input, or where a disk is full or refuses.
    """
    if args is None:
        _see_working_directory()
    try:
        return _run(sys.argv[1:] if args is None else list(args))
    except Exception as error:
        if isinstance(error, ArgumentError) or refusal(error) is not None:
            print(f"distill-lightning: error: {one_line(error)}", file=sys.stderr)
            return 2
        # What loggers and others write.
        if isinstance(error, OSError) and is_of_the_disk(error):
            print(f"distill-lightning: error: {disk_line(error)}", file=sys.stderr)
            return 2
        own = own_lines(error)
        if own is None:
            raise
        print(f"distill-lightning: error: {own}", file=sys.stderr)
        return 1


def _see_working_directory() -> None:
    """Find the user's own modules where the command is called, as ``python -m distill_lightning`` does.

    A console script has its own folder there instead.
    """
    here = str(Path.cwd())
    if here not in sys.path and not sys.flags.safe_path:
        sys.path.insert(0, here)


def _run(arguments: list[str]) -> int:
    # Each verb imports what it uses once its options are read: --help and what is refused there need no PyTorch.
    verb, *options = arguments or [""]
    if verb == "compare":
        compared = compare.parse_config(options)
        from distill_lightning.studies.compare import command as compare_command  # noqa: PLC0415

        quiet_down()
        compare_command.run(compared, options)
    elif verb == "compress":
        compressed = compress.parse_config(options)
        from distill_lightning.studies.compress import command as compress_command  # noqa: PLC0415

        quiet_down()
        compress_command.run(compressed, options, _setup_of)
    elif verb == "export":
        exported = export.parse_config(options)
        from distill_lightning.studies.export import command as export_command  # noqa: PLC0415

        quiet_down()
        export_command.run(exported, _setup_of)
    elif verb == "doctor":
        examined = doctor.parse_config(options)
        from distill_lightning.studies.doctor import command as doctor_command  # noqa: PLC0415

        quiet_down()
        return 0 if doctor_command.run(examined, _setup_of).is_well else 1
    elif not verb.startswith("-") and verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{f'there is no verb {verb}' if verb else 'a verb is missing'}: {', '.join(VERBS)}{meant}")
    elif arguments == ["--version"]:
        print(f"distill-lightning {distill_lightning.__version__}")
    else:
        from distill_lightning.cli.lightning_cli import DistillCLI  # noqa: PLC0415

        quiet_down()
        DistillCLI(arguments)
    return 0


def _setup_of(arguments: Sequence[str]) -> Setup:
    """What a configuration makes, without running anything."""
    from distill_lightning.cli.lightning_cli import DistillCLI  # noqa: PLC0415
    from distill_lightning.studies.compress.runs import Setup  # noqa: PLC0415

    cli = DistillCLI(arguments, run=False)
    return Setup(cli.model, cli.datamodule, cli.trainer)
