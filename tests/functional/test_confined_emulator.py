# SPDX-License-Identifier: Apache-2.0
"""What QEMU's wrapper and its supervisor open and execute is in the AppArmor rules for them.

No machine here is confined. So strace(1) shows what they do, and that is held against the
rules of a VM's profile with ``kvmi-emulated-qemu`` included, as apparmor_parser(8) reads them.
Where they lie in this checkout stands for where the Debian package puts them.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest
from confinement import EMULATED, PROFILE_OF_A_VM, include, preprocessed, system_profiles
from emulator_harness import TIMEOUT_S, WRAPPER
from support import require_tool

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.seccomp, pytest.mark.kvm]

ROOT: Final = Path(__file__).resolve().parents[2]
CLIENT: Final = """\
#!/usr/bin/python3 -IS
import ctypes, os, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
memory = ctypes.create_string_buffer(2 << 20)
page = -(-ctypes.addressof(memory) // 4096) * 4096
vm = libc.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE01, 0)
vcpu = libc.ioctl(vm, 0xAE41, 0)
region = struct.pack("IIQQQ", 0, 0, 0, 1 << 20, page)
assert libc.ioctl(vm, ctypes.c_ulong(0x4020AE46), region) == 0
qemu, tool = socket.socketpair()
hook = struct.pack("iI16s", qemu.fileno(), 0, bytes(16))
assert libc.ioctl(vm, ctypes.c_ulong(0x4018AEC8), hook) == 0
everything = struct.pack("Ii", 1, -1)
assert libc.ioctl(vm, ctypes.c_ulong(0x4008AECA), everything) == 0
tool.sendall(struct.pack("HHIQQ", 12, 16, 1, 0x1000, 16))
assert tool.recv(64)
os.close(vcpu)
os.close(vm)
assert tool.recv(64) == b""
"""
"""A VM with memory, hooked and read from: what a QEMU, and a tool, make the emulator do."""

PACKAGED: Final = (
    (r"/.*/\.venv/bin/", "/usr/bin/"),
    (r"/.*/\.venv/lib/python[0-9.]+/site-packages", "/usr/lib/python3/dist-packages"),
    (rf"{ROOT}/kvmi_libvirt", "/usr/lib/python3/dist-packages/kvmi_libvirt"),
)
NOT_PACKAGED: Final = "|".join(
    (
        *(r"/.*/\.venv/pyvenv\.cfg", r".*/__editable__.*", str(ROOT)),
        r".*/__pycache__/.*",  # Python does without
        r"/usr/local/.*",  # where Python looks as well: nothing of ours is there
    )
)


class Rule(NamedTuple):
    """A file rule of a profile."""

    path: re.Pattern[str]
    rights: str


# -- the rules -----------------------------------------------------------------------------


def rules_of(text: str) -> list[Rule]:
    """Return the file rules of a profile that apparmor_parser has put together."""
    values: dict[str, list[str]] = {}
    found = []
    for line in text.splitlines():
        if variable := re.match(r"\s*@\{(\w+)\}\s*(\+?)=\s*(.*)", line):
            before = values.get(variable[1], []) if variable[2] else []
            values[variable[1]] = before + variable[3].replace('"', "").split()
        elif rule := re.match(r"\s*(?:owner\s+)?([/@][^\s]*)\s+([a-zA-Z]+),", line):
            found += [Rule(pattern(path), rule[2]) for path in expanded(rule[1], values)]
    return found


def expanded(path: str, values: dict[str, list[str]]) -> Iterator[str]:
    """Yield *path* with each of the values of the variables in it."""
    variable = re.search(r"@\{(\w+)\}", path)
    if variable is None:
        yield re.sub("//+", "/", path)
        return
    for value in values.get(variable[1], []):
        yield from expanded(path[: variable.start()] + value + path[variable.end() :], values)


def pattern(path: str) -> re.Pattern[str]:
    """Return the regular expression of one of AppArmor's globs."""
    parts = {"**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")", ",": "|"}
    tokens = re.findall(r"\*\*|\[[^]]*\]|.", path)
    return re.compile(
        "".join(
            parts.get(token) or (token if token[0] == "[" else re.escape(token)) for token in tokens
        )
    )


# -- what is done --------------------------------------------------------------------------


def done_by_the_emulator(directory: Path, qemu: Path) -> set[tuple[str, str]]:
    """Return what the wrapper, until it is QEMU, and its children opened: (right, path)."""
    done = set()
    for trace in directory.glob("trace.*"):
        lines = trace.read_text(errors="replace").splitlines()
        done |= set(rights_used(itertools.takewhile(lambda line: not is_exec(line, qemu), lines)))
    return done


def is_exec(line: str, program: Path) -> bool:
    return line.startswith(f'execve("{program}"') and line.endswith(" = 0")


def rights_used(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        if opened := re.match(r'openat\(.*?, "(.*?)", (\S+?)[,)].* = \d+<(/.*)>$', line):
            # As it was named: where /proc/self leads is the kernel's to say.
            path = opened[1] if opened[1].startswith("/proc/") else opened[3]
            yield from ((right, path) for right in rights_of(opened[2]))
        elif executed := re.match(r'execve\("(.*?)".* = 0$', line):
            yield from ((right, os.path.abspath(executed[1])) for right in "xr")
        elif mapped := re.match(r"mmap\(.*PROT_EXEC.* \d+<(/.*?)>", line):
            yield "m", mapped[1]


def rights_of(flags: str) -> str:
    if "O_RDWR" in flags:
        return "rw"
    return "w" if "O_WRONLY" in flags else "r"


def packaged(path: str) -> str | None:
    """Return where the package has what lies in this checkout, None for what it lacks."""
    if re.fullmatch(NOT_PACKAGED, path):
        return None
    for here, there in PACKAGED:
        path = re.sub(f"^{here}", there, path)
    return re.sub(r"^/proc/self/", "/proc/1/", path)


def is_allowed(right: str, path: str, rules: list[Rule]) -> bool:
    # "w" is also what appends; a directory's own rule ends with a slash.
    names = {path, f"{path}/"} if os.path.isdir(path) or path.endswith("/fd") else {path}
    return any(
        right in rule.rights and any(rule.path.fullmatch(name) for name in names) for rule in rules
    )


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    client = tmp_path / "qemu"
    client.write_text(CLIENT)
    client.chmod(0o755)
    return client


def test_the_profile_lets_it_do_what_it_does(tmp_path: Path, qemu: Path) -> None:
    strace = require_tool("strace", "strace")
    profiles = system_profiles(tmp_path)
    include(profiles, EMULATED, "abstractions/libvirt-qemu")
    rules = rules_of(preprocessed(profiles, PROFILE_OF_A_VM))
    options = [
        *("--output-separately", "--follow-forks", "--decode-fds=path"),
        *("--trace=openat,execve,mmap", "--string-limit=4096", f"--output={tmp_path}/trace"),
    ]

    ran = subprocess.run(
        [strace, *options, WRAPPER],
        env={**os.environ, "KVMI_QEMU": str(qemu)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    done = done_by_the_emulator(tmp_path, qemu)
    # All of its stages were there, and did what they are for.
    assert {path for right, path in done if right == "x"} >= {str(WRAPPER), "/usr/bin/perl"}
    for opened in (r"/proc/\d+/mem", r"/proc/\d+/fdinfo/\d+"):
        assert [path for _, path in done if re.fullmatch(opened, path)], opened
    inside = {(right, there) for right, path in done if (there := packaged(path)) is not None}
    forbidden = [used for used in sorted(inside) if not is_allowed(*used, rules)]
    assert not forbidden, forbidden


def test_without_the_emulators_rules_it_would_not_do(tmp_path: Path) -> None:
    rules = rules_of(preprocessed(system_profiles(tmp_path), PROFILE_OF_A_VM))

    for right, path in (
        ("x", "/usr/bin/kvmi-emulated-qemu"),
        ("x", "/usr/bin/perl"),
        ("x", "/usr/bin/python3.11"),
        ("r", "/proc/4711/mem"),
        ("r", "/proc/4711/fdinfo/7"),
    ):
        assert not is_allowed(right, path, rules)
    assert is_allowed("x", "/usr/bin/qemu-system-x86_64", rules)
