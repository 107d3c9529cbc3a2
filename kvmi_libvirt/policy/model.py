# SPDX-License-Identifier: Apache-2.0
"""The policy as values, after every rule has been weighed.

Two documents that mean the same give equal policies: where a value was written
(``line``, ``why``) takes no part in comparison. Pure; imports abi and errors only.
"""

from __future__ import annotations

import enum
import posixpath
import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

from kvmi_libvirt.abi.revisions import ALWAYS_ALLOWED
from kvmi_libvirt.errors import PolicyValueError
from kvmi_libvirt.quoting import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

NAMESPACE: Final = "urn:kvmi-libvirt:introspection:1.0"
"""Frozen: documents are recognised by it, never by a prefix."""

NAMESPACE_STEM: Final = "urn:kvmi-libvirt:introspection"
"""What every version of the namespace, past or future, begins with."""

DEFAULT_HANDSHAKE_TIMEOUT_S: Final = 3.0
DEFAULT_UNHOOK_TIMEOUT_S: Final = 60.0
DEFAULT_RECONNECT_S: Final = 10.0
SUN_PATH_MAX_BYTES: Final = 107
"""unix(7): sun_path holds 108 bytes, the last one NUL."""

VMADDR_CID_HOST: Final = 2
"""vsock(7): the host itself. 0 is the hypervisor, which no tool runs in."""

VMADDR_CID_ANY: Final = 0xFFFFFFFF
"""vsock(7): for binding only."""

HOST_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}|[0-9A-Fa-f:][0-9A-Fa-f:.]{1,44}")
"""A host name or IPv4 address, or an IPv6 address without brackets and zone."""

SECRET_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""A file name in one directory: no separator, no dot in front, so no other path."""


class Mode(enum.Enum):
    """What a VM start is worth without its introspection."""

    REQUIRED = "required"  # no hook, no VM
    OPTIONAL = "optional"  # the VM starts, the failure is reported


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixSource:
    """An introspection tool that listens on a unix socket.

    Parameters
        path  absolute and normalised, at most 107 bytes of UTF-8, printable
        line  where it was written, if anywhere
    Raises
        PolicyValueError  *path* is none of that.
    """

    path: str
    line: int | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse a path that no tool can listen on, or that has two spellings."""
        problem = _path_problem(self.path)
        if problem is not None:
            raise PolicyValueError(f"path={quoted(self.path)} {problem}", line=self.line)

    def describe(self) -> str:
        """Return the source as one word, for logs and ``status``."""
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VsockSource:
    """An introspection tool in another VM, or on the host, that listens on a vsock port.

    Parameters
        cid   context id of the tool's machine: 1 is this host's loopback, 2 the host,
              3 and more are VMs
        port  32 bits
        line  where it was written, if anywhere
    Raises
        PolicyValueError  no stream can be connected to that.
    """

    cid: int
    port: int
    line: int | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what is only good for binding."""
        if not 0 < self.cid < VMADDR_CID_ANY:
            text = f'cid="{self.cid}" is no machine a tool can run in; write that of its VM'
            raise PolicyValueError(text, line=self.line)
        if not 0 <= self.port < VMADDR_CID_ANY:
            text = f'port="{self.port}" is no vsock port; write one below {VMADDR_CID_ANY}'
            raise PolicyValueError(text, line=self.line)

    def describe(self) -> str:
        """Return the source as one word, for logs and ``status``."""
        return f"vsock:{self.cid}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpSource:
    """An introspection tool that listens on a TCP port. Nothing encrypts that stream.

    Parameters
        host  a name, or a numeric IPv4 or IPv6 address without brackets
        port  1 to 65535
        line  where it was written, if anywhere
    Raises
        PolicyValueError  neither.
    """

    host: str
    port: int
    line: int | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be a host or port."""
        if not HOST_PATTERN.fullmatch(self.host):
            text = f"host={quoted(self.host)} is neither a host name nor an address"
            raise PolicyValueError(text, line=self.line)
        if not 0 < self.port < 65536:
            text = f'port="{self.port}" is no TCP port; write one from 1 to 65535'
            raise PolicyValueError(text, line=self.line)

    def describe(self) -> str:
        """Return the source as one word, for logs and ``status``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


def _path_problem(path: str) -> str | None:
    if not path.startswith("/"):
        return 'is not absolute; write path="/run/kvmi/NAME.sock"'
    if not path.isprintable():
        return "has characters that cannot be printed; use a plain file name"
    if ".." in path.split("/"):
        return 'climbs with ".."; write the path it leads to'
    # posixpath keeps two leading slashes, which POSIX lets a system interpret.
    normal = posixpath.normpath(path).replace("//", "/", 1)
    if normal != path:
        return f"is not normalised; write path={quoted(normal)}"
    if path == "/":
        return 'is a directory; write path="/run/kvmi/NAME.sock"'
    length = len(path.encode("utf-8", "surrogatepass"))
    if length > SUN_PATH_MAX_BYTES:
        return (
            f"is {length} bytes long; a unix socket's path has at most {SUN_PATH_MAX_BYTES}, "
            "choose a shorter one"
        )
    return None


Source: TypeAlias = "UnixSource | VsockSource | TcpSource"
"""Where the tool is."""


def parse_source(text: str) -> Source:
    """Return the source that describes itself as *text*.

    Raises
        PolicyValueError  none does.
    """
    kind, _, rest = text.partition(":")
    try:
        if kind == "unix":
            return UnixSource(path=rest)
        where, _, port = rest.rpartition(":")
        if kind == "vsock":
            return VsockSource(cid=int(where), port=int(port))
        if kind == "tcp":
            return TcpSource(host=where.removeprefix("[").removesuffix("]"), port=int(port))
    except PolicyValueError:
        raise
    except ValueError:
        pass
    raise PolicyValueError(f"{quoted(text)} is no source")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why one command or event is allowed or not.

    Parameters
        rule    what decided, as an operator would name it
        source  file or document in which that stands, None when nowhere
        line    there, None when it is not known
    """

    rule: str
    source: str | None = None
    line: int | None = None

    def place(self) -> str:
        """Return "FILE:LINE", or what of it is known."""
        if self.line is None:
            return self.source or ""
        return f"{self.source or 'line '}{':' if self.source else ''}{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """Which commands, or which events, the tool may use.

    Parameters
        allowed     canonical names; the always allowed commands are never among
                    them, they need no right
        optional    those of *allowed* that a kernel may lack
        everything  nothing is denied at all, not even what has no name here
        cut         names that were asked for, and that the host's ceiling took away
        why         for each name, allowed or not, what decided; may be empty
    """

    allowed: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    everything: bool = False
    cut: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    why: Mapping[str, Reason] = field(
        default_factory=lambda: MappingProxyType({}), compare=False, repr=False
    )

    def __post_init__(self) -> None:
        """Refuse a contradiction, which only a bug of ours can make."""
        if not self.optional <= self.allowed:
            raise ValueError(f"optional but not allowed: {sorted(self.optional - self.allowed)}")
        if self.allowed & ALWAYS_ALLOWED:
            raise ValueError(f"needs no right: {sorted(self.allowed & ALWAYS_ALLOWED)}")

    @property
    def demanded(self) -> frozenset[str]:
        """Return the names that the kernel must know, or there is no plan."""
        return self.allowed - self.optional


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What one VM's introspection shall be.

    Parameters
        handshake_timeout_s  seconds for connecting and the whole handshake
        unhook_timeout_s     seconds a tool gets to undo its changes before the hook ends
        reconnect_s          seconds between attempts to reach a tool that went away;
                             None: it is not called again
        early                in force before the guest's first instruction
        secret               name of the secret the tool must know, None for none
        profile              its name, if one was the base; its rules are in the rights
        kernel_abi           the revision the host says its kernel has, None: find out
        line                 of the element it was read from, if any
        origin               file or document it was read from, if any
    """

    mode: Mode
    source: Source
    handshake_timeout_s: float = DEFAULT_HANDSHAKE_TIMEOUT_S
    unhook_timeout_s: float = DEFAULT_UNHOOK_TIMEOUT_S
    reconnect_s: float | None = None
    early: bool = False
    secret: str | None = None
    commands: Rights = Rights()
    events: Rights = Rights()
    profile: str | None = field(default=None, compare=False)
    kernel_abi: str | None = None
    line: int | None = field(default=None, compare=False, repr=False)
    origin: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse a secret that could name another file."""
        if self.secret is not None and not SECRET_PATTERN.fullmatch(self.secret):
            raise PolicyValueError(f"secret {quoted(self.secret)} is no plain name", line=self.line)
