# SPDX-License-Identifier: Apache-2.0
"""The hook in qemu.d: complete or absent, ours or untouched. Temporary directories only."""

from __future__ import annotations

import os
import re
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from kvmi_libvirt.errors import KvmiLibvirtError
from kvmi_libvirt.installer import (
    HOOK_DIR,
    HOOK_NAME,
    hook_text,
    install_hook,
    uninstall_hook,
)

if TYPE_CHECKING:
    from collections.abc import Callable

PYTHON: Final = "/opt/kvmi/bin/python3"


@pytest.fixture
def hook_dir(tmp_path: Path) -> Path:
    return tmp_path / "hooks" / "qemu.d"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_the_place_is_libvirts_and_the_name_never_hooks_qemu() -> None:
    assert Path("/etc/libvirt/hooks/qemu.d") == HOOK_DIR
    assert HOOK_NAME == "50-kvmi-libvirt"


def test_the_script_is_told_which_interpreter_has_the_package() -> None:
    shipped, installed = hook_text("").decode(), hook_text(PYTHON).decode()

    assert installed.splitlines()[0] == "#!/usr/bin/python3 -IS"
    assert re.findall(r"^PYTHON = .*$", installed, re.MULTILINE) == [f'PYTHON = "{PYTHON}"']
    assert len(installed.splitlines()) == len(shipped.splitlines())
    compile(installed, "hook", "exec")


def test_installing_makes_an_executable_and_nothing_else(hook_dir: Path) -> None:
    assert install_hook(hook_dir=hook_dir, python=PYTHON) is True

    path = hook_dir / HOOK_NAME
    assert path.read_bytes() == hook_text(PYTHON)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert names(hook_dir) == [HOOK_NAME]
    assert names(hook_dir.parent) == ["qemu.d"]


def test_installing_twice_changes_nothing(hook_dir: Path) -> None:
    install_hook(hook_dir=hook_dir, python=PYTHON)
    before = (hook_dir / HOOK_NAME).stat()

    assert install_hook(hook_dir=hook_dir, python=PYTHON) is False
    assert os.path.samestat((hook_dir / HOOK_NAME).stat(), before)


@pytest.mark.parametrize("change", ["older", "other-python", "not-executable"])
def test_an_older_hook_of_ours_is_replaced(hook_dir: Path, change: str) -> None:
    install_hook(hook_dir=hook_dir, python="/old/python3" if change == "other-python" else PYTHON)
    path = hook_dir / HOOK_NAME
    if change == "older":
        path.write_text("#!/bin/sh\nexec python3 -m kvmi_libvirt.hook\n", encoding="utf-8")
    elif change == "not-executable":
        path.chmod(0o644)

    assert install_hook(hook_dir=hook_dir, python=PYTHON) is True
    assert path.read_bytes() == hook_text(PYTHON)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert names(hook_dir) == [HOOK_NAME]


@pytest.mark.parametrize("act", [install_hook, uninstall_hook])
def test_a_foreign_file_of_our_name_is_left_alone(hook_dir: Path, act: Callable[..., bool]) -> None:
    hook_dir.mkdir(parents=True)
    (hook_dir / HOOK_NAME).write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")

    with pytest.raises(KvmiLibvirtError, match="is not ours"):
        act(hook_dir=hook_dir)

    assert (hook_dir / HOOK_NAME).read_text(encoding="utf-8") == "#!/bin/sh\nexit 0\n"
    assert names(hook_dir.parent) == ["qemu.d"]


def test_other_hooks_stay_as_they_are(hook_dir: Path) -> None:
    hook_dir.mkdir(parents=True)
    others = {hook_dir / "10-other": "#!/bin/sh\n", hook_dir.parent / "qemu": "#!/bin/sh\n"}
    for path, text in others.items():
        path.write_text(text, encoding="utf-8")
        path.chmod(0o700)

    install_hook(hook_dir=hook_dir, python=PYTHON)
    uninstall_hook(hook_dir=hook_dir)

    for path, text in others.items():
        assert path.read_text(encoding="utf-8") == text
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert names(hook_dir) == ["10-other"]


def test_a_hook_appears_complete_and_executable_in_one_step(
    hook_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # libvirt runs whatever is executable in qemu.d, at any moment.
    steps: list[list[str]] = []

    def watched(real: Callable[..., object]) -> Callable[..., object]:
        def move(source: Path | str, target: Path | str) -> object:
            if not steps:
                assert Path(source).parent != hook_dir
                assert Path(source).read_bytes() == hook_text(PYTHON)
                assert stat.S_IMODE(os.stat(source).st_mode) == 0o755
                steps.append(names(hook_dir))
            return real(source, target)

        return move

    for owner, name in ((Path, "rename"), (Path, "replace"), (os, "rename"), (os, "replace")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    install_hook(hook_dir=hook_dir, python=PYTHON)

    assert steps == [[]]
    assert names(hook_dir) == [HOOK_NAME]


def test_an_installation_that_fails_leaves_qemu_d_as_it_was(hook_dir: Path) -> None:
    install_hook(hook_dir=hook_dir, python="/old/python3")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            install_hook(hook_dir=hook_dir, python=PYTHON)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    assert names(hook_dir) == [HOOK_NAME]
    assert (hook_dir / HOOK_NAME).read_bytes() == hook_text("/old/python3")
    assert names(hook_dir.parent) == ["qemu.d"]
    # And trying again is all that is needed.
    assert install_hook(hook_dir=hook_dir, python=PYTHON) is True
    assert names(hook_dir.parent) == ["qemu.d"]


def test_a_directory_of_our_name_is_left_alone(hook_dir: Path) -> None:
    (hook_dir / HOOK_NAME).mkdir(parents=True)

    for act in (install_hook, uninstall_hook):
        with pytest.raises(IsADirectoryError):
            act(hook_dir=hook_dir)


def test_uninstalling_removes_the_hook_and_nothing_else(hook_dir: Path) -> None:
    install_hook(hook_dir=hook_dir, python=PYTHON)

    assert uninstall_hook(hook_dir=hook_dir) is True
    assert names(hook_dir) == []
    assert uninstall_hook(hook_dir=hook_dir) is False


def test_uninstalling_where_nothing_ever_was(tmp_path: Path) -> None:
    assert uninstall_hook(hook_dir=tmp_path / "missing") is False


def test_the_interpreter_is_the_one_that_installs(hook_dir: Path) -> None:
    install_hook(hook_dir=hook_dir)

    assert f'PYTHON = "{sys.executable}"\n'.encode() in (hook_dir / HOOK_NAME).read_bytes()


@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="no /usr/bin/python3")
def test_what_is_installed_runs(hook_dir: Path) -> None:
    install_hook(hook_dir=hook_dir, python=PYTHON)

    done = subprocess.run(
        [hook_dir / HOOK_NAME, "vm", "start", "begin", "-"],
        input=b"<domain/>",
        capture_output=True,
        timeout=30,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
