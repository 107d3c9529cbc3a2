# SPDX-License-Identifier: Apache-2.0
"""Whether a domain demands introspection, told even where its policy cannot be read.

A wrong element must not make a VM start unwatched that was to be watched, nor keep one
from starting that only would have liked it. Imports errors, ``element``, ``model``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from xml.parsers import expat

from kvmi_libvirt.errors import KvmiLibvirtError, PolicySyntaxError
from kvmi_libvirt.policy.demand import is_demanded
from kvmi_libvirt.policy.document import MAX_BYTES
from kvmi_libvirt.policy.element import parse_domain
from kvmi_libvirt.policy.model import NAMESPACE_STEM, Mode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvmi_libvirt.policy.limits import HostPolicy


class Facts(NamedTuple):
    """What can be said of a domain even when its element is invalid."""

    uuid: str
    modes: tuple[str | None, ...]
    """The mode attribute of each element of ours, in any version of the namespace.

    None where it is left out.
    """


def scan(xml: bytes) -> Facts:
    """Return what matters of the domain XML, without judging it.

    Raises
        PolicySyntaxError  the bytes are no well-formed XML
    """
    modes: list[str | None] = []
    path: list[str] = []
    uuid: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        path.append(tag)
        namespace, _, local = tag.rpartition(" ")
        if (
            path[:-1] == ["domain", "metadata"]
            and local == "introspection"
            and namespace.startswith(NAMESPACE_STEM)
        ):
            modes.append(attributes.get("mode"))

    def end(_tag: str) -> None:
        path.pop()

    def text(data: str) -> None:
        if path == ["domain", "uuid"]:
            uuid.append(data)

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    try:
        parser.Parse(xml, True)
    except (expat.ExpatError, ValueError) as error:
        raise PolicySyntaxError(f"the domain XML is not well-formed: {error}") from error
    return Facts("".join(uuid).strip(), tuple(modes))


def is_required(xml: bytes) -> bool:
    """Say whether the domain demands introspection, even if its element is invalid.

    A mode that is neither absent nor "optional" counts as a demand: whoever wrote
    one did not mean the default.
    """
    try:
        modes = scan(xml).modes
    except PolicySyntaxError:
        return b'mode="required"' in xml
    return any(mode not in (None, Mode.OPTIONAL.value) for mode in modes[:1])


def demands(xml: bytes, host: Callable[[], HostPolicy], host_policy: Path) -> bool:
    """Say whether introspection is demanded of the domain, by its host or by itself.

    Where the host assigns a policy, its mode counts and not the element's. A host policy
    that cannot be used demands what its text says it does.

    Parameters
        host         reads the host's policy; may fail
        host_policy  where that one's text is
    """
    try:
        assignments = host().assignments
    except (KvmiLibvirtError, OSError):
        return _text_demands(xml, host_policy) or is_required(xml)
    if assignments:
        try:
            domain = parse_domain(xml, source="", with_policy=False)
        except KvmiLibvirtError:
            # Whom it is for cannot be told. A demand that may be for this one counts.
            modes = {assigned.policy.mode for assigned in assignments}
            return Mode.REQUIRED in modes or is_required(xml)
        found = next((assigned for assigned in assignments if assigned.fits(domain)), None)
        if found is not None:
            return found.policy.mode is Mode.REQUIRED
    return is_required(xml)


def _text_demands(xml: bytes, host_policy: Path) -> bool:
    try:
        domain = parse_domain(xml, source="", with_policy=False)
        with open(host_policy, "rb") as file:
            return is_demanded(file.read(MAX_BYTES), domain)
    except (KvmiLibvirtError, OSError):
        return False
