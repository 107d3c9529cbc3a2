# SPDX-License-Identifier: Apache-2.0
"""VMs and tools that come and go below a running agent, without libvirt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from agent_harness import INFO, Site, host, programs, tool
from patient_tool import PatientTool

if TYPE_CHECKING:
    pass

__all__ = ["host", "programs", "tool"]

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp, pytest.mark.ptrace]


def test_vms_that_come_after_the_agent_are_hooked_and_forgotten_when_they_end(
    host: Site, tool: PatientTool
) -> None:
    host.assign()
    first, second = host.boot("first", "second")
    host.wait_rights(first, second)
    assert host.allows(tool, first) == {INFO}
    host.shut(first)
    host.agent.wait(lambda: set(host.agent.status()) == {"second"}, what="it is forgotten")
    host.wait_rights(second)
    (again,) = host.boot("first")
    host.wait_rights(again)
