# SPDX-License-Identifier: Apache-2.0
"""Every exception this package raises on purpose, and the exit codes.

::

    KvmiLibvirtError
      UsageError                           arguments that do not go together
      PolicyError (ValueError)             .source .line .message
        PolicySyntaxError                  not well-formed, too large, wrong encoding
        PolicySchemaError                  well-formed, but not of the schema's shape
        PolicyValueError                   right shape, impossible meaning
        PolicyRefused                      right policy, not allowed on this host
      PlanError                            the policy cannot be turned into ioctls
        UnsupportedByKernel                kernel without KVMI, or without a command
      TargetError                          .pid
        TargetNotFound (LookupError)
        TargetAmbiguous
        TargetChanged                      not the process it was a moment ago
        TargetUnsuitable                   cannot be traced or injected into at all
        TargetBusy                         nothing was touched, retrying is safe
        TargetGone (ProcessLookupError)
      TraceError (OSError)                 .call .tid, errno kept
        RestoreFailed                      registers could not be put back
      RemoteSyscallError (OSError)         .call, errno kept
        RemoteCallTimeout                  blocked beyond the deadline, abandoned
      HandshakeError
        HandshakeTimeout (TimeoutError)
        HandshakeRefused
        HandshakeProtocolError (ValueError)
      SessionError                         .applied .left
      StateError                           /run/kvmi-libvirt cannot be read or written
      EmulatorError
        EmulatorGone                       its supervisor is no longer there

"This domain has no introspection element" is not an error: it is ``None``.
Any module may import this one; it imports nothing of the package.
"""

from __future__ import annotations

import enum
from typing import NoReturn, TypeVar

_Error = TypeVar("_Error", bound="KvmiLibvirtError")


class ExitCode(enum.IntEnum):
    """What a verb, or the hook's helper, ends with."""

    OK = 0
    FAILED = 1
    USAGE = 2
    POLICY = 3
    UNSUPPORTED = 4
    TARGET = 5
    HANDSHAKE = 6
    HARM = 7


class KvmiLibvirtError(Exception):
    """Base of everything below; its text is one line an operator can act on."""

    exit_code = ExitCode.FAILED
    next_command: str | None = None
    """What an operator types next, where neither the text says it nor the kind of error."""

    def then(self: _Error, command: str) -> _Error:
        """Return this error with the command an operator types next."""
        self.next_command = command
        return self


class UsageError(KvmiLibvirtError):
    """Arguments of a verb that do not go together."""

    exit_code = ExitCode.USAGE


class PolicyError(KvmiLibvirtError, ValueError):
    """A policy that cannot be used.

    Parameters
        message  what is wrong and what to write instead, without the place
        source   file name, or a description such as "domain XML of web1"
        line     1-based line in *source*, or None when there is no line
    """

    exit_code = ExitCode.POLICY

    def __init__(self, message: str, *, source: str | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.source = source
        self.line = line

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message

    @property
    def place(self) -> str:
        """Return "SOURCE:LINE", or what of it is known."""
        place = [self.source] if self.source is not None else []
        if self.line is not None:
            place.append(str(self.line) if place else f"line {self.line}")
        return ":".join(place)

    def at(self, source: str) -> PolicyError:
        """Return this error with *source* filled in, if it has none yet."""
        if self.source is None:
            self.source = source
        return self


class PolicySyntaxError(PolicyError):
    """The bytes are not an acceptable XML document."""


class PolicySchemaError(PolicyError):
    """The document is not of the shape xml-schemas/ prescribes."""


class PolicyValueError(PolicyError):
    """The shape is right, but a value is impossible or contradicts another."""


class PolicyRefused(PolicyError):
    """The policy is well made, but this host does not allow it."""


class PlanError(KvmiLibvirtError):
    """The policy cannot be expressed as ioctls of the kernel at hand."""

    exit_code = ExitCode.UNSUPPORTED


class UnsupportedByKernel(PlanError):
    """The running kernel has no KVMI, or lacks something the policy demands."""


class TargetError(KvmiLibvirtError):
    """Something about the QEMU process stands in the way."""

    exit_code = ExitCode.TARGET

    def __init__(self, message: str, *, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class TargetNotFound(TargetError, LookupError):
    """There is no such VM, or it does not run."""


class TargetAmbiguous(TargetError):
    """More than one process or VM fd fits; none is chosen."""


class TargetChanged(TargetError):
    """The process is not the one that was identified."""


class TargetUnsuitable(TargetError):
    """This process can never be served; nothing was touched."""

    exit_code = ExitCode.UNSUPPORTED


class TargetBusy(TargetError):
    """The main thread was not found parked; nothing was touched, retrying is safe."""

    exit_code = ExitCode.FAILED


class TargetGone(TargetError, ProcessLookupError):
    """The process ended meanwhile; there is nothing left to undo."""


class TraceError(KvmiLibvirtError, OSError):
    """A ptrace(2) request failed. The state afterwards is in the message.

    Parameters
        errno    as the kernel said it
        message  what was attempted
        call     the request's name
        tid      the thread it was made on
    """

    def __init__(self, errno: int, message: str, *, call: str, tid: int) -> None:
        OSError.__init__(self, errno, message)
        self.call = call
        self.tid = tid

    def __str__(self) -> str:
        return f"{self.strerror} ({self.call} on thread {self.tid}: {errno_name(self.errno or 0)})"


class RestoreFailed(TraceError):
    """The thread's registers could not be put back: the VM may be harmed."""

    exit_code = ExitCode.HARM


class RemoteSyscallError(KvmiLibvirtError, OSError):
    """A system call made inside QEMU failed, with the kernel's errno.

    Parameters
        errno  as the kernel answered QEMU
        call   name of the call, for example "socketpair" or "KVM_INTROSPECTION_HOOK"
    """

    def __init__(self, errno: int, call: str, detail: str = "") -> None:
        OSError.__init__(self, errno, detail or call)
        self.call = call
        self.detail = detail

    def __str__(self) -> str:
        tail = f": {self.detail}" if self.detail else ""
        return f"{self.call} inside QEMU failed with {errno_name(self.errno or 0)}{tail}"


class RemoteCallTimeout(RemoteSyscallError):
    """The call blocked beyond the deadline and was abandoned; QEMU runs on."""


class HandshakeError(KvmiLibvirtError):
    """The introspection tool did not answer as it must."""

    exit_code = ExitCode.HANDSHAKE


class HandshakeTimeout(HandshakeError, TimeoutError):
    """The tool did not answer within the handshake timeout."""


class HandshakeRefused(HandshakeError):
    """There is no tool, or it closed the connection, or failed to prove itself."""


class HandshakeProtocolError(HandshakeError, ValueError):
    """The tool sent bytes that are no handshake."""


class SessionError(KvmiLibvirtError):
    """Hooking, changing or unhooking a VM failed part way.

    Parameters
        message    what failed
        applied    descriptions of the steps that are in force now
        left       descriptions of what could not be undone in QEMU
        kind       class name of the error underneath
        exit_code  of the error underneath
        is_unfinished  the worker did not say how it ended: anything may be left
    """

    def __init__(
        self,
        message: str,
        *,
        applied: tuple[str, ...] = (),
        left: tuple[str, ...] = (),
        kind: str = "SessionError",
        exit_code: ExitCode = ExitCode.FAILED,
        is_unfinished: bool = False,
    ) -> None:
        super().__init__(message)
        self.is_unfinished = is_unfinished
        self.applied = applied
        self.left = left
        self.kind = kind
        self.exit_code = exit_code


class StateError(KvmiLibvirtError):
    """The state directory is not usable."""


class EmulatorError(KvmiLibvirtError):
    """The KVMI emulator cannot do its work."""

    exit_code = ExitCode.UNSUPPORTED


class EmulatorGone(EmulatorError):
    """The emulator's supervisor has ended: its ioctls answer ENOSYS."""


def errno_name(errno: int) -> str:
    """Return the symbolic name of *errno*, or its number when it has none."""
    import errno as _errno

    return _errno.errorcode.get(errno, str(errno))


def assert_never(value: NoReturn) -> NoReturn:
    """End an exhaustive match: a type checker refuses any call that can happen."""
    raise AssertionError(f"unhandled value: {value!r}")
