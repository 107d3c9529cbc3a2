# SPDX-License-Identifier: Apache-2.0
"""The end of an error's line: the next command, where the text does not say what to do."""

from __future__ import annotations

import argparse
import errno
import pickle

import pytest

from kvmi_libvirt.advice import ending
from kvmi_libvirt.errors import (
    EmulatorGone,
    ExitCode,
    HandshakeTimeout,
    KvmiLibvirtError,
    PolicyRefused,
    PolicyValueError,
    SessionError,
    StateError,
    TargetBusy,
    TargetNotFound,
    UnsupportedByKernel,
    UsageError,
)

HARMED = SessionError("could not restore", exit_code=ExitCode.HARM)


def said(error: BaseException, verb: str = "hook", *, root: bool = True, **typed: object) -> str:
    return ending(error, verb, argparse.Namespace(**typed), is_root=root)


@pytest.mark.parametrize(
    ("error", "command"),
    [
        (HandshakeTimeout("no handshake within 3 s"), "kvmi-libvirt doctor web1"),
        (SessionError("could not attach"), "kvmi-libvirt doctor web1"),
        (TargetBusy("not found parked"), "kvmi-libvirt doctor web1"),
        (StateError("cannot write /x: No space left on device"), "kvmi-libvirt doctor web1"),
        (UnsupportedByKernel("v12 lacks X"), "kvmi-libvirt doctor"),
        (HARMED, "virsh domstate web1"),
        (UsageError("two of them"), "kvmi-libvirt hook --help"),
        (PolicyValueError("no", source="XML of domain 'web 1'"), "virsh edit 'web 1'"),
        (PolicyRefused("no", source="/etc/hp.xml"), "kvmi-libvirt check /etc/hp.xml"),
        (PolicyRefused("above the ceiling"), "kvmi-libvirt explain web1"),
        (KeyboardInterrupt(), "kvmi-libvirt status web1"),
    ],
)
def test_an_error_of_each_kind_ends_with_a_command(error: BaseException, command: str) -> None:
    assert said(error, domain="web1") == f"; next: {command}"


@pytest.mark.parametrize(
    "text",
    [
        "no tool listens on /run/kvmi/t: start the tool first",
        "process 5 is already traced by process 7; end that first",
        "not permitted to look into process 5: CAP_SYS_PTRACE is missing (run as root)",
        "domain 'web1' is not hooked; 'kvmi-libvirt hook' hooks it",
        "unknown command 'X'; did you mean Y?",
        "nothing is recorded of process 5; name its domain XML with --xml FILE",
        "python3-libvirt is not installed: apt-get install python3-libvirt",
    ],
)
def test_a_text_that_says_what_to_do_is_left_alone(text: str) -> None:
    assert said(KvmiLibvirtError(text), domain="web1") == ""


@pytest.mark.parametrize(
    "text",
    ["domain 'start' is gone", "the tool did not run", "cannot make /run/x: Permission denied"],
)
def test_words_that_only_look_like_advice(text: str) -> None:
    assert said(KvmiLibvirtError(text)) == "; next: kvmi-libvirt doctor"


def test_the_command_given_with_an_error_counts_first() -> None:
    error = TargetNotFound("does not run; start it").then("virsh start 'a b'")

    assert said(error, domain="a b") == "; next: virsh start 'a b'"
    # Also from a process that asked for us.
    assert pickle.loads(pickle.dumps(error)).next_command == "virsh start 'a b'"


def test_a_name_cannot_break_the_line() -> None:
    assert "\n" not in said(SessionError("x"), domain="a\nb; rm -rf /\x1b[2J")
    assert said(SessionError("x"), domain="a; b") == "; next: kvmi-libvirt doctor 'a; b'"


def test_a_refused_file_asks_for_root_unless_this_is_root() -> None:
    refused = OSError(errno.EACCES, "Permission denied", "/etc/libvirt")

    assert said(refused, "install", root=False) == "; next: sudo kvmi-libvirt install"
    assert said(refused, "install") == ""
    assert said(OSError(errno.ENOENT, "No such file"), "check", root=False) == ""


def test_where_nothing_more_is_to_be_had_nothing_is_said() -> None:
    assert said(PolicyValueError("no", source="a.xml"), "check") == ""
    assert said(PolicyValueError("no", source="-"), "set", file="-") == ""
    assert said(EmulatorGone("its supervisor has ended"), domain="web1") == ""
    assert said(KeyboardInterrupt(), "names") == ""
