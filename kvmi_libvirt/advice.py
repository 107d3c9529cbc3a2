# SPDX-License-Identifier: Apache-2.0
"""What an operator types after an error. Pure; imports errors and quoting.

An error's text says what is wrong, and often what to do about it. Where it does not, the
command's one line ends with ``; next: COMMAND``: the one that says more, or puts it right.
"""

from __future__ import annotations

import errno
import re
import shlex
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import (
    EmulatorError,
    ExitCode,
    KvmiLibvirtError,
    PlanError,
    PolicyError,
    UsageError,
)
from kvmi_libvirt.quoting import printable

if TYPE_CHECKING:
    import argparse

_SAYS_WHAT_TO_DO: Final = re.compile(
    r"'kvmi-libvirt |; next: | --[a-z]|\b(virsh|systemctl|apt-get|qm) [a-z]"
    r"|(; |: |\()(ask|run|try|start|boot|restart|install|correct|remove|move|write|name|give"
    r"|put|save|make|end|take|chmod|chown|unhook|hook|did you mean)\b"
)
"""A command, or a clause that begins with what to do."""


def ending(error: BaseException, verb: str, args: argparse.Namespace, *, is_root: bool) -> str:
    """Return what is to be added to the text of *error*: nothing, or the next command.

    Parameters
        verb, args  what was typed, and failed
        is_root     this process is root's
    """
    command = _next_command(error, verb, args, is_root=is_root)
    return "" if command is None else f"; next: {command}"


def _next_command(
    error: BaseException, verb: str, args: argparse.Namespace, *, is_root: bool
) -> str | None:
    if isinstance(error, OSError) and not isinstance(error, KvmiLibvirtError):
        is_refused = error.errno in (errno.EACCES, errno.EPERM)
        return f"sudo kvmi-libvirt {verb}" if is_refused and not is_root else None
    domain = _word(getattr(args, "domain", None))
    if isinstance(error, KeyboardInterrupt):
        return f"kvmi-libvirt status {domain}" if domain else None
    if isinstance(error, KvmiLibvirtError) and error.next_command is not None:
        return printable(error.next_command)
    if isinstance(error, EmulatorError) or _SAYS_WHAT_TO_DO.search(str(error)):
        return None
    if isinstance(error, UsageError):
        return f"kvmi-libvirt {verb} --help"
    if isinstance(error, PolicyError):
        return _about_policy(error, verb, args)
    if getattr(error, "exit_code", None) is ExitCode.HARM and domain:
        return f"virsh domstate {domain}"
    if verb in ("doctor", "agent", "emulate"):
        return None
    of_host = isinstance(error, PlanError) or not domain
    return "kvmi-libvirt doctor" if of_host else f"kvmi-libvirt doctor {domain}"


def _about_policy(error: PolicyError, verb: str, args: argparse.Namespace) -> str | None:
    domain = re.match(r"XML of domain '(.+)'", error.source or "")
    if domain:
        return f"virsh edit {_word(domain[1])}"
    file = error.source or getattr(args, "file", None)
    if file is None and getattr(args, "domain", None):
        return f"kvmi-libvirt explain {_word(args.domain)}"
    if verb == "check" or file in (None, "-"):
        return None
    return f"kvmi-libvirt check {_word(file)}"


def _word(text: object) -> str:
    return printable(shlex.quote(text)) if isinstance(text, str) else ""
