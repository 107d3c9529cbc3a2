# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt probe``: be a tool that asks the kernel what it may do."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import socket
import sys
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi import revisions
from kvmi_libvirt.cli import output
from kvmi_libvirt.errors import ExitCode, KvmiLibvirtError
from kvmi_libvirt.policy.secret import MAX_SECRET_BYTES
from kvmi_libvirt.quoting import printable
from kvmi_libvirt.tool.inquiry import Pace, ProbeResult, Verdict
from kvmi_libvirt.tool.probe import Manner, Probe, listen_unix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_SECONDS_MAX: Final = 86400.0
_RANK: Final = {Verdict.ALLOWED: 0, Verdict.DENIED: 1, Verdict.UNKNOWN: 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = (
        "Prints 'listening on unix:PATH' on stderr once a VM can connect. Serves any number of "
        "VMs until SIGINT or SIGTERM, and keeps each channel open after its result, as a tool "
        "does. A tool is not told when its rights are complete: a result is printed when the "
        "answers have not changed for the time of --settle."
    )
    parser.add_argument(
        "--listen",
        required=True,
        type=_unix_path,
        metavar="unix:PATH",
        help="where to listen; a stale socket there is replaced, and removed at the end",
    )
    parser.add_argument(
        "--once", action="store_true", help="end after the result of the first VM that says hello"
    )
    parser.add_argument(
        "--hold", action="store_true", help="with --once: keep the channel until the VM closes it"
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="go on asking, and print again whenever the answers have changed; implies --hold",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON: one document with --once, else one document a line",
    )
    parser.add_argument(
        "--secret",
        metavar="FILE",
        help="prove to know the secret in FILE: the answer carries the SHA-1 of its raw bytes",
    )
    pace = Pace()
    parser.add_argument(
        "--timeout",
        type=_positive_seconds,
        default=pace.timeout_s,
        metavar="S",
        help="longest wait for a VM's hello, for its hook, and for its answers (%(default)s)",
    )
    parser.add_argument(
        "--settle",
        type=_seconds,
        default=pace.settle_s,
        metavar="S",
        help="how long the answers must not change to be final (%(default)s)",
    )
    parser.add_argument(
        "--wait",
        type=_positive_seconds,
        metavar="S",
        help="longest wait for the first VM to say hello (default: for ever)",
    )
    parser.add_argument(
        "--abi",
        choices=[abi.name for abi in revisions.REVISIONS],
        help="the kernel's KVMI revision (default: concluded from hello and answers)",
    )


def run(args: argparse.Namespace) -> ExitCode:
    """Serve as the arguments say."""
    manner = Manner(
        pace=Pace(timeout_s=args.timeout, settle_s=args.settle),
        abi=revisions.by_name(args.abi) if args.abi else None,
        once=args.once,
        hold=args.hold,
        watch=args.watch,
        wait_s=args.wait,
        secret=None if args.secret is None else _read_secret(args.secret),
    )
    one_document = args.once and not args.watch
    with _stop_on_signal() as stop, listen_unix(args.listen) as listener:
        probe = Probe(
            listener,
            stop=stop,
            report=_reporter(as_json=args.json, one_document=one_document),
            complain=_complain,
            manner=manner,
        )
        print(f"listening on unix:{args.listen}", file=sys.stderr, flush=True)
        if probe.run():
            return ExitCode.OK
    raise KvmiLibvirtError("stopped by a signal before any VM had a result")


def _read_secret(path: str) -> bytes:
    with open(path, "rb") as file:
        secret = file.read(MAX_SECRET_BYTES + 1)
    if not 0 < len(secret) <= MAX_SECRET_BYTES:
        raise KvmiLibvirtError(f"{printable(path)}: a secret has 1 to {MAX_SECRET_BYTES} bytes")
    return secret


def _unix_path(text: str) -> str:
    kind, _, path = text.partition(":")
    if kind != "unix" or not path or "\0" in path:
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form unix:PATH")
    return path


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _SECONDS_MAX:  # also false for nan
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a number of seconds up to {_SECONDS_MAX:g}"
        )
    return value


def _positive_seconds(text: str) -> float:
    value = _seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError("it must be more than 0 seconds")
    return value


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[socket.socket]:
    # SIGINT and SIGTERM become a readable socket, so that the socket file is removed
    # and nothing is interrupted half way.
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        previous = {
            number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)
        }
        previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)


def _ignore(_number: int, _frame: object) -> None:
    # The wake-up descriptor tells; a handler must exist for it to be written.
    return


def _complain(error: KvmiLibvirtError) -> None:
    print(f"kvmi-libvirt: {error}", file=sys.stderr, flush=True)


def _reporter(*, as_json: bool, one_document: bool) -> Callable[[ProbeResult], None]:
    def report(result: ProbeResult) -> None:
        if not as_json:
            _print_tables(result)
        elif one_document:
            output.print_json(result.to_json())
        else:
            print(json.dumps(result.to_json(), ensure_ascii=False))
        sys.stdout.flush()

    return report


def _print_tables(result: ProbeResult) -> None:
    name = printable(result.name)
    title = f"VM {name} ({result.uuid})" if name else f"VM {result.uuid}"
    print(f"{title}: KVMI {result.abi}, protocol version {result.version}")
    output.print_table(("COMMAND", "VERDICT"), _rows(result.commands))
    print()
    output.print_table(("EVENT", "VERDICT"), _rows(result.events))


def _rows(verdicts: Mapping[str, Verdict]) -> list[tuple[str, str]]:
    # Stable: within one verdict the order of ids stays.
    grouped = sorted(verdicts.items(), key=lambda item: _RANK[item[1]])
    return [(name, verdict.value) for name, verdict in grouped]
