# SPDX-License-Identifier: Apache-2.0
"""Proxmox VE's hookscript in a snippets directory: complete or absent, ours or untouched."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Final

import pytest

from kvmi_libvirt.cli import main
from kvmi_libvirt.errors import KvmiLibvirtError
from kvmi_libvirt.snippets import HOOKSCRIPT_NAME, install_hookscript, uninstall_hookscript

if TYPE_CHECKING:
    from pathlib import Path

PYTHON: Final = "/opt/kvmi/bin/python3"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_hookscript_is_installed_once_and_removed(tmp_path: Path) -> None:
    assert install_hookscript(tmp_path, python=PYTHON)
    path = tmp_path / HOOKSCRIPT_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert f'\nPYTHON = "{PYTHON}"\n' in path.read_text(encoding="utf-8")
    assert names(tmp_path) == [HOOKSCRIPT_NAME]

    assert not install_hookscript(tmp_path, python=PYTHON)
    assert install_hookscript(tmp_path, python="/usr/bin/python3")
    assert uninstall_hookscript(tmp_path)
    assert not uninstall_hookscript(tmp_path)
    assert names(tmp_path) == []


def test_a_hookscript_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / HOOKSCRIPT_NAME).write_text("#!/bin/sh\n", encoding="utf-8")

    for change in (install_hookscript, uninstall_hookscript):
        with pytest.raises(KvmiLibvirtError, match="is not ours"):
            change(tmp_path)
    assert (tmp_path / HOOKSCRIPT_NAME).read_text(encoding="utf-8") == "#!/bin/sh\n"


def test_snippets_that_are_not_there_are_not_made(tmp_path: Path) -> None:
    with pytest.raises(KvmiLibvirtError, match="is no directory"):
        install_hookscript(tmp_path / "snippets")
    assert names(tmp_path) == []


def test_the_verbs_say_what_is_done_and_what_is_left_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def typed(*words: str) -> str:
        assert main([*words, "--proxmox", str(tmp_path)]) == 0
        return capsys.readouterr().out

    assert "was not there" in typed("uninstall", "--dry-run")
    assert typed("install", "--dry-run").startswith("would install ")
    assert names(tmp_path) == []
    done = typed("install")
    assert done.startswith("installed ")
    assert "qm set VMID --hookscript" in done
    assert "is in place already" in typed("install", "--dry-run")
    assert typed("uninstall", "--dry-run").startswith("would remove ")
    assert names(tmp_path) != []
    done = typed("uninstall")
    assert done.startswith("removed ")
    assert "--delete hookscript" in done
    assert names(tmp_path) == []
