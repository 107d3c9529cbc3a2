# SPDX-License-Identifier: Apache-2.0
"""Look at the hook script, at what lies beside it, and at the interpreter it needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Final

from kvmi_libvirt.daemons import HOOKS_DIR, HookFile, qemu_hooks
from kvmi_libvirt.doctor.facts import HookFacts
from kvmi_libvirt.errors import KvmiLibvirtError
from kvmi_libvirt.installer import HOOK_NAME, hook_text, is_our_hook
from kvmi_libvirt.ownership import who_can_change

_RUN_TIMEOUT_S: Final = 20.0
_MAX_HOOK_LEN: Final = 1 << 20
_MAX_SHEBANG_LEN: Final = 256  # what the kernel reads of it
_PYTHON_LINE: Final = re.compile(r'^PYTHON = (".*")$', re.MULTILINE)
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
_ASK_PACKAGE: Final = (
    "import kvmi_libvirt, kvmi_libvirt.hook; "
    "print(kvmi_libvirt.__version__, kvmi_libvirt.__path__[0], sep='\\n')"
)

# What editors, dpkg, ucf, rpm, pacman and people leave beside a file they replace.
_STRAY: Final = re.compile(
    r".*(~|\.(bak|backup|old|orig|rej|save|saved|swp|tmp|new|disabled|off"
    r"|dpkg-(old|dist|new|tmp|bak|remove)|ucf-(old|dist|new)|rpm(save|new|orig)|pac(new|save)"
    r"|\d{1,2}))"
)


def look_at_hook(hooks_dir: Path = HOOKS_DIR) -> HookFacts:
    """Find out all about the hook; runs the interpreters it names, bounded in time."""
    path = hooks_dir / "qemu.d" / HOOK_NAME
    hooks = qemu_hooks(hooks_dir)
    others = [hook for hook in hooks if hook.is_executable and hook.path != path]
    beside = [hook.path for hook in others if hook.path.parent.name == "qemu.d"]
    stray = tuple(str(found) for found in beside if _STRAY.fullmatch(found.name))
    broken = tuple(_broken(others))
    text = _text(path)
    if text is None:
        is_there = os.path.lexists(path)
        return HookFacts(path=str(path), exists=is_there, stray=stray, broken=broken)
    python = _interpreter(text, path)
    is_ours = is_our_hook(text)
    version, package, problem = _package_of(python) if is_ours else (None, None, None)
    run_as_root = [str(path), python, package or python] if is_ours else []
    return HookFacts(
        path=str(path),
        exists=True,
        is_ours=is_ours,
        is_executable=any(hook.path == path and hook.is_executable for hook in hooks),
        is_current=is_ours and _is_current(text),
        shebang_problem=_shebang_problem(text) if is_ours else None,
        python=python,
        python_program=os.path.realpath(python),
        python_problem=problem,
        version=version,
        others_can=tuple(filter(None, dict.fromkeys(map(who_can_change, run_as_root)))),
        stray=stray,
        broken=broken,
    )


def _text(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_HOOK_LEN)
    except OSError:
        return None


def _named_python(text: bytes) -> str:
    found = _PYTHON_LINE.search(text.decode("utf-8", "replace"))
    try:
        return str(json.loads(found[1])) if found is not None else ""
    except ValueError:
        return ""


def _interpreter(text: bytes, path: Path) -> str:
    # As the script itself finds it.
    if named := _named_python(text):
        return named
    venv = Path(os.path.realpath(path)).parent / ".." / ".." / ".venv" / "bin" / "python3"
    return os.path.normpath(venv) if venv.exists() else "/usr/bin/python3"


def _is_current(text: bytes) -> bool:
    try:
        return text == hook_text(_named_python(text))
    except (KvmiLibvirtError, OSError):
        return False


def _shebang_problem(text: bytes) -> str | None:
    shebang = text.split(b"\n", 1)[0].removeprefix(b"#!").decode("utf-8", "replace").split()
    if not shebang:
        return "it has no #! line"
    return _run([*shebang, "-c", "import posix, sys"])[1]


def _package_of(python: str) -> tuple[str | None, str | None, str | None]:
    # Its version, where it lies, and why it cannot be loaded.
    told, problem = _run([python, "-I", "-c", _ASK_PACKAGE])
    if problem is not None:
        return None, None, problem
    version, _, place = told.partition("\n")
    return version, place or None, None


def _run(command: list[str]) -> tuple[str, str | None]:
    """Return what *command* printed, and why it failed or None."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_RUN_TIMEOUT_S,
            check=False,
            cwd="/",
            env=_ENVIRONMENT,
        )
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} did not end within {_RUN_TIMEOUT_S:g} s"
    if done.returncode == 0:
        return done.stdout.strip(), None
    lines = done.stderr.strip().splitlines()
    return "", f"{command[0]}: {lines[-1] if lines else f'exit code {done.returncode}'}"


def _broken(hooks: list[HookFile]) -> list[tuple[str, str]]:
    found = []
    for hook in hooks:
        try:
            with open(hook.path, "rb") as file:
                start = file.read(_MAX_SHEBANG_LEN)
        except OSError:
            continue
        why = _why_not_executable(start)
        if why is not None:
            found.append((str(hook.path), why))
    return found


def _why_not_executable(start: bytes) -> str | None:
    if start.startswith(b"\x7fELF"):
        return None
    if not start.startswith(b"#!"):
        return "it has no #! line"
    interpreter = start[2:].split(b"\n", 1)[0].split()
    if not interpreter:
        return "its #! line names no interpreter"
    if not os.path.exists(interpreter[0]):
        return f"its interpreter {os.fsdecode(interpreter[0])} is not there"
    return None
