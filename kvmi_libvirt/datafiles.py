# SPDX-License-Identifier: Apache-2.0
"""Where the files that are no Python modules lie: schemas, the hook script, configuration.

In a checkout (or an editable install) they are beside the package; a wheel puts
them below ``PREFIX/share/kvmi-libvirt``. Imports errors only.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Final

from kvmi_libvirt.errors import KvmiLibvirtError

_CHECKOUT: Final = Path(__file__).resolve().parent.parent
_SHARE: Final = Path("share", "kvmi-libvirt")


def _places() -> list[Path]:
    # Debian's pip installs below /usr/local, which is not sys.prefix.
    prefixes = [Path(sys.prefix), Path(sysconfig.get_path("data"))]
    return [_CHECKOUT, *(prefix / _SHARE for prefix in prefixes)]


def data_file(name: str) -> Path:
    """Return the path of the shipped file *name*, for example "xml-schemas/introspection.rng".

    Raises
        KvmiLibvirtError  the installation is not complete; names the places looked at.
    """
    places = [place / name for place in _places()]
    for path in places:
        if path.is_file():
            return path
    looked = " or ".join(map(str, dict.fromkeys(places)))
    raise KvmiLibvirtError(f"installation is not complete: {name} is at neither {looked}")


def data_files(directory: str, pattern: str = "*") -> list[Path]:
    """Return the shipped files of *directory* that match *pattern*, by name; none is fine."""
    for place in _places():
        found = sorted(path for path in (place / directory).glob(pattern) if path.is_file())
        if found:
            return found
    return []
