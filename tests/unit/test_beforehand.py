# SPDX-License-Identifier: Apache-2.0
"""What is refused before QEMU exists: only what is certain not to be possible."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, NoReturn

import pytest

from kvmi_libvirt.abi.probing import Identity, Outcome
from kvmi_libvirt.abi.revisions import by_name
from kvmi_libvirt.beforehand import require_possible
from kvmi_libvirt.errors import PlanError, UnsupportedByKernel
from kvmi_libvirt.policy.element import parse_domain
from kvmi_libvirt.policy.model import Mode, Policy, Rights, UnixSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NATIVE = sys.executable  # any program that is no script


def policy(*commands: str, optional: tuple[str, ...] = (), pin: str | None = None) -> Policy:
    return Policy(
        mode=Mode.REQUIRED,
        source=UnixSource(path="/run/kvmi/x"),
        commands=Rights(allowed=frozenset(commands), optional=frozenset(optional)),
        kernel_abi=pin,
    )


def kernel(name: str) -> Callable[[], Identity]:
    return lambda: Identity(by_name(name), Outcome.FOUND, name)


def without(outcome: Outcome) -> Callable[[], Identity]:
    return lambda: Identity(None, outcome, outcome.value)


@pytest.mark.parametrize("outcome", [Outcome.ABSENT, Outcome.OFF])
def test_a_kernel_that_certainly_has_none_is_refused(outcome: Outcome) -> None:
    with pytest.raises(UnsupportedByKernel) as caught:
        require_possible(policy(), NATIVE, probe=without(outcome))
    assert str(caught.value) == outcome.value


@pytest.mark.parametrize("outcome", [Outcome.STRANGE, Outcome.EMULATOR_GONE, Outcome.FOREIGN])
def test_a_kernel_that_cannot_be_told_is_left_to_qemu(outcome: Outcome) -> None:
    require_possible(policy(), NATIVE, probe=without(outcome))


def test_a_kernel_that_cannot_be_asked_is_left_to_qemu() -> None:
    def fail() -> NoReturn:
        raise OSError(13, "Permission denied", "/dev/kvm")

    require_possible(policy(), NATIVE, probe=fail)


def test_a_right_that_the_kernel_lacks_is_refused_unless_it_is_optional() -> None:
    cleanup = "KVMI_VM_CONTROL_CLEANUP"
    require_possible(policy(cleanup), NATIVE, probe=kernel("v11"))
    with pytest.raises(PlanError, match=cleanup):
        require_possible(policy(cleanup), NATIVE, probe=kernel("v7"))
    require_possible(policy(cleanup, optional=(cleanup,)), NATIVE, probe=kernel("v7"))


def test_in_doubt_about_the_revision_no_right_that_differs_is_possible() -> None:
    page_access = policy("KVMI_VM_SET_PAGE_ACCESS", pin="v12")  # but the kernel says v11
    require_possible(page_access, NATIVE, probe=kernel("v12"))
    with pytest.raises(PlanError, match="SET_PAGE_ACCESS"):
        require_possible(page_access, NATIVE, probe=kernel("v11"))


def test_a_pin_that_the_kernel_contradicts_is_refused() -> None:
    with pytest.raises(UnsupportedByKernel, match="correct <kernel abi"):
        require_possible(policy(pin="v7"), NATIVE, probe=kernel("v12"))


@pytest.mark.parametrize("content", [b"#!/bin/sh\n", b"", b"\x7fEL"])
def test_a_script_may_run_on_an_emulated_kernel(tmp_path: Path, content: bytes) -> None:
    program = tmp_path / "qemu"
    program.write_bytes(content)

    require_possible(policy(), str(program), probe=without(Outcome.ABSENT))
    require_possible(policy(), str(tmp_path / "none"), probe=without(Outcome.ABSENT))
    require_possible(policy(), "", probe=without(Outcome.ABSENT))


def test_a_link_to_a_program_is_that_program(tmp_path: Path) -> None:
    (tmp_path / "kvm").symlink_to(shutil.which(NATIVE) or NATIVE)

    with pytest.raises(UnsupportedByKernel):
        require_possible(policy(), str(tmp_path / "kvm"), probe=without(Outcome.ABSENT))


@pytest.mark.parametrize(
    ("kind", "inner", "expected"),
    [
        ("kvm", "<devices><emulator>/usr/bin/kvm</emulator></devices>", "/usr/bin/kvm"),
        ("qemu", "<devices><emulator>/usr/bin/kvm</emulator></devices>", ""),
        ("kvm", "", ""),
    ],
)
def test_the_emulator_is_read_of_a_kvm_domain(kind: str, inner: str, expected: str) -> None:
    xml = f"<domain type='{kind}'><name>x</name>{inner}</domain>"

    assert parse_domain(xml.encode(), source="x").emulator == expected
