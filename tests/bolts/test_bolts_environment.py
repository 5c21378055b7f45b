"""What pip chooses for the extra."""

from importlib.metadata import version

from packaging.version import Version
from test_versions import MAKEFILE


def test_pip_chooses_the_oldest_lightning_that_is_tried():
    assert f"\nLIGHTNINGS := {version('pytorch-lightning')} " in MAKEFILE
    assert version("lightning-bolts") == "0.7.0"
    assert Version(version("setuptools")) < Version("81")
