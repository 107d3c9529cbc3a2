# SPDX-License-Identifier: Apache-2.0
"""What else is read from a domain's XML: what it is, and who it belongs to.

Of OpenStack's metadata only what its operator controls is read: flavor, extra specs
and project. Names and image properties are the tenant's. Imports errors, lxml (types).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import PolicyValueError
from kvmi_libvirt.policy.document import line_of, text_of
from kvmi_libvirt.policy.shape import split
from kvmi_libvirt.quoting import quoted, shortened

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lxml import etree

_NOVA: Final = tuple(f"http://openstack.org/xmlns/libvirt/nova/{v}" for v in ("1.1", "1.0"))
MAX_EXTRA_SPECS: Final = 1000
MAX_NAME_LEN: Final = 1024
"""Characters of what patterns are held against: libvirt and nova allow 255 at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NovaFacts:
    """What nova says of an instance's flavor and owner.

    Parameters
        flavor       its name
        flavor_id    None before OpenStack 2025.2
        extra_specs  empty before OpenStack 2025.2
        project      its id in lower case without dashes, "" when there is none
    """

    flavor: str
    flavor_id: str | None = None
    extra_specs: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    project: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a virtual machine is: all that an assignment of the host can select it by.

    Parameters
        name  "" when it has none
        uuid  in any spelling, "" when it has none
        nova  what OpenStack says of it, None for a machine of anybody else
        vmid  of a Proxmox VE machine, None for any other
    """

    name: str = ""
    uuid: str = ""
    nova: NovaFacts | None = None
    vmid: int | None = None


def name(domain: etree._Element, source: str) -> str:
    """Return the domain's name, "" when it has none."""
    element = domain.find("name")
    return "" if element is None else _bounded(element, text_of(element), source)


def _bounded(element: etree._Element, text: str, source: str) -> str:
    if len(text) > MAX_NAME_LEN:
        tag = shortened(split(element)[1])
        message = f"the name in <{tag}> has {len(text)} characters; {MAX_NAME_LEN} is the most"
        raise PolicyValueError(message, source=source, line=line_of(element))
    return text


def nova_facts(domain: etree._Element, source: str) -> NovaFacts | None:
    """Return what nova wrote into *domain*'s first metadata, or None if it did not."""
    metadata = domain.find("metadata")
    if metadata is None:
        return None
    for namespace in _NOVA:
        instance = metadata.find(f"{{{namespace}}}instance")
        if instance is not None:
            return _nova(instance, f"{{{namespace}}}", source)
    return None


def _nova(instance: etree._Element, prefix: str, source: str) -> NovaFacts:
    flavor = instance.find(f"{prefix}flavor")
    project = instance.find(f"{prefix}owner/{prefix}project")
    specs: dict[str, str] = {}
    if flavor is not None:
        for spec in flavor.findall(f"{prefix}extraSpecs/{prefix}extraSpec")[:MAX_EXTRA_SPECS]:
            specs.setdefault(spec.get("name", ""), text_of(spec))
    return NovaFacts(
        flavor="" if flavor is None else _bounded(flavor, flavor.get("name", ""), source),
        flavor_id=None if flavor is None else flavor.get("id"),
        extra_specs=MappingProxyType(specs),
        project="" if project is None else plain_id(project.get("uuid", "")),
    )


def plain_id(text: str) -> str:
    """Return an OpenStack id in the one spelling in which ids are compared."""
    return text.replace("-", "").lower()


def uuid(domain: etree._Element, source: str) -> str:
    """Return the domain's UUID in lower case with dashes, "" when it has none."""
    element = domain.find("uuid")
    if element is None:
        return ""
    digits = re.sub(r"[-\s]", "", text_of(element)).lower()
    if not re.fullmatch(r"[0-9a-f]{32}", digits):
        text = f"<uuid> is {quoted(text_of(element))}, which is no UUID"
        raise PolicyValueError(text, source=source, line=line_of(element))
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def vcpus(domain: etree._Element, source: str) -> int:
    """Return the number of vCPUs that are online at start."""
    element = domain.find("vcpu")
    if element is None:
        return 1  # libvirt's default
    return _number(element, element.get("current") or text_of(element), source)


_UNITS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "b": 1,
        "byte": 1,
        "bytes": 1,
        **{
            f"{letter}{suffix}": base**power
            for power, letter in enumerate("kmgtpe", start=1)
            for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
        },
    }
)
"""libvirt's units of memory, which it reads in any case."""


def memory_bytes(domain: etree._Element, source: str) -> int:
    """Return the guest's whole memory, 0 when the document does not say."""
    element = domain.find("memory")
    if element is None:
        return 0
    unit = element.get("unit", "KiB")
    factor = _UNITS.get(unit.lower())
    if factor is None:
        text = f"unit={quoted(unit)} on <memory> is no unit of memory"
        raise PolicyValueError(text, source=source, line=line_of(element))
    return factor * _number(element, text_of(element), source)


def _number(element: etree._Element, text: str, source: str) -> int:
    stripped = text.strip()
    if not re.fullmatch(r"[0-9]{1,19}", stripped):
        message = f"<{shortened(split(element)[1])}> is {quoted(text)}, which is no number"
        raise PolicyValueError(message, source=source, line=line_of(element))
    return int(stripped)


def machine(domain: etree._Element) -> str:
    """Return the machine type, "" when the document does not say."""
    element = domain.find("os/type")
    return "" if element is None else element.get("machine", "")


def emulator(domain: etree._Element) -> str:
    """Return the program that runs a domain as KVM's guest; "" for any other, or unknown."""
    if domain.get("type") != "kvm":
        return ""
    element = domain.find("devices/emulator")
    return "" if element is None else text_of(element).strip()
