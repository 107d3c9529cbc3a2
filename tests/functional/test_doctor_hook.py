# SPDX-License-Identifier: Apache-2.0
"""What the doctor sees of a hook script, beside it, and of the interpreters it needs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt import __version__
from kvmi_libvirt.doctor import look_hook
from kvmi_libvirt.doctor.look_hook import look_at_hook
from kvmi_libvirt.installer import HOOK_NAME, hook_text, install_hook

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(
    not Path("/usr/bin/python3").exists(), reason="no /usr/bin/python3, which the script names"
)


@pytest.fixture
def hooks_dir(tmp_path: Path) -> Path:
    """Return a directory of hooks with ours installed, as this very interpreter does it."""
    found = tmp_path / "hooks"
    install_hook(hook_dir=found / "qemu.d", python=sys.executable)
    return found


def hook(hooks_dir: Path) -> Path:
    return hooks_dir / "qemu.d" / HOOK_NAME


def test_what_is_installed_is_found_sound(hooks_dir: Path) -> None:
    found = look_at_hook(hooks_dir)

    assert found.path == str(hook(hooks_dir))
    assert (found.exists, found.is_ours, found.is_executable, found.is_current) == (True,) * 4
    assert (found.shebang_problem, found.python_problem) == (None, None)
    assert (found.python, found.version) == (sys.executable, __version__)
    assert found.python_program == os.path.realpath(sys.executable)
    assert (found.stray, found.broken) == ((), ())


def test_no_hook_at_all(tmp_path: Path) -> None:
    assert look_at_hook(tmp_path / "nowhere").exists is False


def _foreign(path: Path) -> None:
    path.write_text("#!/bin/sh\n", encoding="ascii")


def _unexecutable(path: Path) -> None:
    path.chmod(0o644)


def _edited(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"# edited\n")


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_foreign, {"is_ours": False}),
        (_unexecutable, {"is_executable": False, "is_ours": True, "is_current": True}),
        (_edited, {"is_current": False, "is_ours": True}),
        (_directory, {"exists": True, "is_ours": False}),
    ],
)
def test_damage_is_seen(
    hooks_dir: Path, damage: Callable[[Path], None], expected: dict[str, bool]
) -> None:
    damage(hook(hooks_dir))

    found = look_at_hook(hooks_dir)

    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("python", "text"),
    [
        ("/nonexistent/python3", "/nonexistent/python3: No such file or directory"),
        ("/usr/bin/false", "/usr/bin/false: exit code 1"),
        ("/etc/passwd", "/etc/passwd: Permission denied"),
    ],
)
def test_an_interpreter_that_cannot_load_the_package(
    hooks_dir: Path, python: str, text: str
) -> None:
    hook(hooks_dir).write_bytes(hook_text(python))

    found = look_at_hook(hooks_dir)

    assert (found.python, found.python_problem, found.version) == (python, text, None)
    assert found.is_current  # it is the script all the same


def test_an_interpreter_without_the_package_is_told_by_its_last_line(
    hooks_dir: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "python3"
    empty.write_text(
        '#!/bin/sh\necho Traceback >&2\necho "ModuleNotFoundError: No module" >&2\nexit 1\n',
        encoding="ascii",
    )
    empty.chmod(0o755)
    hook(hooks_dir).write_bytes(hook_text(str(empty)))

    assert look_at_hook(hooks_dir).python_problem == f"{empty}: ModuleNotFoundError: No module"


def test_an_interpreter_that_hangs_is_given_up(
    hooks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "python3"
    slow.write_text("#!/bin/sh\nexec sleep 600\n", encoding="ascii")
    slow.chmod(0o755)
    monkeypatch.setattr(look_hook, "_RUN_TIMEOUT_S", 1)
    monkeypatch.setattr(look_hook, "_shebang_problem", lambda _text: None)
    hook(hooks_dir).write_bytes(hook_text(str(slow)))

    assert look_at_hook(hooks_dir).python_problem == f"{slow} did not end within 1 s"


def test_a_script_that_cannot_be_started(hooks_dir: Path) -> None:
    text = hook_text(sys.executable)
    for shebang, problem in (
        (b"#!/nonexistent/python3 -IS", "/nonexistent/python3: No such file or directory"),
        (b"", "it has no #! line"),
    ):
        hook(hooks_dir).write_bytes(text.replace(text.split(b"\n", 1)[0], shebang, 1))
        assert look_at_hook(hooks_dir).shebang_problem == problem


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"{HOOK_NAME}~",
            f"{HOOK_NAME}.dpkg-old",
            f"{HOOK_NAME}.dpkg-new",
            f"{HOOK_NAME}.ucf-old",
        ),
        *("x.rpmsave", "x.rpmnew", "x.bak", "x.orig", "x.pacnew", ".x.swp", "x.1", "10-y.disabled"),
    ],
)
def test_leftovers_that_libvirt_would_run_are_named(hooks_dir: Path, name: str) -> None:
    leftover = hooks_dir / "qemu.d" / name
    leftover.write_text("#!/bin/sh\n", encoding="ascii")
    leftover.chmod(0o644)
    assert look_at_hook(hooks_dir).stray == ()

    leftover.chmod(0o755)
    assert look_at_hook(hooks_dir).stray == (str(leftover),)


def test_hooks_of_others_are_no_leftovers(hooks_dir: Path) -> None:
    for name in ("10-network", "zz_last", "vm.sh", "v1.2-tool"):
        other = hooks_dir / "qemu.d" / name
        other.write_text("#!/bin/sh\n", encoding="ascii")
        other.chmod(0o755)
    # libvirt runs "qemu" alone in that directory.
    for name in ("qemu", "qemu~"):
        (hooks_dir / name).write_text("#!/bin/sh\n", encoding="ascii")
        (hooks_dir / name).chmod(0o755)

    found = look_at_hook(hooks_dir)

    assert (found.stray, found.broken) == ((), ())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo\n", "it has no #! line"),
        ("", "it has no #! line"),
        ("#!\n", "its #! line names no interpreter"),
        ("#!/nonexistent -x\n", "its interpreter /nonexistent is not there"),
    ],
)
@pytest.mark.parametrize("name", ["qemu", "qemu.d/10-other"])
def test_a_hook_of_another_that_cannot_be_started_is_named(
    hooks_dir: Path, name: str, text: str, why: str
) -> None:
    other = hooks_dir / name
    other.write_text(text, encoding="ascii")
    other.chmod(0o755)

    assert look_at_hook(hooks_dir).broken == ((str(other), why),)
