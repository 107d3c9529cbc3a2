# SPDX-License-Identifier: Apache-2.0
"""Asking a kernel for its KVMI revision with an empty VM, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvmi_libvirt.abi.probing import Outcome
from kvmi_libvirt.kernel import probe_kernel, running_abi

pytestmark = [pytest.mark.kvm]

ASK = (
    "from kvmi_libvirt.kernel import probe_kernel as p; i = p(); print(i.outcome.name, i.abi.name)"
)


@pytest.mark.seccomp
@pytest.mark.parametrize("abi", ["v12", "v11", "v7"])
def test_an_emulated_kernel_is_told_by_its_answers(abi: str) -> None:
    main = "from kvmi_libvirt.cli import main; exit(main())"
    asked = subprocess.run(
        [sys.executable, "-c", main, "emulate", "--abi", abi, "--", sys.executable, "-c", ASK],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert asked.stdout == f"FOUND {abi}\n"


def test_this_kernel_is_asked_without_leaving_anything() -> None:
    found = probe_kernel()

    assert found.outcome in (Outcome.FOUND, Outcome.ABSENT, Outcome.OFF)
    assert (found.abi is not None) == (found.outcome is Outcome.FOUND)
    assert running_abi()[0] is found.abi
