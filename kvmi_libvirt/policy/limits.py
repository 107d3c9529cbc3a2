# SPDX-License-Identifier: Apache-2.0
"""What this host allows at all, whatever a domain's XML asks for.

Imports errors.
"""

from __future__ import annotations

import ipaddress
import posixpath
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.policy.facts import plain_id
from kvmi_libvirt.policy.globs import matches, path_matches
from kvmi_libvirt.policy.model import UnixSource, VsockSource
from kvmi_libvirt.quoting import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.policy.facts import Identity
    from kvmi_libvirt.policy.model import Policy, Rights, Source, TcpSource

SOCKET_DIRECTORY: Final = "/run/kvmi"
_DEFAULT_PATH: Final = "/etc/kvmi-libvirt/host-policy.xml"


@dataclass(frozen=True, slots=True, kw_only=True)
class VsockPlace:
    """Vsock addresses at which a tool may listen; None is any."""

    cid: int | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpPlace:
    """TCP addresses at which a tool may listen; a port of None is any."""

    host: str
    port: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """What may ever be granted.

    Parameters
        trim  True: who asks for more gets less; False: is refused
        line  in the host's policy
    """

    commands: Rights
    events: Rights
    trim: bool = False
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Selectors that must all fit a domain; None selects nothing.

    Parameters
        name, nova_flavor  patterns with * and ?
        nova_extra_spec    key and value
        nova_project       as plain_id() spells it
    """

    uuid: str | None = None
    name: str | None = None
    nova_flavor: str | None = None
    nova_flavor_id: str | None = None
    nova_extra_spec: tuple[str, str] | None = None
    nova_project: str | None = None
    proxmox_vmid: int | None = None

    def fits(self, who: Identity) -> bool:
        """Say whether *who* is what every selector says; False without any selector."""
        answers = list(self._answers(who))
        return bool(answers) and all(answers)

    def _answers(self, who: Identity) -> Iterator[bool]:
        nova = who.nova
        if self.uuid is not None:
            yield plain_id(self.uuid) == plain_id(who.uuid)
        if self.name is not None:
            yield matches(self.name, who.name)
        if self.nova_flavor is not None:
            yield nova is not None and matches(self.nova_flavor, nova.flavor)
        if self.nova_flavor_id is not None:
            yield nova is not None and nova.flavor_id == self.nova_flavor_id
        if self.nova_extra_spec is not None:
            key, value = self.nova_extra_spec
            yield nova is not None and nova.extra_specs.get(key) == value
        if self.nova_project is not None:
            yield nova is not None and nova.project == self.nova_project
        if self.proxmox_vmid is not None:
            yield who.vmid == self.proxmox_vmid


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Introspection for every virtual machine that one of *matches* fits."""

    matches: tuple[Match, ...]
    policy: Policy

    def fits(self, who: Identity) -> bool:
        """Say whether it is for *who*."""
        return any(match.fits(who) for match in self.matches)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPolicy:
    """The host's limits; as built without arguments, the limits of a host without a policy.

    Parameters
        unix         patterns of paths at which a tool's socket may lie
        ceiling      None for no limit
        assignments  the first that fits counts
        kernel_abi   the KVMI revision of the kernel, None: find out
        path         the file it is from, None for none
    """

    unix: tuple[str, ...] = (f"{SOCKET_DIRECTORY}/**",)
    vsock: tuple[VsockPlace, ...] = (VsockPlace(),)
    tcp: tuple[TcpPlace, ...] = ()
    ceiling: Ceiling | None = None
    assignments: tuple[Assignment, ...] = ()
    kernel_abi: str | None = None
    path: str | None = None

    def assignment(self, who: Identity) -> Assignment | None:
        """Return the first assignment that fits *who*, or None."""
        return next((found for found in self.assignments if found.fits(who)), None)

    def refusal(self, source: Source) -> str | None:
        """Return why *source* is not allowed here and what to write, or None when it is."""
        if isinstance(source, UnixSource):
            return self._unix_refusal(source)
        if isinstance(source, VsockSource):
            return self._vsock_refusal(source)
        return self._tcp_refusal(source)

    def _unix_refusal(self, source: UnixSource) -> str | None:
        if any(path_matches(pattern, source.path) for pattern in self.unix):
            return None
        told = f"path={quoted(source.path)} is not allowed on this host"
        if not self.unix:
            place = f"<unix path={quoted(source.path)}/>"
            return f"{told}, no unix socket is; {self._elsewhere(place)}"
        first = self.unix[0]
        if first.endswith("/**") and "*" not in first[:-2]:
            instead = f"{first[:-2]}{posixpath.basename(source.path)}"
        else:
            instead = first
        places = " or ".join(map(_place, self.unix[:5]))
        return f"{told}, only sockets {places}; write path={quoted(instead)}"

    def _vsock_refusal(self, source: VsockSource) -> str | None:
        for place in self.vsock:
            if place.cid in (None, source.cid) and place.port in (None, source.port):
                return None
        what = f'cid="{source.cid}" port="{source.port}"'
        return f"{what} is not allowed on this host; {self._elsewhere(f'<vsock {what}/>')}"

    def _tcp_refusal(self, source: TcpSource) -> str | None:
        host = _plain_host(source.host)
        for place in self.tcp:
            if _plain_host(place.host) == host and place.port in (None, source.port):
                return None
        what = f'host={quoted(source.host)} port="{source.port}"'
        return f"{what} is not allowed on this host; {self._elsewhere(f'<tcp {what}/>')}"

    def _elsewhere(self, place: str) -> str:
        return f"it takes {place} in <sockets> of {self.path or _DEFAULT_PATH}"


def _place(pattern: str) -> str:
    return f"below {pattern[:-2]}" if pattern.endswith("/**") else f"at {pattern}"


def _plain_host(host: str) -> str:
    try:
        return ipaddress.ip_address(host).compressed
    except ValueError:
        return host.lower().rstrip(".")
