# SPDX-License-Identifier: Apache-2.0
"""Everything we ask libvirt. The only module that imports it, and only when called.

Never used from the hook: libvirt waits for the hook with the domain locked.
"""

from __future__ import annotations

import contextlib
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kvmi_libvirt.errors import ExitCode, KvmiLibvirtError, TargetNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_URI: Final = "qemu:///system"


class LibvirtError(KvmiLibvirtError):
    """libvirt is not there, or refused."""

    exit_code = ExitCode.UNSUPPORTED


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningDomain:
    """A domain that runs: its name and uuid, and its live XML."""

    name: str
    uuid: str
    xml: bytes


@contextlib.contextmanager
def _connection(uri: str) -> Iterator[Any]:  # libvirt has no type information
    try:
        import libvirt
    except ImportError as error:
        raise LibvirtError(
            "python3-libvirt is not installed: apt-get install python3-libvirt, "
            "or pip install 'kvmi-libvirt[libvirt]'"
        ) from error
    # libvirt prints every error to stderr by itself unless told otherwise.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise LibvirtError(f"cannot connect to libvirt at {uri}: {error}") from error
    try:
        yield connection
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            connection.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainXml:
    """A domain, running or not, with its XML."""

    name: str
    uuid: str
    xml: bytes
    is_active: bool


def _lookup(connection: Any, domain: str, uri: str) -> Any:
    import libvirt

    lookups = [connection.lookupByName, connection.lookupByUUIDString]
    if domain.isdecimal() and domain.isascii():
        lookups.insert(0, lambda text: connection.lookupByID(int(text)))
    for lookup in lookups:
        with contextlib.suppress(libvirt.libvirtError, OverflowError, ValueError):
            return lookup(domain)
    raise TargetNotFound(f"no domain '{domain}' at {uri}")


def running_domain(domain: str, *, uri: str = DEFAULT_URI) -> RunningDomain:
    """Return the running domain called *domain*: its name, uuid or id.

    Raises
        TargetNotFound  no such domain, or it does not run
        LibvirtError    libvirt is not there
    """
    found = domain_xml(domain, uri=uri)
    if not found.is_active:
        raise TargetNotFound(f"domain '{found.name}' does not run")
    return RunningDomain(name=found.name, uuid=found.uuid, xml=found.xml)


def domain_xml(domain: str, *, uri: str = DEFAULT_URI, of_config: bool = False) -> DomainXml:
    """Return the domain called *domain*, its name, uuid or id, whether it runs or not.

    Parameters
        of_config  the XML of the next start, also while it runs
    Raises
        TargetNotFound  no such domain
        LibvirtError    libvirt is not there, or refused
    """
    with _connection(uri) as connection:
        import libvirt

        found = _lookup(connection, domain, uri)
        try:
            flags = libvirt.VIR_DOMAIN_XML_INACTIVE if of_config else 0
            return DomainXml(
                name=found.name(),
                uuid=found.UUIDString(),
                xml=found.XMLDesc(flags).encode(),
                is_active=bool(found.isActive()),
            )
        except libvirt.libvirtError as error:
            raise LibvirtError(f"domain '{domain}': {error}") from error


def all_domains(*, uri: str = DEFAULT_URI) -> list[DomainXml]:
    """Return every domain with the XML that is in force now; those that vanish are left out.

    Raises
        LibvirtError  libvirt is not there, or refused
    """
    with _connection(uri) as connection:
        import libvirt

        found = []
        try:
            for domain in connection.listAllDomains(0):
                with contextlib.suppress(libvirt.libvirtError):
                    found.append(
                        DomainXml(
                            name=domain.name(),
                            uuid=domain.UUIDString(),
                            xml=domain.XMLDesc(0).encode(),
                            is_active=bool(domain.isActive()),
                        )
                    )
        except libvirt.libvirtError as error:
            raise LibvirtError(f"domains at {uri}: {error}") from error
        return found


def set_metadata(
    domain: str,
    element: str | None,
    *,
    namespace: str,
    prefix: str,
    uri: str = DEFAULT_URI,
    live: bool = False,
    config: bool = False,
) -> DomainXml:
    """Put *element* into the domain's metadata, or with None take ours out of it.

    Parameters
        element       without namespace, into which libvirt puts it
        live, config  which definition; with neither the one in force now
    Returns
        the domain as it was before
    Raises
        TargetNotFound  no such domain
        LibvirtError    libvirt is not there, or refused; nothing was changed
    """
    with _connection(uri) as connection:
        import libvirt

        found = _lookup(connection, domain, uri)
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE * live | libvirt.VIR_DOMAIN_AFFECT_CONFIG * config
        try:
            before = DomainXml(
                name=found.name(),
                uuid=found.UUIDString(),
                xml=found.XMLDesc(0).encode(),
                is_active=bool(found.isActive()),
            )
            kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
            found.setMetadata(kind, element, prefix, namespace, flags)
        except libvirt.libvirtError as error:
            raise LibvirtError(f"domain '{domain}': {error}") from error
        return before


def version(*, uri: str = DEFAULT_URI) -> str:
    """Return libvirt's version there, as in "9.0.0"; a daemon that starts is waited for.

    Raises
        LibvirtError  libvirt is not there
    """
    with _connection(uri) as connection:
        import libvirt

        try:
            number = int(connection.getLibVersion())
        except libvirt.libvirtError as error:
            raise LibvirtError(f"libvirt at {uri}: {error}") from error
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def is_local(uri: str) -> bool:
    """Say whether the domains at *uri* are QEMU processes of this host."""
    parts = urllib.parse.urlsplit(uri)
    return parts.scheme.partition("+")[0] == "qemu" and not parts.netloc
