# SPDX-License-Identifier: Apache-2.0
"""Read the introspection element, from a domain's XML or by itself.

What libvirt gives to hooks, prints with ``dumpxml`` and keeps in its status files
is read here. Whether the host allows what is asked for is ``resolve.py``'s matter.
Imports errors, lxml.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import PolicySchemaError
from kvmi_libvirt.policy import facts
from kvmi_libvirt.policy.document import line_of, parse
from kvmi_libvirt.policy.findings import Finding, raise_first
from kvmi_libvirt.policy.model import NAMESPACE, NAMESPACE_STEM, Policy
from kvmi_libvirt.policy.profile import Profiles
from kvmi_libvirt.policy.reading import read_content
from kvmi_libvirt.policy.shape import shape_findings, split, tag_of
from kvmi_libvirt.quoting import quoted

if TYPE_CHECKING:
    from collections.abc import Callable

    from lxml import etree

    from kvmi_libvirt.policy.reading import Profile

ELEMENT: Final = "introspection"


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain(facts.Identity):
    """What is needed of a libvirt domain.

    Parameters
        uuid          lower case with dashes, "" when the document has none
        vcpus         online at start
        memory_bytes  total guest memory, 0 when the document has none
        machine       for example "pc-q35-7.2", "" when the document has none
        policy        None when the domain carries no introspection element
        emulator      program that runs it with KVM, "" when the document does not say
        origin        file name or description of the document, for messages
    """

    vcpus: int
    memory_bytes: int
    machine: str
    policy: Policy | None
    emulator: str = ""
    origin: str = field(default="", compare=False)


def parse_domain(xml: bytes, *, source: str, with_policy: bool = True) -> Domain:
    """Return the domain that *xml* describes: a domain document or libvirt's status file.

    The element counts only as a direct child of the first ``/domain/metadata``, which
    is the only place where libvirt keeps it, and only by its namespace.

    Parameters
        source       where *xml* is from, for messages
        with_policy  False: the introspection element is not looked at
    Raises
        PolicyError  not a domain document, or its introspection element is wrong.
    """
    root = parse(xml, source=source)
    domain = domain_of(root)
    if domain is None:
        text = _foreign_domain(root) or f"root element is {tag_of(root)}, not <domain>"
        raise PolicySchemaError(text, source=source, line=line_of(root))
    return Domain(
        name=facts.name(domain, source),
        uuid=facts.uuid(domain, source),
        vcpus=facts.vcpus(domain, source),
        memory_bytes=facts.memory_bytes(domain, source),
        machine=facts.machine(domain),
        policy=_policy_of(domain, source) if with_policy else None,
        nova=facts.nova_facts(domain, source),
        emulator=facts.emulator(domain),
        origin=source,
    )


def parse_document(xml: bytes, *, source: str) -> Policy | None:
    """Return the policy in *xml*: a domain document, or an introspection element by itself.

    Returns
        None when it is a domain without an introspection element.
    Raises
        PolicyError  neither of the two, or the element is wrong.
    """
    root = parse(xml, source=source)
    domain = domain_of(root)
    if domain is not None:
        return _policy_of(domain, source)
    raise_first(root_findings(root), source=source)
    policy, findings = read_policy(root, source=source)
    raise_first(findings, source=source)
    return policy


def domain_of(root: etree._Element) -> etree._Element | None:
    """Return the domain element of a document with this *root*, or None if it has none."""
    if root.tag == "domain":
        return root
    return root.find("domain") if root.tag == "domstatus" else None


def elements_of(domain: etree._Element) -> list[etree._Element]:
    """Return all elements of our namespace where libvirt keeps the first one."""
    metadata = domain.find("metadata")
    if metadata is None:
        return []
    return [child for child in metadata if split(child)[0] == NAMESPACE]


def placement_findings(elements: list[etree._Element]) -> list[Finding]:
    """Return what is wrong with *elements*, all of our namespace in one metadata element."""
    found = []
    for element in elements[1:]:
        text = (
            f"second element of namespace {quoted(NAMESPACE)} in <metadata>; "
            "libvirt silently keeps only the first, write one"
        )
        found.append(Finding(message=text, line=line_of(element)))
    if elements and split(elements[0])[1] != ELEMENT:
        text = f"unknown element {tag_of(elements[0])} in <metadata>; write <{ELEMENT}>"
        found.append(Finding(message=text, line=line_of(elements[0])))
    return found


def root_findings(root: etree._Element) -> list[Finding]:
    """Return why *root* is not an introspection element; empty when it is."""
    namespace, name = split(root)
    if name == ELEMENT and namespace == NAMESPACE:
        return []
    if name == ELEMENT:
        message = namespace_message(root)
    else:
        message = _foreign_domain(root) or (
            f'root element is {tag_of(root)}; expected <domain> or <{ELEMENT} xmlns="{NAMESPACE}">'
        )
    return [Finding(message=message, line=line_of(root))]


def _foreign_domain(root: etree._Element) -> str | None:
    namespace, name = split(root)
    if name != "domain" or namespace is None:
        return None
    return f"{tag_of(root)} is of namespace {quoted(namespace)}; libvirt has none, remove it"


def namespace_message(element: etree._Element) -> str:
    """Return why the namespace of an introspection element is not the right one."""
    namespace, tag = split(element)[0], tag_of(element)
    if namespace is None:
        return f'{tag} has no namespace; write <kvmi:{ELEMENT} xmlns:kvmi="{NAMESPACE}">'
    if namespace.startswith(f"{NAMESPACE_STEM}:"):
        return f'{tag} is of namespace {quoted(namespace)}; this version knows only "{NAMESPACE}"'
    return f'{tag} is of namespace {quoted(namespace)}; write "{NAMESPACE}"'


def read_policy(
    element: etree._Element,
    *,
    source: str | None = None,
    profiles: Callable[[str], Profile] | None = None,
) -> tuple[Policy | None, list[Finding]]:
    """Return the policy of an introspection *element*, and everything found in it.

    Parameters
        source    where it is from, for explanations
        profiles  for profile=; by default those of the package and of this host
    Returns
        None for the policy if and only if a finding is an error.
    """
    findings = shape_findings(element)
    if findings:
        return None, findings
    return read_content(element, findings, profiles or Profiles(), source=source), findings


def _policy_of(domain: etree._Element, source: str) -> Policy | None:
    elements = elements_of(domain)
    raise_first(placement_findings(elements), source=source)
    if not elements:
        return None
    policy, findings = read_policy(elements[0], source=source)
    raise_first(findings, source=source)
    return policy
