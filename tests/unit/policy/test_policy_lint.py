# SPDX-License-Identifier: Apache-2.0
"""What ``check`` finds, above all what libvirt would drop without a word."""

from __future__ import annotations

import pytest
import strategies
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmi_libvirt.errors import PolicyError
from kvmi_libvirt.policy.element import parse_document
from kvmi_libvirt.policy.findings import Severity
from kvmi_libvirt.policy.host import HostPolicy, parse_host_policy
from kvmi_libvirt.policy.lint import Report, lint
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.policy.resolve import permit

SOURCE = '<source type="unix" path="/run/kvmi/x"/>'
RULES = '<commands><allow name="KVMI_VM_GET_INFO"/></commands>'
ELEMENT = f'<introspection xmlns="{NAMESPACE}">{SOURCE}{RULES}</introspection>'
NEXT = ELEMENT.replace(":1.0", ":2.0")
ERROR, WARNING = Severity.ERROR, Severity.WARNING


def linted(xml: str) -> Report:
    return lint(xml.encode(), source="x", host=HostPolicy())


def domain(metadata: str, more: str = "") -> str:
    return f"<domain><name>web1</name><metadata>{metadata}</metadata>{more}</domain>"


@pytest.mark.parametrize(
    "xml",
    [ELEMENT, domain(ELEMENT), domain(""), domain("", "<memory>not our business</memory>")],
)
def test_nothing_to_say(xml: str) -> None:
    assert linted(xml).findings == ()


@pytest.mark.parametrize(
    ("xml", "severity", "message"),
    [
        (
            domain(f"<introspection>{SOURCE}</introspection>"),
            ERROR,
            "has no namespace; write <kvmi:introspection xmlns:kvmi=",
        ),
        (
            domain("", f"<introspection>{SOURCE}</introspection>"),
            ERROR,
            "libvirt silently drops it like this",
        ),
        (
            domain("", ELEMENT),
            ERROR,
            "is in <domain>, where libvirt drops it; move it directly into",
        ),
        (
            domain("", f"<devices>{ELEMENT}</devices>"),
            ERROR,
            "is in <devices>, where libvirt drops it",
        ),
        (
            domain(f'<n:x xmlns:n="urn:n">{ELEMENT}</n:x>'),
            ERROR,
            "is in <n:x>, where libvirt drops it",
        ),
        (
            domain("<n:x xmlns:n='urn:n'/>", f"<metadata>{ELEMENT}</metadata>"),
            ERROR,
            "is in a second <metadata>, which libvirt drops",
        ),
        (domain(ELEMENT + ELEMENT), ERROR, "second element of namespace"),
        (
            domain(f"<x xmlns='{NAMESPACE}'/>"),
            ERROR,
            "unknown element <x> in <metadata>; write <introspection>",
        ),
        (domain(NEXT), ERROR, f'this version knows only "{NAMESPACE}"'),
        (domain(ELEMENT + NEXT), WARNING, f'this version knows only "{NAMESPACE}"'),
        (domain(f"<k:introspection xmlns:k='{NAMESPACE[:-4]}'/>"), ERROR, f'write "{NAMESPACE}"'),
        (
            domain("<k:introspection xmlns:k='http://kvmi.example/1.0'/>"),
            ERROR,
            f'write "{NAMESPACE}"',
        ),
        (NEXT, ERROR, "this version knows only"),
        (ELEMENT.replace(RULES, ""), WARNING, "nothing is allowed"),
        (ELEMENT.replace("/run/kvmi/x", "/tmp/x"), ERROR, "is not allowed on this host"),
        (domain(ELEMENT, "<uuid>x</uuid>"), ERROR, "no UUID"),
        ("<domain>", ERROR, "<domain> of line 1 is not closed"),
    ],
)
def test_one_finding_for_one_mistake(xml: str, severity: Severity, message: str) -> None:
    (finding,) = linted(xml).findings
    assert message in finding.message
    assert (finding.severity, finding.line) == (severity, 1)


@pytest.mark.parametrize(
    "metadata",
    [
        # Somebody else's element of the same local name is somebody else's business.
        '<v:introspection xmlns:v="http://vmi.example/1.0"/>',
        '<n:x xmlns:n="urn:n"><introspection/></n:x>',
    ],
)
def test_foreign_elements_are_left_alone(metadata: str) -> None:
    assert linted(domain(metadata)).findings == ()


def test_all_findings_are_told_by_line() -> None:
    rules = '\n<allow name="a"/>\n<deny name="KVMI_GET_VERSION"/>\n'
    events = '<events>\n<allow name="b"/></events>\n'
    inner = f"{events}<commands>{rules}</commands>{SOURCE}"
    xml = f'<introspection xmlns="{NAMESPACE}">{inner}</introspection>'
    assert [(f.line, f.severity) for f in linted(xml).findings] == [
        (2, ERROR),
        (4, ERROR),
        (5, ERROR),
    ]


def test_domain_that_cannot_be_matched_is_told_where_the_host_assigns_something() -> None:
    wrong = "<domain><name>web1</name><uuid>x</uuid></domain>"
    assert linted(wrong).findings == ()
    text = (
        f'<host-policy xmlns="{NAMESPACE}"><assign><match name="web*"/>{SOURCE}</assign>'
        "</host-policy>"
    )
    host = parse_host_policy(text.encode(), source="hp.xml")
    (finding,) = lint(wrong.encode(), source="x", host=host).findings
    assert (finding.severity, "no UUID" in finding.message) == (ERROR, True)


def test_policy_is_given_only_without_errors() -> None:
    assert linted(ELEMENT).policy is not None
    assert linted(domain(ELEMENT, ELEMENT)).policy is None
    assert linted(ELEMENT.replace("/run/kvmi/x", "/tmp/x")).policy is None


def test_findings_are_bounded() -> None:
    rules = "".join(f'<allow name="x{i}"/>' for i in range(5000))
    assert len(linted(ELEMENT.replace(RULES, f"<commands>{rules}</commands>")).findings) == 1000


@given(
    st.binary()
    | strategies.near_elements().map(str.encode)
    | strategies.near_elements().map(lambda text: domain(text).encode())
)
@example(domain(ELEMENT, ELEMENT).encode())
@settings(deadline=None, max_examples=300)
def test_lint_is_never_milder_than_the_parser(data: bytes) -> None:
    report = lint(data, source="x", host=HostPolicy())
    try:
        policy = parse_document(data, source="x")
        if policy is not None:
            permit(policy, HostPolicy(), source="x")
    except PolicyError:
        policy = None
        assert any(finding.severity is ERROR for finding in report.findings)
    if report.policy is not None:
        assert report.policy == policy
