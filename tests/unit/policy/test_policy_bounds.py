# SPDX-License-Identifier: Apache-2.0
"""Whatever is handed in, an answer comes in bounded time and memory."""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.errors import PolicyError
from kvmi_libvirt.policy.document import MAX_BYTES, read_file
from kvmi_libvirt.policy.element import parse_document
from kvmi_libvirt.policy.facts import MAX_EXTRA_SPECS
from kvmi_libvirt.policy.host import HostPolicy, parse_host_policy
from kvmi_libvirt.policy.lint import lint
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.policy.resolve import decide

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = '<source type="unix" path="/run/kvmi/x"/>'
LIMIT_S = 10.0  # of this process's own time; each takes well below a second alone
RULES = 10_000

DOCUMENTS = {
    "same rule": '<allow name="VM_READ_PHYSICAL"/>' * RULES,
    "contradictions": '<allow name="VM_READ_PHYSICAL"/><deny name="VM_READ_PHYSICAL"/>' * 5000,
    "groups": '<allow group="query"/><deny group="memory-protect"/>' * 5000,
    "unknown names": "".join(f'<allow name="VM_READ_{i}"/>' for i in range(RULES)),
    "unknown groups": "".join(f'<allow group="memory-{i}"/>' for i in range(RULES)),
}


def timed_lint(xml: str) -> float:
    before = time.process_time()
    lint(xml.encode(), source="x", host=HostPolicy())
    return time.process_time() - before


@pytest.mark.parametrize("name", DOCUMENTS)
def test_ten_thousand_rules_are_answered_in_time(name: str) -> None:
    inner = f"{SOURCE}<commands>{DOCUMENTS[name]}</commands>"
    assert timed_lint(f'<introspection xmlns="{NAMESPACE}">{inner}</introspection>') < LIMIT_S


def test_ten_thousand_contradicting_rules_still_deny() -> None:
    inner = f"{SOURCE}<commands>{DOCUMENTS['contradictions']}</commands>"
    xml = f'<introspection xmlns="{NAMESPACE}">{inner}</introspection>'
    policy = parse_document(xml.encode(), source="x")
    assert policy is not None
    assert policy.commands.allowed == frozenset()


def test_a_host_with_thousands_of_assignments_answers_in_time() -> None:
    one = '<assign profile="observe"><match name="{}*a*b*c*"/>' + SOURCE + "</assign>"
    assigns = "".join(one.format(i) for i in range(2000))
    xml = f'<host-policy xmlns="{NAMESPACE}">{assigns}</host-policy>'
    before = time.process_time()
    host = parse_host_policy(xml.encode(), source="x")
    domain = f"<domain><name>{'abc' * 1000}</name></domain>".encode()
    assert decide(domain, host, source="x")[1] is None
    assert time.process_time() - before < LIMIT_S


def test_a_file_of_100_mb_is_refused_and_never_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.xml"
    with path.open("wb") as file:
        file.write(b"<domain>")
        file.truncate(100 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = read_file(str(path))
    assert len(data) == MAX_BYTES + 1
    with pytest.raises(PolicyError, match="longer than 16 MiB"):
        parse_document(data, source="x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_extra_specs_are_counted() -> None:
    specs = "".join(f'<n:extraSpec name="k{i}">v</n:extraSpec>' for i in range(5000))
    xml = (
        '<domain><metadata><n:instance xmlns:n="http://openstack.org/xmlns/libvirt/nova/1.1">'
        f'<n:flavor name="x"><n:extraSpecs>{specs}</n:extraSpecs></n:flavor>'
        "</n:instance></metadata></domain>"
    )
    domain, _ = decide(xml.encode(), HostPolicy(), source="x")
    assert domain.nova is not None
    assert len(domain.nova.extra_specs) == MAX_EXTRA_SPECS
