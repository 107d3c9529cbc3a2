# SPDX-License-Identifier: Apache-2.0
"""What the launcher decides before it starts anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.emulator import launch, quick
from kvmi_libvirt.emulator.filter import filter_program
from kvmi_libvirt.emulator.launch import find_program, wrapper_abi
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


@pytest.mark.parametrize("abi", EMULATED, ids=lambda abi: abi.name)
def test_quick_filter_when_compared_with_the_program_then_equal(abi: KvmiAbi) -> None:
    program = b"".join(bytes(step) for step in filter_program(abi))

    assert quick.FILTERS[abi.name] == program.hex()


def test_quick_wrapper_when_compared_with_the_careful_one_then_it_says_the_same() -> None:
    assert list(quick.FILTERS) == [abi.name for abi in EMULATED]
    assert EMULATED[0].name == quick.DEFAULT_REVISION
    assert quick.DEFAULT_QEMU == launch.DEFAULT_QEMU
    assert quick.TRACE_DIRECTORY == launch.TRACE_DIRECTORY
    assert quick.FAULT_VARIABLE == launch.FAULT_VARIABLE


def test_wrapper_scripts_when_compared_then_they_are_one() -> None:
    scripts = Path(__file__).parents[3] / "scripts"
    texts = {path.read_text(encoding="utf-8") for path in scripts.glob("kvmi-emulated-qemu*")}

    assert len(texts) == 1
