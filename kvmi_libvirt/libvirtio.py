# SPDX-License-Identifier: Apache-2.0
"""Everything we ask libvirt. The only module that imports it, and only when called.

Never used from the hook: libvirt waits for the hook with the domain locked.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import threading
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kvmi_libvirt.errors import ExitCode, KvmiLibvirtError, TargetNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

DEFAULT_URI: Final = "qemu:///system"

_NEXT: Final = "; next: kvmi-libvirt doctor "  # with this the hook's refusals end, and a name
_HOOK_WRAPPING: Final = re.compile(
    r"Hook script execution failed: internal error: Child process \(.*?\) "
    r"unexpected exit status \d+: "
)


class LibvirtError(KvmiLibvirtError):
    """libvirt is not there, or refused."""

    exit_code = ExitCode.UNSUPPORTED


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningDomain:
    """A domain that runs: its name and uuid, and its live XML."""

    name: str
    uuid: str
    xml: bytes


def _library() -> Any:  # libvirt has no type information
    try:
        import libvirt
    except ImportError as error:
        raise LibvirtError(
            "python3-libvirt is not installed: apt-get install python3-libvirt, "
            "or pip install 'kvmi-libvirt[libvirt]'"
        ) from error
    # libvirt prints every error to stderr by itself unless told otherwise.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    return libvirt


def _virsh(uri: str, command: str) -> str:
    where = "" if uri == DEFAULT_URI else f"-c {shlex.quote(uri)} "
    return f"virsh {where}{command}"


@contextlib.contextmanager
def _connection(uri: str) -> Iterator[Any]:
    libvirt = _library()
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        failure = LibvirtError(f"cannot connect to libvirt at {uri}: {error}")
        next_command = "kvmi-libvirt doctor" if is_local(uri) else _virsh(uri, "version")
        raise failure.then(next_command) from error
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
    raise TargetNotFound(f"no domain '{domain}' at {uri}").then(_virsh(uri, "list --all"))


def running_domain(domain: str, *, uri: str = DEFAULT_URI) -> RunningDomain:
    """Return the running domain called *domain*: its name, uuid or id.

    Raises
        TargetNotFound  no such domain, or it does not run
        LibvirtError    libvirt is not there
    """
    found = domain_xml(domain, uri=uri)
    if not found.is_active:
        error = TargetNotFound(f"domain '{found.name}' does not run")
        raise error.then(_virsh(uri, f"start {shlex.quote(found.name)}"))
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


class NewDomain:
    """A domain that is to be started; every call but ``start`` is for afterwards."""

    def __init__(self, domain: Any, name: str) -> None:
        """Ask libvirt nothing yet."""
        self._domain = domain
        self.name = name
        with _said_by_libvirt(f"domain '{name}'"):
            self.uuid: str = domain.UUIDString()
            self.is_saved = bool(domain.hasManagedSaveImage(0))
            """It will go on where a managed save left it."""

    def xml(self) -> bytes:
        """Return its XML: the one that is in force, or before the start that of the next one.

        Raises
            LibvirtError  libvirt refused, or is not there any more
        """
        with _said_by_libvirt(f"domain '{self.name}'"):
            text: str = self._domain.XMLDesc(0)
        return text.encode()

    def start(self) -> None:
        """Start it with its vCPUs paused. Raises LibvirtError: then it does not run."""
        libvirt = _library()
        with _said_by_libvirt(f"domain '{self.name}' does not start", ExitCode.FAILED):
            self._domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)

    def resume(self) -> None:
        """Let its vCPUs run. Raises LibvirtError."""
        with _said_by_libvirt(f"domain '{self.name}' cannot be resumed", ExitCode.FAILED):
            self._domain.resume()

    def undo(self) -> str:
        """Take the start back, whose vCPUs have not run; return what was done, in words.

        What a managed save had kept is kept again.

        Raises
            LibvirtError  it is there still, or libvirt does not tell
        """
        libvirt = _library()
        if self.is_saved:
            with _said_by_libvirt(f"domain '{self.name}' cannot be saved again", ExitCode.FAILED):
                self._domain.managedSave(libvirt.VIR_DOMAIN_SAVE_RUNNING)
            return "its managed save is there again as it was"
        with _said_by_libvirt(f"domain '{self.name}' cannot be destroyed", ExitCode.FAILED):
            self._domain.destroy()
        return "it was destroyed"


@contextlib.contextmanager
def _said_by_libvirt(what: str, exit_code: ExitCode = ExitCode.UNSUPPORTED) -> Iterator[None]:
    libvirt = _library()
    try:
        yield
    except libvirt.libvirtError as error:
        failure = LibvirtError(f"{what}: {_said_by_hook(str(error))}")
        failure.exit_code = exit_code
        raise failure from error


def _said_by_hook(text: str) -> str:
    # What our hook says is wrapped in how libvirt called it: a line of environment and path.
    text = " ".join(text.split())
    return _HOOK_WRAPPING.sub("", text) if _NEXT in text else text


@contextlib.contextmanager
def new_domain(domain: str, *, uri: str = DEFAULT_URI) -> Iterator[NewDomain]:
    """Have *domain*, its name or uuid, which must not run, to start it in the block.

    Raises
        TargetNotFound  no such domain, or it is there already
        LibvirtError    libvirt is not there
    """
    with _connection(uri) as connection:
        libvirt = _library()
        found = _lookup(connection, domain, uri)
        with _said_by_libvirt(f"domain '{domain}'"):
            name = found.name()
            state = found.state()[0] if found.isActive() else libvirt.VIR_DOMAIN_SHUTOFF
        if state == libvirt.VIR_DOMAIN_CRASHED:
            text = f"domain '{name}' has crashed and its QEMU is there still; destroy it first"
            raise TargetNotFound(text)
        if state == libvirt.VIR_DOMAIN_PAUSED:
            text = f"domain '{name}' is there already, paused; 'virsh resume' lets it run"
            raise TargetNotFound(text)
        if state != libvirt.VIR_DOMAIN_SHUTOFF:
            error = TargetNotFound(f"domain '{name}' runs already")
            raise error.then(f"kvmi-libvirt hook {shlex.quote(name)}")
        yield NewDomain(found, name)


def is_local(uri: str) -> bool:
    """Say whether the domains at *uri* are QEMU processes of this host."""
    parts = urllib.parse.urlsplit(uri)
    return parts.scheme.partition("+")[0] == "qemu" and not parts.netloc


class Events:
    """A connection that tells when domains change, from a thread of its own.

    libvirt's own event loop runs in that thread: libvirtaio would have libvirt touch
    the asyncio loop from whichever thread makes a call, and no call may be made in the
    loop's own, since every call can block.

    Parameters
        uri   of a local libvirt
        call  called from that thread with "changed", "resumed" or "stopped" and a uuid,
              or with "lost" and "": the connection has ended, make a new one
    """

    _is_loop_running = False

    def __init__(self, uri: str, call: Callable[[str, str], None]) -> None:
        """Connect and register. Blocks. Raises LibvirtError."""
        libvirt = _library()
        self._call = call
        self._uri = uri
        self._start_loop(libvirt)
        try:
            self._connection = libvirt.open(uri)
            self._connection.registerCloseCallback(lambda *_: call("lost", ""), None)
            register = self._connection.domainEventRegisterAny
            register(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle, None)
            register(None, libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, self._metadata, None)
        except libvirt.libvirtError as error:
            raise LibvirtError(f"cannot connect to libvirt at {uri}: {error}") from error

    @classmethod
    def _start_loop(cls, libvirt: Any) -> None:
        # One for the whole process, and for good: libvirt can have only one.
        if cls._is_loop_running:
            return
        libvirt.virEventRegisterDefaultImpl()

        def run() -> None:
            while True:
                try:
                    libvirt.virEventRunDefaultImpl()
                except libvirt.libvirtError as error:
                    logger.warning("libvirt's event loop: %s", error)

        threading.Thread(target=run, name="libvirt-events", daemon=True).start()
        cls._is_loop_running = True

    def _lifecycle(
        self, _connection: Any, domain: Any, event: int, _detail: int, _data: object
    ) -> None:
        libvirt = _library()
        kinds = {
            libvirt.VIR_DOMAIN_EVENT_STARTED: "changed",
            libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
            libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
            libvirt.VIR_DOMAIN_EVENT_CRASHED: "stopped",
        }
        if event in kinds:
            self._call(kinds[event], domain.UUIDString())

    def _metadata(
        self, _connection: Any, domain: Any, _kind: int, _namespace: str | None, _data: object
    ) -> None:
        self._call("changed", domain.UUIDString())

    def running(self) -> list[RunningDomain]:
        """Return all running domains. Blocks. Raises LibvirtError."""
        libvirt = _library()
        found = []
        try:
            for domain in self._connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                with contextlib.suppress(libvirt.libvirtError):  # ended meanwhile
                    found.append(_running(domain))
        except libvirt.libvirtError as error:
            raise LibvirtError(f"libvirt at {self._uri}: {error}") from error
        return found

    def get(self, uuid: str) -> RunningDomain | None:
        """Return the running domain *uuid*, or None. Blocks. Raises LibvirtError."""
        libvirt = _library()
        try:
            domain = self._connection.lookupByUUIDString(uuid)
            return _running(domain) if domain.isActive() else None
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise LibvirtError(f"libvirt at {self._uri}: {error}") from error

    def close(self) -> None:
        """End the connection; nothing is called any more."""
        libvirt = _library()
        self._call = lambda _event, _uuid: None
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.unregisterCloseCallback()
        with contextlib.suppress(libvirt.libvirtError):
            self._connection.close()


def _running(domain: Any) -> RunningDomain:
    return RunningDomain(
        name=domain.name(), uuid=domain.UUIDString(), xml=domain.XMLDesc(0).encode()
    )


def is_remote(uri: str) -> bool:
    """Say whether the domains at *uri* are QEMU processes of another host."""
    parts = urllib.parse.urlsplit(uri)
    return parts.scheme.partition("+")[0] == "qemu" and bool(parts.netloc)
