# SPDX-License-Identifier: Apache-2.0
"""What the launcher decides before it starts anything."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt import linux
from kvmi_libvirt.abi import seccomp
from kvmi_libvirt.abi.kvmi import KVM_CREATE_VM
from kvmi_libvirt.abi.x86_64 import NR_CLOSE, NR_IOCTL, NR_POLL, NR_RECVMSG
from kvmi_libvirt.emulator import launch
from kvmi_libvirt.emulator.filter import KVM_CREATE_VCPU, filter_program
from kvmi_libvirt.emulator.launch import find_program, wrapper_abi
from kvmi_libvirt.emulator.memory import (
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
)
from kvmi_libvirt.emulator.process import FdKind, fd_kind
from kvmi_libvirt.emulator.revisions import EMULATED
from kvmi_libvirt.errors import EmulatorError, KvmiLibvirtError

if TYPE_CHECKING:
    from kvmi_libvirt.abi.kvmi import KvmiAbi


def executable(path: Path, mode: int = 0o755) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n", encoding="ascii")
    path.chmod(mode)
    return str(path)


def test_program_when_on_path_then_the_first_executable_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dir" / "tool").mkdir(parents=True)
    executable(tmp_path / "plain" / "tool", 0o644)
    wanted = executable(tmp_path / "first" / "tool")
    executable(tmp_path / "second" / "tool")
    places = [tmp_path / name for name in ("missing", "dir", "plain", "first", "second")]
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, places)))

    assert find_program("tool") == wanted


def test_program_when_given_as_a_path_then_path_is_not_searched(tmp_path: Path) -> None:
    wanted = executable(tmp_path / "tool")

    assert find_program(wanted) == wanted


def test_program_when_missing_then_one_line() -> None:
    with pytest.raises(KvmiLibvirtError, match=r"^no-such-tool: command not found$"):
        find_program("no-such-tool")


def test_program_when_not_executable_then_it_says_for_whom(tmp_path: Path) -> None:
    path = executable(tmp_path / "tool", 0o644)

    with pytest.raises(KvmiLibvirtError, match=f"user id {os.geteuid()} may not execute it"):
        find_program(path)


@pytest.mark.parametrize(
    ("name", "abi"),
    [
        ("kvmi-emulated-qemu", "v12"),
        ("kvmi-emulated-qemu-v12", "v12"),
        ("kvmi-emulated-qemu-v11", "v11"),
        ("kvmi-emulated-qemu-v7", "v7"),
        ("a-link-to-it", "v12"),
    ],
)
def test_wrapper_when_named_for_a_revision_then_that_one(name: str, abi: str) -> None:
    assert wrapper_abi(name).name == abi


def test_wrapper_when_named_for_an_unknown_revision_then_it_refuses() -> None:
    with pytest.raises(EmulatorError, match="v99"):
        wrapper_abi("kvmi-emulated-qemu-v99")


@pytest.mark.parametrize(
    ("link", "kind", "stand_in_kind"),
    [
        ("anon_inode:kvm-vm", FdKind.VM, FdKind.VM),
        ("anon_inode:kvm-vcpu:0", FdKind.VCPU, FdKind.VCPU),
        ("/dev/kvm", FdKind.SYSTEM, FdKind.SYSTEM),
        ("/memfd:kvmi-emulated-kvm-vm (deleted)", FdKind.OTHER, FdKind.VM),
        ("/memfd:kvmi-emulated-kvm-vcpu:3 (deleted)", FdKind.OTHER, FdKind.VCPU),
        ("/tmp/anon_inode:kvm-vm", FdKind.OTHER, FdKind.OTHER),
        ("anon_inode:kvm-vm-stats", FdKind.OTHER, FdKind.OTHER),
        ("anon_inode:kvm-vcpu-stats:0", FdKind.OTHER, FdKind.OTHER),
        ("socket:[1]", FdKind.OTHER, FdKind.OTHER),
    ],
)
def test_fd_when_its_link_is_read_then_its_kind_is_known(
    link: str, kind: FdKind, stand_in_kind: FdKind
) -> None:
    assert fd_kind(link, stand_in=False) is kind
    assert fd_kind(link, stand_in=True) is stand_in_kind


SCRIPTS = Path(__file__).parents[3] / "scripts"


def embedded_filters() -> dict[str, str]:
    """Return what the wrapper's script holds for each revision."""
    text = (SCRIPTS / "kvmi-emulated-qemu").read_text(encoding="utf-8")
    found = {}
    for name, block in re.findall(r"^(v\d+)\)\n((?:\tfilter=\S+\n)+)", text, re.MULTILINE):
        found[name] = re.sub(r"\s|filter=|\$\{filter\}", "", block)
    return found


@pytest.mark.parametrize("abi", EMULATED, ids=lambda abi: abi.name)
def test_script_s_filter_when_compared_with_the_program_then_equal(abi: KvmiAbi) -> None:
    program = b"".join(bytes(step) for step in filter_program(abi))

    assert embedded_filters()[abi.name] == program.hex()


def test_script_when_compared_with_the_launcher_then_it_says_the_same() -> None:
    text = (SCRIPTS / "kvmi-emulated-qemu").read_text(encoding="utf-8")

    assert list(embedded_filters()) == [abi.name for abi in EMULATED]
    assert f"\nrevision={EMULATED[0].name}\n" in text
    assert f"${{{launch.QEMU_VARIABLE}:-{launch.DEFAULT_QEMU}}}" in text
    assert f"${{{launch.FAULT_VARIABLE}:-}}" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NOTIF_RECV", seccomp.SECCOMP_IOCTL_NOTIF_RECV),
        ("NOTIF_SEND", seccomp.SECCOMP_IOCTL_NOTIF_SEND),
        ("NOTIF_ID_VALID", seccomp.SECCOMP_IOCTL_NOTIF_ID_VALID),
        ("NOTIF_SET_FLAGS", seccomp.SECCOMP_IOCTL_NOTIF_SET_FLAGS),
        ("SYNC_WAKE_UP", seccomp.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP),
        ("NEW_LISTENER", seccomp.SECCOMP_FILTER_FLAG_NEW_LISTENER),
        ("WAIT_KILLABLE_RECV", seccomp.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV),
        ("PR_SET_NO_NEW_PRIVS", seccomp.PR_SET_NO_NEW_PRIVS),
        ("PR_SET_PTRACER", seccomp.PR_SET_PTRACER),
        *(("CREATE_VM", KVM_CREATE_VM), ("CREATE_VCPU", KVM_CREATE_VCPU)),
        ("SET_USER_MEMORY_REGION", KVM_SET_USER_MEMORY_REGION),
        ("SET_USER_MEMORY_REGION2", KVM_SET_USER_MEMORY_REGION2),
        *(("EACCES", errno.EACCES), ("EBUSY", errno.EBUSY), ("EINVAL", errno.EINVAL)),
        *(("IOCTL", NR_IOCTL), ("SECCOMP", linux._SYS_SECCOMP), ("CLOSE", NR_CLOSE)),
        *(("POLL", NR_POLL), ("RECVMSG", NR_RECVMSG)),
    ],
)
def test_script_s_number_when_compared_with_the_kernel_s_then_equal(name: str, value: int) -> None:
    text = (SCRIPTS / "kvmi-emulated-qemu").read_text(encoding="utf-8")
    numbers: dict[str, int] = {}
    for names, values in re.findall(r"^my \((\$[A-Z][^)]*)\) = \(([^)]*)\);", text, re.MULTILINE):
        each = [int(value, 0) for value in values.split(", ")]
        numbers.update(zip(names.replace("$", "").split(", "), each, strict=True))

    assert numbers[name] == value


def test_wrapper_scripts_when_compared_then_they_are_one() -> None:
    assert {path.resolve().name for path in SCRIPTS.glob("kvmi-emulated-qemu*")} == {
        "kvmi-emulated-qemu"
    }
