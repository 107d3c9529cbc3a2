# SPDX-License-Identifier: Apache-2.0
"""The ``kvmi-libvirt`` command: one module a verb, imported only when it is used.

A verb module offers ``add_arguments(parser)`` and ``run(args) -> ExitCode``. Data
goes to stdout, everything else to stderr. No verb calls ``sys.exit``.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, cast

from kvmi_libvirt import __version__, advice
from kvmi_libvirt.errors import ExitCode, KvmiLibvirtError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROG: Final = "kvmi-libvirt"

VERBS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "check": "lint domain XML, an introspection element, a host policy or a profile",
        "plan": "print the ioctls a policy amounts to, without doing them",
        "explain": "say which policy applies, and which rule decided what",
        "names": "list the commands, events, groups and profiles a policy can name",
        "get": "print a domain's introspection element",
        "set": "put an introspection element into a domain's metadata",
        "unset": "take the introspection element out of a domain's metadata",
        "status": "show what is hooked, with which rights",
        "doctor": "say what is wrong with this host, or why a VM is not hooked",
        "start": "start a VM so that no instruction of it runs unwatched",
        "hook": "hook a running VM now",
        "unhook": "take introspection off a running VM",
        "apply": "move a hooked VM to the policy it has now",
        "allow": "give a hooked VM's tool more rights now",
        "deny": "take rights from a hooked VM's tool now",
        "probe": "be an introspection tool that asks the kernel what it may do",
        "agent": "be the daemon that keeps introspection right",
        "emulate": "run a command on an emulated KVMI kernel",
        "install": "install the libvirt hook",
        "uninstall": "remove the libvirt hook",
    }
)


_INTERMIXED: Final = frozenset({"allow", "deny"})
"""Their names may follow options; argparse alone would take such names for unknown."""


class Verb(Protocol):
    """What a verb module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments."""

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Do it."""


class _Parser(argparse.ArgumentParser):
    # One line and exit code 2 for a usage error, as every other error gets one line.
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see '{self.prog} --help')", file=sys.stderr)
        raise SystemExit(ExitCode.USAGE)


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {text}" for verb, text in VERBS.items())
    return (
        f"usage: {PROG} [--debug] [-c URI] VERB [ARGUMENT...]\n\n"
        "Declarative KVM introspection for libvirt-managed virtual machines.\n\n"
        f"verbs:\n{verbs}\n\n"
        "options:\n"
        "  -c --connect URI  libvirt to ask, for verbs that do; also after the verb\n"
        "  --debug    log every step, and show tracebacks\n"
        "  --version  print the version\n"
        "  -h --help  print this, or a verb's own help after a verb\n\n"
        "exit codes: 0 ok, 1 failed, 2 usage, 3 bad policy, 4 kernel or host cannot,\n"
        "5 no such VM or not running, 6 tool or handshake, 7 a VM may be harmed\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code.

    Never raises for anything a user can cause: every such error is one line on
    stderr. With ``--debug`` (or an error nobody foresaw) the traceback is shown.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_standard_fds()
    for stream in (sys.stdout, sys.stderr):
        # A terminal or file that cannot show a character gets its escape instead.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    debug = False
    connect: list[str] = []
    while arguments and arguments[0].startswith("-"):
        option = arguments.pop(0)
        if option == "--debug":
            debug = True
        elif option in ("-c", "--connect"):
            if not arguments:
                print(f"{PROG}: {option} needs a URI (see '{PROG} --help')", file=sys.stderr)
                return ExitCode.USAGE
            connect = ["--connect", arguments.pop(0)]
        elif option.startswith("--connect="):
            connect = [option]
        elif option in ("-h", "--help"):
            print(_usage(), end="")
            return ExitCode.OK
        elif option == "--version":
            print(f"{PROG} {__version__}")
            return ExitCode.OK
        else:
            print(f"{PROG}: unknown option {option} (see '{PROG} --help')", file=sys.stderr)
            return ExitCode.USAGE
    if not arguments:
        print(_usage(), end="", file=sys.stderr)
        return ExitCode.USAGE
    name = arguments.pop(0)
    if name not in VERBS:
        print(f"{PROG}: unknown verb '{name}' (see '{PROG} --help')", file=sys.stderr)
        return ExitCode.USAGE
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s" if debug else f"{PROG}: %(message)s",
    )
    # In front, so that what stands after the verb counts.
    return _run(name, [*connect, *arguments], debug=debug)


def _open_standard_fds() -> None:
    # Started with stdin, stdout or stderr closed: the next open() would take its
    # number, and a worker its place. And print() would have nothing to write to.
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for good
            setattr(sys, name, stream)


def _run(name: str, arguments: list[str], *, debug: bool) -> int:
    verb = cast("Verb", importlib.import_module(f"kvmi_libvirt.cli.{name}"))  # chosen from VERBS
    parser = _Parser(prog=f"{PROG} {name}", description=VERBS[name], allow_abbrev=False)
    verb.add_arguments(parser)
    parse = parser.parse_intermixed_args if name in _INTERMIXED else parser.parse_args
    try:
        args = parse(arguments)
    except SystemExit as error:  # argparse ends --help and usage errors this way
        return int(error.code or 0)
    try:
        code = verb.run(args)
        sys.stdout.flush()
        return int(code)
    except KvmiLibvirtError as error:
        if debug:
            logging.getLogger(__name__).exception("%s failed", name)
        _complain(str(error), error, name, args)
        return int(error.exit_code)
    except BrokenPipeError:
        # The reader went away (a pager, head). Keep the interpreter from
        # complaining again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except OSError as error:
        if debug:
            logging.getLogger(__name__).exception("%s failed", name)
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}", error, name, args)
        return ExitCode.FAILED
    except KeyboardInterrupt as error:
        _complain("interrupted", error, name, args)
        return 130


def _complain(text: str, error: BaseException, name: str, args: argparse.Namespace) -> None:
    more = advice.ending(error, name, args, is_root=os.geteuid() == 0)
    print(f"{PROG}: {text}{more}", file=sys.stderr)
