# SPDX-License-Identifier: Apache-2.0
"""Whatever is handed in, an answer comes in bounded time and memory."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.errors import PolicyError
from kvmi_libvirt.policy.document import MAX_BYTES, MAX_ELEMENTS, read_file
from kvmi_libvirt.policy.element import parse_document
from kvmi_libvirt.policy.facts import MAX_EXTRA_SPECS, MAX_NAME_LEN
from kvmi_libvirt.policy.host import HostPolicy, parse_host_policy
from kvmi_libvirt.policy.lint import lint
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.policy.resolve import decide
from kvmi_libvirt.policy.shape import MAX_FINDINGS

if TYPE_CHECKING:
    from pathlib import Path

SOURCE = '<source type="unix" path="/run/kvmi/x"/>'
NOVA = (
    '<n:instance xmlns:n="http://openstack.org/xmlns/libvirt/nova/1.1"><n:flavor name="%s"/>'
    "</n:instance>"
)
LIMIT_S = 10.0  # of this process's own time; each takes well below a second alone
LIMIT_MIB = 256
RULES = 10_000

DOCUMENTS = {
    "same rule": '<allow name="VM_READ_PHYSICAL"/>' * RULES,
    "contradictions": '<allow name="VM_READ_PHYSICAL"/><deny name="VM_READ_PHYSICAL"/>' * 5000,
    "groups": '<allow group="query"/><deny group="memory-protect"/>' * 5000,
    "unknown names": "".join(f'<allow name="VM_READ_{i}"/>' for i in range(RULES)),
    "unknown groups": "".join(f'<allow group="memory-{i}"/>' for i in range(RULES)),
}


ELEMENT = f'<introspection xmlns="{NAMESPACE}">{SOURCE}%s</introspection>'
DOMAIN = f'<domain xmlns:k="{NAMESPACE}"><name>x</name>%s</domain>'

HOSTILE: dict[str, tuple[bytes, int]] = {
    # What is handed in, and what check ends with.
    "zeros": (bytes(MAX_BYTES), 3),
    "text": (DOMAIN.replace("x</name>", "x" * (MAX_BYTES - 200) + "</name>").encode() % b"", 0),
    "spaces": (DOMAIN.encode() % (b" " * (MAX_BYTES - 200)), 0),
    "comments": (DOMAIN.encode() % (b"<!---->" * 2_000_000), 0),
    "elements": (DOMAIN.encode() % (b"<a/>" * (MAX_ELEMENTS - 2)), 0),
    "too many elements": (DOMAIN.encode() % (b"<a/>" * MAX_ELEMENTS), 3),
    "attributes": (DOMAIN.encode() % (b"<a " + b"b='' " * 2_000_000 + b"/>"), 3),
    "long names": (DOMAIN.encode() % (b"<%s/>" % (b"a" * 8_000_000)), 3),
    "depth": (b"<a>" * (MAX_BYTES // 3), 3),
    "entity bomb": (
        b"<!DOCTYPE a [<!ENTITY b '" + b"c" * 1_000_000 + b"'>]><a>" + b"&b;" * 1_000_000 + b"</a>",
        3,
    ),
    "elements of ours": (DOMAIN.encode() % (b"<k:introspection/>" * 90_000), 3),
    "rules": (
        ELEMENT.encode() % (b"<commands>" + b"<allow name='x'/>" * 19_000 + b"</commands>"),
        3,
    ),
    "too many rules": (
        ELEMENT.encode() % (b"<commands>" + b"<allow name='x'/>" * 90_000 + b"</commands>"),
        3,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_check_of_a_hostile_file_is_bounded_in_time_and_memory(name: str, tmp_path: Path) -> None:
    data, code = HOSTILE[name]
    path = tmp_path / "hostile.xml"
    path.write_bytes(data)
    # ru_maxrss would count this process, of which the child is a fork before it is itself.
    main = (
        "import shutil, sys; from kvmi_libvirt.cli import main; code = main(sys.argv[2:]); "
        "shutil.copyfile('/proc/self/status', sys.argv[1]); sys.exit(code)"
    )
    with (tmp_path / "out").open("wb") as out:
        popen = subprocess.Popen(
            [sys.executable, "-c", main, tmp_path / "status", "check", path],
            stdout=out,
            stderr=out,
        )
        _, status, used = os.wait4(popen.pid, 0)
        popen.returncode = os.waitstatus_to_exitcode(status)
    told = (tmp_path / "out").read_text(encoding="utf-8")
    assert popen.returncode == code, told
    assert "Traceback" not in told
    assert len(told.splitlines()) <= MAX_FINDINGS
    assert used.ru_utime + used.ru_stime < LIMIT_S
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB", (tmp_path / "status").read_text(), flags=re.M)
    assert int(peak) < LIMIT_MIB << 10


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
    domain = f"<domain><name>{'abc' * (MAX_NAME_LEN // 3)}</name></domain>".encode()
    assert decide(domain, host, source="x")[1] is None
    assert time.process_time() - before < LIMIT_S


@pytest.mark.parametrize(
    ("long", "tag"),
    [
        (f"<name>{'a' * (MAX_NAME_LEN + 1)}</name>", "name"),
        (f"<metadata>{NOVA % ('a' * (MAX_NAME_LEN + 1))}</metadata>", "flavor"),
    ],
)
def test_text_that_patterns_are_held_against_is_short(long: str, tag: str) -> None:
    # Or a tenant's name could keep a host with many patterns busy for minutes.
    with pytest.raises(PolicyError, match=f"the name in <{tag}> has 1025 characters; 1024 is"):
        decide(f"<domain>{long}</domain>".encode(), HostPolicy(), source="x")


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
