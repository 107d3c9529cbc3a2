# SPDX-License-Identifier: Apache-2.0
"""Read the host's policy from its file.

Imports errors, lxml (types).
"""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import PolicyRefused, PolicyValueError
from kvmi_libvirt.policy import rules
from kvmi_libvirt.policy.document import MAX_BYTES, line_of, parse
from kvmi_libvirt.policy.facts import plain_id
from kvmi_libvirt.policy.findings import Finding, Severity, raise_first
from kvmi_libvirt.policy.limits import (
    Assignment,
    Ceiling,
    HostPolicy,
    Match,
    TcpPlace,
    VsockPlace,
)
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.policy.profile import Profiles
from kvmi_libvirt.policy.reading import base_of, child, read_content, weighed
from kvmi_libvirt.policy.resolve import cuts, refusals
from kvmi_libvirt.policy.shape import shape_findings, split, tag_of
from kvmi_libvirt.policy.trusted import ROOT, read_trusted
from kvmi_libvirt.quoting import quoted

if TYPE_CHECKING:
    from collections.abc import Callable

    from lxml import etree

    from kvmi_libvirt.policy.reading import Profile

__all__ = [
    "HOST_POLICY_PATH",
    "HostPolicy",
    "load_host_policy",
    "parse_host_policy",
    "read_host_policy",
]

HOST_POLICY_PATH: Final = Path("/etc/kvmi-libvirt/host-policy.xml")
ELEMENT: Final = "host-policy"


def load_host_policy(
    path: Path = HOST_POLICY_PATH,
    *,
    owner: int = ROOT,
    profiles: Callable[[str], Profile] | None = None,
) -> HostPolicy:
    """Return what this host allows: what the file says, or the defaults without one.

    Raises
        PolicyError  there is a host policy that is wrong, that others than root could
                     have written, or that cannot be seen: its limits are not known,
                     so nothing may be allowed. .source is *path*.
    """
    data = read_trusted(path, limit=MAX_BYTES, owner=owner)
    if data is None:
        return HostPolicy()
    try:
        return parse_host_policy(data, source=str(path), profiles=profiles)
    except PolicyValueError as error:
        raise PolicyRefused(error.message, source=error.source, line=error.line) from error


def parse_host_policy(
    data: bytes, *, source: str, profiles: Callable[[str], Profile] | None = None
) -> HostPolicy:
    """Return the host's policy in *data*.

    Raises
        PolicyError  it is none, or something in it is wrong.
    """
    policy, findings = read_host_policy(
        parse(data, source=source), source=source, profiles=profiles
    )
    raise_first(findings, source=source)
    assert policy is not None  # else there was an error
    return policy


def read_host_policy(
    root: etree._Element, *, source: str, profiles: Callable[[str], Profile] | None = None
) -> tuple[HostPolicy | None, list[Finding]]:
    """Return the host's policy of a document's *root*, and everything found in it.

    Returns
        None for the policy if and only if a finding is an error.
    """
    if split(root) != (NAMESPACE, ELEMENT):
        return None, [Finding(message=_root_message(root), line=line_of(root))]
    findings = shape_findings(root)
    if findings:
        return None, findings
    known = profiles or Profiles()
    kernel, sockets = child(root, "kernel"), child(root, "sockets")
    places = HostPolicy() if sockets is None else _places(sockets, findings)
    ceiling = _ceiling(root, findings, known, source=source)
    assignments = []
    for element in root.iterchildren(f"{{{NAMESPACE}}}assign"):
        found: list[Finding] = []
        policy = read_content(element, found, known, source=source)
        findings += found
        selectors = element.iterchildren(f"{{{NAMESPACE}}}match")
        if policy is not None:
            matches = tuple(map(_match, selectors))
            assignments.append(Assignment(matches=matches, policy=policy))
    policy_of_host = HostPolicy(
        unix=places.unix,
        vsock=places.vsock,
        tcp=places.tcp,
        ceiling=ceiling,
        assignments=tuple(assignments),
        kernel_abi=None if kernel is None else kernel.get("abi"),
        path=source,
    )
    findings += _own_excess(policy_of_host)
    if any(finding.severity is Severity.ERROR for finding in findings):
        return None, findings
    return policy_of_host, findings


def _root_message(root: etree._Element) -> str:
    namespace, name = split(root)
    if name == ELEMENT and namespace is None:
        return f'<{ELEMENT}> has no namespace; write <{ELEMENT} xmlns="{NAMESPACE}">'
    return f'root element is {tag_of(root)}; expected <{ELEMENT} xmlns="{NAMESPACE}">'


def _places(sockets: etree._Element, findings: list[Finding]) -> HostPolicy:
    unix, vsock, tcp = [], [], []
    for place in sockets:
        kind = split(place)[1]
        port = None if place.get("port") is None else int(place.attrib["port"])
        if kind == "unix":
            pattern = str(place.attrib["path"])
            problem = _pattern_problem(pattern)
            if problem is not None:
                text = f"path={quoted(pattern)} {problem}"
                findings.append(Finding(message=text, line=line_of(place), error=PolicyValueError))
            unix.append(pattern)
        elif kind == "vsock":
            cid = None if place.get("cid") is None else int(place.attrib["cid"])
            vsock.append(VsockPlace(cid=cid, port=port))
        else:
            tcp.append(TcpPlace(host=str(place.attrib["host"]), port=port))
    return HostPolicy(unix=tuple(unix), vsock=tuple(vsock), tcp=tuple(tcp))


def _pattern_problem(pattern: str) -> str | None:
    if ".." in pattern.split("/"):
        return 'climbs with ".."; write the path it leads to'
    normal = posixpath.normpath(pattern).replace("//", "/", 1)
    if normal != pattern:
        return f"is not normalised; write path={quoted(normal)}"
    if "**" in pattern.removesuffix("/**"):
        return 'has ** elsewhere than as its last part; write it as in "/run/kvmi/**"'
    return None


def _ceiling(
    root: etree._Element,
    findings: list[Finding],
    profiles: Callable[[str], Profile],
    *,
    source: str,
) -> Ceiling | None:
    element = child(root, "ceiling")
    if element is None:
        return None
    base = base_of(element, findings, profiles)
    return Ceiling(
        commands=weighed(element, rules.COMMANDS, base, findings, source=source),
        events=weighed(element, rules.EVENTS, base, findings, source=source),
        trim=element.get("excess") == "trim",
        line=line_of(element),
    )


def _match(element: etree._Element) -> Match:
    spec = element.get("nova-extra-spec")
    project, vmid = element.get("nova-project"), element.get("proxmox-vmid")
    key, _, value = (spec or "").partition("=")
    return Match(
        uuid=element.get("uuid"),
        name=element.get("name"),
        nova_flavor=element.get("nova-flavor"),
        nova_flavor_id=element.get("nova-flavor-id"),
        nova_extra_spec=None if spec is None else (key, value),
        nova_project=None if project is None else plain_id(project),
        proxmox_vmid=None if vmid is None else int(vmid),
    )


def _own_excess(host: HostPolicy) -> list[Finding]:
    # An assignment that its own host refuses would stop every VM it fits.
    found = []
    for assignment in host.assignments:
        found += [
            Finding(message=finding.message, line=finding.line, error=PolicyValueError)
            for finding in refusals(assignment.policy, host)
        ]
        found += cuts(assignment.policy, host)
    return found
