# SPDX-License-Identifier: Apache-2.0
"""The decision table of the probe, against kernels that are nothing but their answers."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.abi.probing import Identity, Outcome, identify
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v11 import V11, V11_OR_V12
from kvmi_libvirt.abi.v12 import V12

if TYPE_CHECKING:
    from kvmi_libvirt.abi.kvmi import KvmiAbi


def kernel(
    abi: KvmiAbi,
    answer: int,
    *,
    capabilities: frozenset[int] = frozenset(),
    event: int | None = None,
) -> Identity:
    """Ask a kernel that answers *abi*'s requests with *answer* and knows no others."""
    answers = {
        abi.request(Ioctl.COMMAND): answer,
        abi.request(Ioctl.EVENT): answer if event is None else event,
    }
    return identify(
        lambda request: answers.get(request, errno.ENOTTY),
        lambda capability: int(capability in capabilities),
    )


@pytest.mark.parametrize(
    ("abi", "capabilities", "found"),
    [
        (V12, {V12.capability}, V12),
        (V12, {V11.capability}, V11),
        (V12, {V11.capability, V12.capability}, V11_OR_V12),
        (V12, set(), V11_OR_V12),
        (V7, set(), V7),
        (V7, {V12.capability}, V7),
    ],
)
def test_a_kernel_with_kvmi_is_identified(
    abi: KvmiAbi, capabilities: set[int], found: KvmiAbi
) -> None:
    identity = kernel(abi, errno.EINVAL, capabilities=frozenset(capabilities))

    assert identity == (found, Outcome.FOUND, found.title)


def test_a_kernel_without_kvmi() -> None:
    identity = kernel(V12, errno.ENOTTY, capabilities=frozenset({V11.capability}))

    assert identity[:2] == (None, Outcome.ABSENT)
    assert "CONFIG_KVM_INTROSPECTION" in identity.why


@pytest.mark.parametrize("abi", [V12, V7])
@pytest.mark.parametrize(
    ("answer", "outcome", "told"),
    [
        (errno.EPERM, Outcome.OFF, "kvm.introspection=1"),
        (errno.ENOSYS, Outcome.EMULATOR_GONE, "restart the VM"),
        (errno.EIO, Outcome.FOREIGN, "another process"),
        (errno.EFAULT, Outcome.STRANGE, "EFAULT"),
        (0, Outcome.STRANGE, "(0)"),
    ],
)
def test_a_kernel_that_cannot_be_used(
    abi: KvmiAbi, answer: int, outcome: Outcome, told: str
) -> None:
    identity = kernel(abi, answer, capabilities=frozenset({V12.capability}))

    assert identity[:2] == (None, outcome)
    assert told in identity.why


def test_one_number_that_means_something_else_is_no_proof() -> None:
    identity = kernel(V12, errno.EINVAL, event=errno.ENOTTY)

    assert identity.abi is None
    assert identity.why.endswith("(EINVAL, ENOTTY)")


def test_nothing_is_asked_twice() -> None:
    asked: list[int] = []

    def probe(request: int) -> int:
        asked.append(request)
        return errno.ENOTTY

    identify(probe, lambda _capability: 0)

    assert len(asked) == len(set(asked)) == 4
