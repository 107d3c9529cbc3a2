# SPDX-License-Identifier: Apache-2.0
"""Where files that are no modules are looked for."""

from __future__ import annotations

import sys
import sysconfig
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt import datafiles
from kvmi_libvirt.datafiles import data_file
from kvmi_libvirt.errors import KvmiLibvirtError

if TYPE_CHECKING:
    from pathlib import Path

NAME = "xml-schemas/introspection.rng"


@pytest.mark.parametrize(
    "place", ["checkout", "prefix/share/kvmi-libvirt", "local/share/kvmi-libvirt"]
)
def test_file_is_found_in_a_checkout_and_wherever_pip_puts_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datafiles, "_CHECKOUT", tmp_path / "checkout")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(sysconfig, "get_path", lambda _scheme: str(tmp_path / "local"))
    with pytest.raises(KvmiLibvirtError, match=f"{NAME} is at neither .*/checkout/.* or .*/local/"):
        data_file(NAME)
    path = tmp_path / place / NAME
    path.parent.mkdir(parents=True)
    path.touch()
    assert data_file(NAME) == path
