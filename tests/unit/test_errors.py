# SPDX-License-Identifier: Apache-2.0
"""The exception tree: as its module draws it, and fit to be shown to an operator."""

from __future__ import annotations

import builtins
import errno
import inspect
import re
from typing import TYPE_CHECKING, Final, NoReturn, cast

import pytest

from kvmi_libvirt import errors
from kvmi_libvirt.errors import (
    ExitCode,
    KvmiLibvirtError,
    PolicyError,
    PolicySchemaError,
    RemoteCallTimeout,
    RemoteSyscallError,
    RestoreFailed,
    SessionError,
    TargetGone,
    TraceError,
    assert_never,
    errno_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CLASSES: Final = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, KvmiLibvirtError)
}

EXIT_CODES: Final[Mapping[str, ExitCode]] = {
    "KvmiLibvirtError": ExitCode.FAILED,
    "UsageError": ExitCode.USAGE,
    "PolicyError": ExitCode.POLICY,
    "PolicySyntaxError": ExitCode.POLICY,
    "PolicySchemaError": ExitCode.POLICY,
    "PolicyValueError": ExitCode.POLICY,
    "PolicyRefused": ExitCode.POLICY,
    "PlanError": ExitCode.UNSUPPORTED,
    "UnsupportedByKernel": ExitCode.UNSUPPORTED,
    "TargetError": ExitCode.TARGET,
    "TargetNotFound": ExitCode.TARGET,
    "TargetAmbiguous": ExitCode.TARGET,
    "TargetChanged": ExitCode.TARGET,
    "TargetUnsuitable": ExitCode.UNSUPPORTED,
    "TargetBusy": ExitCode.FAILED,
    "TargetGone": ExitCode.TARGET,
    "TraceError": ExitCode.FAILED,
    "RestoreFailed": ExitCode.HARM,
    "RemoteSyscallError": ExitCode.FAILED,
    "RemoteCallTimeout": ExitCode.FAILED,
    "HandshakeError": ExitCode.HANDSHAKE,
    "HandshakeTimeout": ExitCode.HANDSHAKE,
    "HandshakeRefused": ExitCode.HANDSHAKE,
    "HandshakeProtocolError": ExitCode.HANDSHAKE,
    "SessionError": ExitCode.FAILED,
    "StateError": ExitCode.FAILED,
    "EmulatorError": ExitCode.UNSUPPORTED,
    "EmulatorGone": ExitCode.UNSUPPORTED,
}


def make(kind: type[KvmiLibvirtError]) -> KvmiLibvirtError:
    if issubclass(kind, TraceError):
        return kind(errno.ESRCH, "could not continue", call="PTRACE_SYSCALL", tid=7)
    if issubclass(kind, RemoteSyscallError):
        return kind(errno.EMFILE, "recvmsg", "QEMU's descriptor table is full")
    return kind("what failed")


def drawn_tree() -> dict[str, tuple[str, ...]]:
    """Return class -> its bases, as the drawing in the module's docstring has them."""
    found: dict[str, tuple[str, ...]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"( {4,})([A-Z]\w+)(?: \((\w+)\))?(?:  |$)", line)
        if match is None:
            continue
        depth = (len(match[1]) - 4) // 2
        above[depth:] = [match[2]]
        parent = above[depth - 1] if depth else "Exception"
        found[match[2]] = (parent, *filter(None, [match[3]]))
    return found


def test_the_tree_is_as_drawn() -> None:
    assert drawn_tree() == {
        name: tuple(base.__name__ for base in kind.__bases__) for name, kind in CLASSES.items()
    }


def test_every_class_has_its_exit_code() -> None:
    assert {name: kind.exit_code for name, kind in CLASSES.items()} == EXIT_CODES


def test_exit_codes_are_the_documented_numbers() -> None:
    assert [(code.name, code.value) for code in ExitCode] == [
        *(("OK", 0), ("FAILED", 1), ("USAGE", 2), ("POLICY", 3), ("UNSUPPORTED", 4)),
        *(("TARGET", 5), ("HANDSHAKE", 6), ("HARM", 7)),
    ]


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES.keys())
def test_its_text_is_one_line_that_says_something(kind: type[KvmiLibvirtError]) -> None:
    text = str(make(kind))

    assert text
    assert "\n" not in text
    assert "None" not in text
    assert not text.startswith(("(", "["))


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES.keys())
def test_it_can_be_caught_as_its_builtin(kind: type[KvmiLibvirtError]) -> None:
    for base in kind.__bases__:
        if base.__module__ == builtins.__name__:
            with pytest.raises(base):
                raise make(kind)
    with pytest.raises(KvmiLibvirtError):
        raise make(kind)


@pytest.mark.parametrize(
    ("source", "line", "text"),
    [
        (None, None, "no source"),
        ("vm.xml", None, "vm.xml: no source"),
        ("vm.xml", 12, "vm.xml:12: no source"),
        (None, 12, "line 12: no source"),
    ],
)
def test_a_policy_error_begins_with_its_place(
    source: str | None, line: int | None, text: str
) -> None:
    error = PolicySchemaError("no source", source=source, line=line)

    assert str(error) == text
    assert (error.message, error.source, error.line) == ("no source", source, line)


def test_a_place_is_filled_in_once() -> None:
    error = PolicyError("bad", line=3)

    assert str(error.at("vm.xml")) == "vm.xml:3: bad"
    assert str(error.at("other.xml")) == "vm.xml:3: bad"


def test_a_trace_error_names_the_request_and_keeps_the_errno() -> None:
    error = make(TraceError)

    assert str(error) == "could not continue (PTRACE_SYSCALL on thread 7: ESRCH)"
    assert isinstance(error, OSError)
    assert error.errno == errno.ESRCH


def test_a_restore_that_failed_is_a_trace_error_that_warns_of_harm() -> None:
    assert isinstance(make(RestoreFailed), TraceError)


@pytest.mark.parametrize(
    ("detail", "text"),
    [
        ("", "KVM_INTROSPECTION_HOOK inside QEMU failed with EEXIST"),
        ("hooked", "KVM_INTROSPECTION_HOOK inside QEMU failed with EEXIST: hooked"),
    ],
)
def test_a_remote_error_names_the_call_and_the_errno(detail: str, text: str) -> None:
    error = RemoteSyscallError(errno.EEXIST, "KVM_INTROSPECTION_HOOK", detail)

    assert str(error) == text
    assert (error.errno, error.call, error.detail) == (
        errno.EEXIST,
        "KVM_INTROSPECTION_HOOK",
        detail,
    )


def test_a_call_given_up_is_a_remote_error() -> None:
    assert isinstance(make(RemoteCallTimeout), RemoteSyscallError)


def test_a_target_error_knows_the_process() -> None:
    assert TargetGone("QEMU has ended", pid=42).pid == 42
    assert TargetGone("QEMU has ended").pid is None
    assert str(TargetGone("QEMU has ended", pid=42)) == "QEMU has ended"


def test_a_session_error_takes_over_the_exit_code_of_what_is_underneath() -> None:
    plain = SessionError("x")
    harm = SessionError("x", left=("the hook",), kind="RestoreFailed", exit_code=ExitCode.HARM)

    assert (plain.exit_code, plain.kind, plain.applied, plain.left) == (
        *(ExitCode.FAILED, "SessionError"),
        *((), ()),
    )
    assert (harm.exit_code, harm.kind, harm.left) == (
        *(ExitCode.HARM, "RestoreFailed"),
        ("the hook",),
    )
    assert SessionError.exit_code is ExitCode.FAILED


@pytest.mark.parametrize(
    ("number", "name"), [(errno.ENOTTY, "ENOTTY"), (512, "512"), (0, "0"), (-1, "-1")]
)
def test_an_errno_has_a_name_or_is_shown_as_a_number(number: int, name: str) -> None:
    assert errno_name(number) == name


def test_a_match_that_was_not_exhaustive_is_loud() -> None:
    never = cast("Callable[[object], NoReturn]", assert_never)

    with pytest.raises(AssertionError, match="unhandled value: 5"):
        never(5)
