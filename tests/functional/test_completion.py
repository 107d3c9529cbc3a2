# SPDX-License-Identifier: Apache-2.0
"""Completion in real shells, on a terminal of their own: what TAB makes of a line.

A stand-in for the command notes what it was called with, and one for virsh knows three
domains, of which two run. Nothing here talks to libvirt.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import completion
import generate
import pytest
import verbs
from support import require_tool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT: Final = Path(__file__).resolve().parents[2]
COMPLETION: Final = ROOT / "packaging" / "completion"
TIMEOUT_S: Final = 60.0

VIRSH: Final = """\
#!/bin/sh
case "$*" in
"--quiet --readonly --connect qemu:///system list --all --name")
	printf 'web1\\nwebmail\\nbig vm\\n\\n' ;;
"--quiet --readonly --connect qemu:///system list --name") printf 'web1\\nbig vm\\n\\n' ;;
"--quiet --readonly --connect qemu:///system list --inactive --name") printf 'webmail\\n\\n' ;;
"--quiet --readonly --connect test:///default list --name") printf 'other9\\n\\n' ;;
*) echo "error: unexpected $*" >&2; exit 1 ;;
esac
"""
COMMAND: Final = f"""\
#!{sys.executable} -IS
import json, sys
with open(__file__ + ".calls", "w") as pipe:
    pipe.write(json.dumps(sys.argv[1:]) + "\\n")
"""

PROMPT: Final = b"READY> "
SETUP: Final = {
    "bash": ". '{dir}/kvmi-libvirt'; PS1='READY''> '",
    "zsh": (
        "fpath=('{dir}' $fpath); autoload -Uz compinit; compinit -u -D; "
        "unsetopt prompt_cr prompt_sp; PS1='READY''> '"
    ),
    "fish": "source '{dir}/kvmi-libvirt.fish'; function fish_prompt; echo -n 'READY''> '; end",
}
"""What loads our completion, and makes a prompt that the line itself does not hold."""

OPTIONS: Final = {
    "bash": ("--norc", "--noprofile", "-i"),
    "zsh": ("-f", "-i"),
    "fish": ("--no-config", "-i"),
}


@dataclass
class Shell:
    """An interactive shell on a terminal, with the stand-ins on its PATH.

    Parameters
        calls   a pipe on which the command's stand-in says its arguments
        output  everything the shell has written
        called  what came on *calls* since the last line was typed
    """

    terminal: int
    calls: int
    output: bytearray = field(default_factory=bytearray)
    called: bytearray = field(default_factory=bytearray)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait_for(self, is_there: Callable[[], object], *, what: str) -> None:
        """Read the terminal, and the command's pipe, until *is_there*."""
        deadline = time.monotonic() + TIMEOUT_S
        while not is_there():
            left = max(0.0, deadline - time.monotonic())
            ready = select.select([self.terminal, self.calls], [], [], left)[0]
            assert ready, f"no {what} within {TIMEOUT_S:g} s: {bytes(self.output)!r}"
            if self.terminal in ready:
                self.output += os.read(self.terminal, 4096)
            if self.calls in ready:
                self.called += os.read(self.calls, 4096)

    def run(self, line: str) -> list[str]:
        """Type *line*, TAB and all, and ENTER; return the command's arguments."""
        start = len(self.output)
        self.called.clear()
        self.type(line + "\r")
        self.wait_for(lambda: self.called.endswith(b"\n"), what="call")
        # The prompt behind the end of the line: the shell takes the next one.
        self.wait_for(lambda: PROMPT in self.output[start:].partition(b"\n")[2], what="prompt")
        arguments: list[str] = json.loads(self.called)
        return arguments


@contextlib.contextmanager
def started(name: str, directory: Path) -> Iterator[Shell]:
    """Start the shell called *name* in an empty home, with our completion loaded."""
    program = require_tool(name, name)
    programs = directory / "bin"
    programs.mkdir()
    for stand_in, text in (("virsh", VIRSH), ("kvmi-libvirt", COMMAND)):
        (programs / stand_in).write_text(text)
        (programs / stand_in).chmod(0o755)
    os.mkfifo(programs / "kvmi-libvirt.calls")
    work = directory / "work"
    work.mkdir()
    (work / "policy one.xml").touch()
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": str(directory),
        "TERM": "xterm" if name == "fish" else "dumb",
        "LC_ALL": "C.UTF-8",
    }
    with contextlib.ExitStack() as stack:
        terminal, slave = pty.openpty()
        stack.callback(os.close, terminal)
        # Open for writing too: so there is no end of file between two calls.
        calls = os.open(programs / "kvmi-libvirt.calls", os.O_RDWR | os.O_NONBLOCK)
        stack.callback(os.close, calls)
        process = subprocess.Popen(
            ["setsid", "--ctty", program, *OPTIONS[name]],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=work,
            env=environment,
        )
        os.close(slave)
        stack.callback(process.wait)
        stack.callback(process.kill)
        shell = Shell(terminal=terminal, calls=calls)
        shell.type(SETUP[name].format(dir=COMPLETION) + "\r")
        shell.wait_for(lambda: PROMPT in shell.output, what="prompt")
        yield shell


LINES: Final = (
    ("che\t", "check"),
    ("uns\t big\t", "unset 'big vm'"),
    ("hook web\t", "hook web1"),
    ("start we\t", "start webmail"),
    ("-c test:///d\t unho\t oth\t", "-c test:///default unhook other9"),
    ("--connect test:///default hook oth\t", "--connect test:///default hook other9"),
    ("hook bi\t", "hook 'big vm'"),
    ("hook --conn\t test:///default oth\t", "hook --connect test:///default other9"),
    ("hook -c test:///default oth\t", "hook -c test:///default other9"),
    ("hook -c qemu:///sy\t web\t", "hook -c qemu:///system web1"),
    ("hook --connect=test:///d\t oth\t", "hook --connect=test:///default other9"),
    ("hook nosuch\t", "hook nosuch"),
    ("allow web1 KVMI_VM_READ_P\t", "allow web1 KVMI_VM_READ_PHYSICAL"),
    ("deny web1 KVMI_VM_GET_INFO memory-w\t", "deny web1 KVMI_VM_GET_INFO memory-write"),
    ("names obs\t", "names observe"),
    ("names --ab\t v7", "names --abi v7"),
    ("set web1 pol\t", "set web1 'policy one.xml'"),
    ("check pol\t", "check 'policy one.xml'"),
    ("explain bi\t", "explain 'big vm'"),
    ("emulate --fault eno\t", "emulate --fault enomem"),
    ("probe --list\t unix:/run/x", "probe --listen unix:/run/x"),
)
"""What is typed after "kvmi-libvirt ", and what it shall become."""


@pytest.mark.parametrize("name", OPTIONS)
def test_tab_completes(name: str, tmp_path: Path) -> None:
    with started(name, tmp_path) as shell:
        for typed, expected in LINES:
            assert [typed, *shell.run(f"kvmi-libvirt {typed}")] == [typed, *shlex.split(expected)]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_libvirt_that_does_not_answer_is_passed_over_quietly(name: str, tmp_path: Path) -> None:
    with started(name, tmp_path) as shell:
        called = shell.run("kvmi-libvirt hook -c xen:/// we\t")

        assert called == ["hook", "-c", "xen:///", "we"]
        assert b"unexpected" not in shell.output


def test_the_scripts_are_as_the_command_is_now() -> None:
    stale = [
        str(path.relative_to(ROOT))
        for path, text in generate.generated().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]

    assert stale == [], "run: make generated"


def test_every_value_of_every_option_is_described() -> None:
    for verb in verbs.verbs():
        for argument in verb.arguments:
            if argument.value is not None:
                assert completion.kind_of(verb, argument)
