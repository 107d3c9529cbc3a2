# SPDX-License-Identifier: Apache-2.0
"""libvirt's hook operations: what each one does and what its failure may do.

Run by ``hooks/qemu.d/50-kvmi-libvirt`` as ``python -I -m kvmi_libvirt.hook NAME
OPERATION SUBOPERATION EXTRA`` with the domain XML on stdin, and only for domains
that may concern us. Never talks to libvirt, which waits for it with the domain
locked. Never writes to stdout: libvirt may take that for a new domain XML.

Ends with 0, or with VETO and one line on stderr; the script turns that into the
exit code libvirt sees. Anything else tells the script that we are broken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import hooklog, linux, worker
from kvmi_libvirt.beforehand import require_possible
from kvmi_libvirt.early import require_not_run, watch_start
from kvmi_libvirt.errors import (
    KvmiLibvirtError,
    PolicyError,
    PolicySchemaError,
    SessionError,
    StateError,
)
from kvmi_libvirt.introspect import (
    SESSION_S,
    ensure_hooked,
    is_same_process,
    record_failure,
    verified,
)
from kvmi_libvirt.policy.host import HOST_POLICY_PATH, load_host_policy
from kvmi_libvirt.policy.model import NAMESPACE, Mode
from kvmi_libvirt.policy.required import demands, is_required, scan
from kvmi_libvirt.policy.resolve import decide
from kvmi_libvirt.policy.secret import read_secret
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR, open_domain
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.introspect import OnHooked
    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.limits import HostPolicy
    from kvmi_libvirt.policy.model import Policy
    from kvmi_libvirt.qemu.process import Process
    from kvmi_libvirt.state import VmState

logger = logging.getLogger(__name__)

VETO: Final = 10
"""Exit code for "refuse this operation": not 1, which a broken interpreter ends with."""

_LOCK_S: Final = 10.0
_MAX_XML_LEN: Final = 64 << 20


class Operation(enum.Enum):
    """The operations of libvirt's qemu hook that mean something to us."""

    PREPARE = "prepare"
    START = "start"
    STARTED = "started"
    STOPPED = "stopped"
    RELEASE = "release"
    MIGRATE = "migrate"
    RESTORE = "restore"
    RECONNECT = "reconnect"


class Hook:
    """One call of the hook.

    Parameters
        state          the state directory
        run_dir        where libvirt keeps pidfiles
        host_policy    instead of the host's policy
        watch_start    called for a start that is to be hooked early; must return at once
        on_hooked      as :func:`introspect.hook_vm` has it
        allow_standin  also serve stand-in VM processes without KVM
    """

    def __init__(
        self,
        *,
        state: StateDir | None = None,
        run_dir: Path = LIBVIRT_QEMU_RUN_DIR,
        host_policy: Path | None = None,
        watch_start: Callable[[Domain, Policy], None] | None = None,
        on_hooked: OnHooked | None = None,
        allow_standin: bool = False,
    ) -> None:
        """Nothing is touched yet."""
        self._state = state or StateDir()
        self._run_dir = run_dir
        self._host_policy = host_policy
        self._watch_start = watch_start
        self._on_hooked = on_hooked
        self._allow_standin = allow_standin
        self.failure: Exception | None = None
        """What the last operation failed with, whether that was a reason for a veto or not."""

    def run(self, name: str, operation: str, xml: bytes) -> str | None:
        """Do what *operation* asks; return the reason of a veto, or None.

        A veto is only returned where libvirt can still refuse without harm, and
        only when the domain demands introspection. ``reconnect``, ``stopped`` and
        ``release`` never return one, whatever happens: a failing reconnect would
        make libvirt kill the running VM.
        """
        try:
            known = Operation(operation)
        except ValueError:
            return None
        self.failure = None
        try:
            if known in (Operation.PREPARE, Operation.MIGRATE, Operation.RESTORE):
                self._check(name, xml)
            elif known is Operation.START:
                self._watch(name, xml)
            elif known is Operation.STARTED:
                self._start(name, xml)
            elif known is Operation.RECONNECT:
                self._verify(name, xml)
            else:
                self._forget(name, xml)
        except (KvmiLibvirtError, OSError) as error:
            self.failure = error
            return self._judge(name, known, xml, error)
        return None

    def _judge(self, name: str, operation: Operation, xml: bytes, error: Exception) -> str | None:
        line = " ".join(str(error).split())
        vetoes = operation not in (Operation.RECONNECT, Operation.STOPPED, Operation.RELEASE)
        if vetoes and demands(xml, self._host, self._host_policy or HOST_POLICY_PATH):
            logger.error("domain %s: %s refused: %s", name, operation.value, line)
            return (
                f"{_reason(error)}; domain '{name}' requires introspection; "
                f"next: kvmi-libvirt doctor {shlex.quote(name)}"
            )
        logger.warning("domain %s: %s: %s", name, operation.value, line)
        return None

    def _host(self) -> HostPolicy:
        if self._host_policy is None:
            return load_host_policy()
        return load_host_policy(self._host_policy)

    def _policy(self, name: str, xml: bytes) -> tuple[Domain, Policy | None]:
        domain, policy = decide(xml, self._host(), source=f"XML of domain '{name}'")
        if policy is None and scan(xml).modes:
            raise PolicySchemaError(
                f"the introspection element is not of {NAMESPACE}, "
                "the only version this release knows"
            )
        return domain, policy

    def _check(self, name: str, xml: bytes) -> None:
        # While the VM does not exist yet, or, at a migration, still runs elsewhere.
        domain, policy = self._policy(name, xml)
        if policy is None:
            return
        if policy.secret is not None:
            read_secret(policy.secret)
        require_possible(policy, domain.emulator)

    def _watch(self, name: str, xml: bytes) -> None:
        # QEMU does not exist yet. Whoever watches has to be at it when it does.
        domain, policy = self._policy(name, xml)
        if policy is None or not policy.early:
            return
        self._state.remove(domain.uuid)  # whatever is left of an earlier start
        if self._watch_start is not None:
            self._state.mark_start(domain.uuid)
            self._watch_start(domain, policy)

    def _end_watch(self, domain: Domain, policy: Policy) -> None:
        # Whoever watches has hooked the VM, or failed to, or finds that it is too late. It
        # may be at it still, where libvirt went on by itself: a start that stays paused.
        with contextlib.ExitStack() as stack:
            mark = self._state.open_start(domain.uuid)
            if mark is None:
                return
            stack.enter_context(mark)
            mark.end()
            deadline = time.monotonic() + policy.handshake_timeout_s + SESSION_S
            if not mark.wait_unclaimed(deadline):
                raise SessionError("whoever was to hook it early does not come to an end")

    def _start(self, name: str, xml: bytes) -> None:
        try:
            domain, policy = self._policy(name, xml)
        except KvmiLibvirtError as error:
            self._record(name, xml, error)
            raise
        if policy is None:
            return
        with open_domain(domain.name, domain.uuid, run_dir=self._run_dir) as process:
            self._end_watch(domain, policy)
            late = None
            if policy.early:
                tried = self._tried_early(process, domain)
                if tried is not None and policy.mode is Mode.REQUIRED:
                    raise SessionError(tried.error or "it was not hooked early")
                if tried is not None and tried.source is not None:
                    return  # its tool was called, which is done once at a start
                late = self._too_late(process, domain, policy)
            record = ensure_hooked(
                process,
                domain,
                policy,
                state=self._state,
                on_hooked=self._on_hooked,
                allow_standin=self._allow_standin,
            )
            if late is not None:
                with self._state.locked(domain.uuid, deadline=time.monotonic() + _LOCK_S):
                    self._state.save(dataclasses.replace(record, error=str(late)))

    def _tried_early(self, process: Process, domain: Domain) -> VmState | None:
        # The record of a failure. Where there is none, it is hooked, or nobody tried.
        recorded = self._state.load(domain.uuid)
        if recorded is None or not is_same_process(recorded, process) or recorded.socket_inode:
            return None
        return recorded if recorded.error else None

    def _too_late(self, process: Process, domain: Domain, policy: Policy) -> SessionError | None:
        # A guest that runs by now and was not hooked before did so unwatched. One that does
        # not, in a paused start, has lost nothing.
        recorded = self._state.load(domain.uuid)
        if recorded is not None and is_same_process(recorded, process) and recorded.socket_inode:
            return None
        try:
            require_not_run(process)
        except SessionError as late:
            if policy.mode is Mode.REQUIRED:
                raise
            logger.warning("domain %s: %s", domain.name, late)
            return late
        return None

    def _record(self, name: str, xml: bytes, error: KvmiLibvirtError) -> None:
        # For status; the failure itself is the caller's to judge.
        if is_required(xml):
            return
        try:
            uuid = scan(xml).uuid
            with open_domain(name, uuid, run_dir=self._run_dir) as process:
                record_failure(process, name, uuid, Mode.OPTIONAL, error, state=self._state)
        except (KvmiLibvirtError, OSError) as problem:
            logger.warning("domain %s: not recorded: %s", name, problem)

    def _verify(self, name: str, xml: bytes) -> None:
        facts = scan(xml)
        recorded = self._state.load(facts.uuid)
        if recorded is None:
            if facts.modes:
                logger.warning(
                    "domain %s runs without the introspection its XML asks for; "
                    "'kvmi-libvirt hook %s' hooks it",
                    *(name, name),
                )
            return
        with open_domain(name, facts.uuid, run_dir=self._run_dir) as process:
            if not is_same_process(recorded, process):
                self._forget(name, xml)
                return
        # Nothing is written: status looks for itself, and the record of the hook is
        # what tells the next one that it must be taken off first.
        seen = verified(recorded)
        if seen != recorded:
            logger.error("domain %s: %s", name, seen.error)
        else:
            logger.info("domain %s: still %s", name, recorded.state)

    def _forget(self, name: str, xml: bytes) -> None:
        uuid = scan(xml).uuid
        if not uuid:
            return
        # Not under the feet of a session at work; it soon finds that QEMU is gone.
        with self._state.locked(uuid, deadline=time.monotonic() + _LOCK_S):
            self._state.remove(uuid)


def _reason(error: Exception) -> str:
    # libvirt puts its own words before ours, and OpenStack shows the first 255 bytes of
    # all: what is wrong must come before where it was written, and for which domain.
    text = str(error)
    if isinstance(error, PolicyError) and error.place:
        text = f"{error.message} ({error.place})"
    return " ".join(text.split())


def read_xml(fd: int = 0) -> bytes:
    """Return what libvirt writes to the hook's stdin, up to 64 MiB."""
    chunks = []
    size = 0
    while chunk := os.read(fd, 1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if size > _MAX_XML_LEN:
            raise PolicyError(f"the domain XML is longer than {_MAX_XML_LEN >> 20} MiB")
    return b"".join(chunks)


def _watch_detached(domain: Domain, policy: Policy) -> None:
    # A child of its own, since libvirt waits for us and for whatever holds our stderr.
    pid = os.fork()
    if pid:
        if os.waitpid(pid, 0)[1]:
            raise StateError("no process can be made to watch its start")
        return
    code = 1
    try:
        if os.fork():
            os._exit(0)
        hooklog.stop()
        worker.close_other_fds()
        hooklog.start()
        os.chdir("/")
        worker.become_worker()
        linux.set_process_title("kvmi-early")
        watch_start(domain, policy, state=StateDir())
        code = 0
    except KvmiLibvirtError as error:
        logger.error("domain %s: %s", domain.name, error)  # noqa: TRY400 - foreseen, one line
    except BaseException:
        logger.exception("domain %s: watching its start failed unexpectedly", domain.name)
    finally:
        os._exit(code)


def main(argv: list[str]) -> int:
    """Run one hook call; *argv* is the script's: name, operation, suboperation, extra."""
    # Whatever writes to stdout, now or in a later version: it must not reach libvirt.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    hooklog.start()
    if len(argv) < 2:
        return 0
    name, operation = argv[0], argv[1]
    try:
        veto = Hook(watch_start=_watch_detached).run(name, operation, read_xml())
    except Exception as error:
        # The process edge: libvirt must get an answer, the log the traceback. Not
        # VETO, so that the script decides by its own, simpler means.
        logger.exception("domain %s: %s failed unexpectedly", name, operation)
        print(f"kvmi-libvirt: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if veto is None:
        return 0
    print(veto, file=sys.stderr)
    return VETO


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
