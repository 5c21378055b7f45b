"""Print the lowest versions that the metadata allow, as constraints for pip: ``python tests/lowest.py > file``."""

import configparser
import re
import sys
from pathlib import Path

SETUP = Path(__file__).parent.parent / "setup.cfg"
# What tools the tests are run with says nothing about the package.
OF_THE_PACKAGE = ("timm", "pytorchcv", "onnx", "pruning")


def lowest(path=SETUP):
    """``{name: version}`` of every requirement of the package, and of its extras, that has a lower bound."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(path)
    extras = config["options.extras_require"]
    lines = [config["options"]["install_requires"], *(extras[name] for name in OF_THE_PACKAGE)]
    found = {}
    for line in "\n".join(lines).splitlines():
        match = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)", line.strip())
        if match:
            found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in lowest().items())
