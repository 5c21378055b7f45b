"""The contract that every module of the package keeps: one check per promise."""

from __future__ import annotations

from distill_lightning.testing import points_of_networks, points_of_runs
from distill_lightning.testing.points import CONTRACT, Build, kit_of

# Those that stand in these files; imported, they are in `CONTRACT`.
POINTS = (points_of_networks, points_of_runs)


def assert_module_contract(build: Build) -> None:
    """Check every point of `CONTRACT`.

    ::

        from distill_lightning.testing import assert_module_contract

        def build(student, teachers, num_classes):
            return MyModule(student, teachers, num_classes=num_classes)

        def test_contract():
            assert_module_contract(build)

    The networks are `TinyNet`, whose ``features`` can be tapped, or those of the function's `Kit`; the two teachers
    need not be used. With pytest, ``@pytest.mark.parametrize("point", CONTRACT)`` and ``CONTRACT[point](build)`` make a
    test of each point.

    Args:
        build: a function at the top level of a file that makes the module, see `Build`.

    Raises:
        AssertionError: the module breaks a point; the message names it and, where the module waits for the device, the
            line that does.
    """
    for name, check in CONTRACT.items():
        if name in kit_of(build).excluded:
            continue
        try:
            check(build)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
