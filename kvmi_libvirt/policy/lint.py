# SPDX-License-Identifier: Apache-2.0
"""Look at a document as ``kvmi-libvirt check`` does: everything wrong with it at once.

Besides what makes a policy unusable, this finds what libvirt drops without a word,
so that a VM would start unwatched. Imports errors, lxml.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmi_libvirt.errors import PolicyError
from kvmi_libvirt.policy.document import line_of, parse
from kvmi_libvirt.policy.element import (
    ELEMENT,
    domain_of,
    elements_of,
    namespace_message,
    parse_domain,
    placement_findings,
    read_policy,
    root_findings,
)
from kvmi_libvirt.policy.findings import Finding, Severity, in_order
from kvmi_libvirt.policy.host import read_host_policy
from kvmi_libvirt.policy.model import NAMESPACE, NAMESPACE_STEM, Policy
from kvmi_libvirt.policy.profile import read_profile
from kvmi_libvirt.policy.resolve import cuts, refusals
from kvmi_libvirt.policy.shape import MAX_FINDINGS, split, tag_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lxml import etree

    from kvmi_libvirt.policy.host import HostPolicy
    from kvmi_libvirt.policy.reading import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found in one document.

    Parameters
        findings  by line
        policy    None when there is no element, or an error was found in it
        kind      "policy", "host-policy" or "profile"
    """

    findings: tuple[Finding, ...]
    policy: Policy | None
    kind: str = "policy"


def lint(
    xml: bytes,
    *,
    source: str,
    host: HostPolicy,
    profiles: Callable[[str], Profile] | None = None,
) -> Report:
    """Return everything that is wrong, or worth a warning, in *xml*. Never raises PolicyError.

    Parameters
        xml       domain XML, an element by itself, a host's policy or a profile
        profiles  for profile=; by default those of the package and of this host
    """
    try:
        root = parse(xml, source=source)
    except PolicyError as error:
        return Report(findings=(Finding.of(error),), policy=None)
    name = split(root)[1]
    if name == "host-policy":
        found = read_host_policy(root, source=source, profiles=profiles)[1]
        return _other_report(name, found)
    if name == "profile":
        return _other_report(name, read_profile(root, source=source)[1])
    findings: list[Finding] = []
    policy = None
    domain = domain_of(root)
    element: etree._Element | None
    if domain is None:
        element = root
        findings += root_findings(root)
    else:
        elements = elements_of(domain)
        findings += placement_findings(elements)
        findings += _swallowed(domain, elements)
        element = elements[0] if elements else None
    if element is not None and split(element) == (NAMESPACE, ELEMENT):
        policy, found = read_policy(element, source=source, profiles=profiles)
        findings += found
    if policy is not None:
        findings += refusals(policy, host)
        findings += cuts(policy, host)
        findings += _pointless(policy)
    if domain is not None and not findings and (policy is not None or host.assignments):
        findings += _domain_findings(xml, source)
    if any(finding.severity is Severity.ERROR for finding in findings):
        policy = None
    return Report(findings=tuple(in_order(findings)[:MAX_FINDINGS]), policy=policy)


def _other_report(kind: str, findings: list[Finding]) -> Report:
    return Report(findings=tuple(in_order(findings)[:MAX_FINDINGS]), policy=None, kind=kind)


def _swallowed(domain: etree._Element, elements: list[etree._Element]) -> Iterator[Finding]:
    metadata, accepted = domain.find("metadata"), set(elements)
    for element in domain.iter("{*}*"):
        namespace, name = split(element)
        parent = element.getparent()
        if parent is None or element in accepted:
            continue
        if namespace == NAMESPACE:
            if split(parent)[0] != NAMESPACE:
                yield _finding(element, _misplaced(element, parent, domain))
        elif namespace is not None and namespace.startswith(NAMESPACE_STEM):
            if split(parent)[0] != namespace:
                # Beside an element of this version it is for hosts with another one.
                severity = Severity.WARNING if elements else Severity.ERROR
                yield _finding(element, namespace_message(element), severity)
        elif name == ELEMENT and parent in (domain, metadata):
            if namespace is None:
                text = f"{namespace_message(element)}; libvirt silently drops it like this"
                yield _finding(element, text)
            elif "kvmi" in namespace.lower():
                yield _finding(element, namespace_message(element))


def _misplaced(element: etree._Element, parent: etree._Element, domain: etree._Element) -> str:
    tag = tag_of(element)
    if parent.tag == "metadata" and parent.getparent() is domain:
        return f"{tag} is in a second <metadata>, which libvirt drops; move it to the first"
    return f"{tag} is in {tag_of(parent)}, where libvirt drops it; move it directly into <metadata>"


def _pointless(policy: Policy) -> Iterator[Finding]:
    if not (policy.commands.allowed or policy.events.allowed):
        text = "nothing is allowed: the tool can only ask what it may do; write <allow> rules"
        yield Finding(message=text, line=policy.line, severity=Severity.WARNING)


def _domain_findings(xml: bytes, source: str) -> Iterator[Finding]:
    try:
        parse_domain(xml, source=source)
    except PolicyError as error:
        yield Finding.of(error)


def _finding(element: etree._Element, message: str, severity: Severity = Severity.ERROR) -> Finding:
    return Finding(message=message, line=line_of(element), severity=severity)
