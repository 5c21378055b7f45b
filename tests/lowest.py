"""Print the lowest versions that the metadata allow, as constraints for pip: ``python tests/lowest.py EXTRA ...``.

The extras are those that are installed with the package; one may need newer versions than it.
"""

import configparser
import re
import sys
from pathlib import Path

SETUP = Path(__file__).parent.parent / "setup.cfg"


def lowest(*extras, path=SETUP):
    """``{name: version}`` of every requirement of the package, and of extras, that has a lower bound."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(path)
    lines = [config["options"]["install_requires"], *(config["options.extras_require"][name] for name in extras)]
    found = {}
    for line in "\n".join(lines).splitlines():
        match = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)", line.strip())
        if match:
            found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in lowest(*sys.argv[1:]).items())
