# SPDX-License-Identifier: Apache-2.0
"""Run a program on an emulated KVMI kernel: the launcher, and QEMU's wrapper.

The launcher starts a supervisor, puts the seccomp filter on itself, hands the
listener over and then *becomes* the program: same process id, same parent, same
fds, environment and signal mask. Until the supervisor has the listener and has
shown that it can do its work, nothing is executed.

libvirt also runs ``<emulator>`` to ask what it can do: start-up time counts, so
nothing large is imported here. Imports ``abi``, ``linux`` and the supervisor.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING, Final, NoReturn

from kvmi_libvirt import linux
from kvmi_libvirt.abi.seccomp import SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
from kvmi_libvirt.emulator.faults import NO_FAULTS, parse_faults
from kvmi_libvirt.emulator.filter import filter_program
from kvmi_libvirt.emulator.revisions import EMULATED, kernel_for
from kvmi_libvirt.emulator.trace import Trace
from kvmi_libvirt.errors import EmulatorError, ExitCode, KvmiLibvirtError
from kvmi_libvirt.newtypes import LocalFd, Pid, RemoteFd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmi_libvirt.abi.kvmi import KvmiAbi
    from kvmi_libvirt.abi.seccomp import sock_filter
    from kvmi_libvirt.emulator.faults import Faults
    from kvmi_libvirt.emulator.standby import OpenCalls

READY_TIMEOUT_S: Final = 10.0
"""How long the launcher waits for its supervisor before it gives up."""

DEFAULT_QEMU: Final = "/usr/bin/qemu-system-x86_64"
QEMU_VARIABLE: Final = "KVMI_QEMU"
FAULT_VARIABLE: Final = "KVMI_FAULT"
TRACE_DIRECTORY: Final = "/var/log/kvmi-libvirt"

_WRAPPER: Final = "kvmi-emulated-qemu"
# On the control socket the supervisor first says its pid, then that it serves; or why not.
_OK: Final = b"+"
_FAILED: Final = b"-"
_PID: Final = struct.Struct("i")
_LAUNCHER: Final = struct.Struct("ii")  # its pid, its fd of the control socket
_MESSAGE_LEN: Final = 4096
# As the wrapper notes a call: struct seccomp_notif, struct kvm_userspace_memory_region.
_NOTED: Final = struct.Struct("80s32s")


def launch(
    argv: Sequence[str],
    *,
    abi: KvmiAbi,
    trace: str | os.PathLike[str] | None,
    lazy_trace: bool = False,
    stand_in: bool = False,
    faults: Faults = NO_FAULTS,
) -> NoReturn:
    """Become *argv*, with the introspection ioctls of *abi* emulated.

    The process must have one thread. PR_SET_NO_NEW_PRIVS is set only when seccomp
    refuses without it, that is for an unprivileged user: set-uid helpers of the
    program then gain nothing. SIGPIPE is reset to its default action: Python
    changed it, and what it was before cannot be known.

    Parameters
        argv        program (found on PATH, as execvp does) and its arguments
        trace       file the supervisor appends to; None for none
        lazy_trace  make it when the first ioctl comes, or do without it
        stand_in    accept the stand-in's memfds as VM and vCPU fds
        faults      what shall go wrong
    Raises
        EmulatorError     the host cannot do it; nothing was executed.
        KvmiLibvirtError  there is no such program; nothing was executed.
        OSError           the trace file cannot be opened; nothing was executed. Or
                          execve(2) refused the program; then this process keeps a
                          filter and should end.
    """
    kernel_for(abi)
    program = find_program(argv[0])
    _check_kernel()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs, Trace(trace, lazy=lazy_trace) as trace_file:
            _fork_supervisor(theirs, abi, trace_file, stand_in=stand_in, faults=faults)
        ours.settimeout(READY_TIMEOUT_S)
        supervisor = Pid(_PID.unpack(_reply(ours))[0])
        try:
            linux.set_ptracer(supervisor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: no Yama here, nothing to allow
                raise EmulatorError(f"prctl(PR_SET_PTRACER): {error.strerror}") from error
        _hand_over_listener(ours, abi)
        _reply(ours)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execv(program, list(argv))  # noqa: S606 - becoming the program is the point


def find_program(name: str) -> str:
    """Return the path execvp(3) would execute for *name*.

    Raises
        KvmiLibvirtError  there is none, or this user may not execute it.
    """
    places = [name] if "/" in name else [f"{where}/{name}" for where in os.get_exec_path()]
    found = [path for path in places if os.path.isfile(path)]
    for path in found:
        if os.access(path, os.X_OK, effective_ids=True):
            return path
    if found:
        raise KvmiLibvirtError(f"{found[0]}: user id {os.geteuid()} may not execute it")
    hidden = [path for path in places if not _is_reachable(path)]
    if "/" in name and hidden:
        raise KvmiLibvirtError(f"{name}: user id {os.geteuid()} may not enter its directory")
    raise KvmiLibvirtError(f"{name}: command not found")


def _is_reachable(path: str) -> bool:
    try:
        os.stat(path)
    except PermissionError:
        return False
    except OSError:
        return True
    return True


def _check_kernel() -> None:
    try:
        linux.seccomp_notif_sizes()
    except OSError as error:
        raise EmulatorError(
            "this kernel cannot hand system calls to another process (seccomp user notification: "
            f"{error.strerror}); Linux 5.9 or later is needed"
        ) from error


# -- the supervisor's start ------------------------------------------------------------------


def _fork_supervisor(
    control: socket.socket, abi: KvmiAbi, trace: Trace, *, stand_in: bool, faults: Faults
) -> None:
    # Forked twice: the program must never see a child, or a SIGCHLD, it did not make.
    child = os.fork()
    if child == 0:
        try:
            if os.fork() == 0:
                _supervise(control, abi, trace, stand_in=stand_in, faults=faults)
        finally:
            os._exit(0)
    try:
        os.waitpid(child, 0)
    except ChildProcessError:  # SIGCHLD is ignored here, and stays so for the program
        pass


def _supervise(
    control: socket.socket, abi: KvmiAbi, trace: Trace, *, stand_in: bool, faults: Faults
) -> None:
    try:
        _detach(control, trace)
        _check_own_rights()
        control.send(_OK + _PID.pack(os.getpid()))
        data, fds, _, _ = socket.recv_fds(control, _LAUNCHER.size, 1)
        if not fds:  # the launcher gave up
            return
        listener = LocalFd(fds[0])
        launcher, control_fd = _LAUNCHER.unpack(data)
        _check_rights_on(Pid(launcher), RemoteFd(control_fd))
        # Here, not above: only the supervisor needs it.
        from kvmi_libvirt.emulator.standby import OpenCalls
        from kvmi_libvirt.emulator.supervisor import Supervisor

        calls = OpenCalls()
        _have_somebody_stand_by(listener, launcher, calls, trace)
        _rename(launcher)
        with Supervisor(
            listener, abi, trace, stand_in=stand_in, faults=faults, open_calls=calls
        ) as supervisor:
            control.send(_OK)
            control.close()
            supervisor.run()
    except Exception as error:
        trace.failure(f"the supervisor ended: {error!r}")
        _complain(control, str(error))


def take_over() -> None:
    """Go on as the supervisor that QEMU's wrapper has begun to be, in this very process.

    For ``scripts/kvmi-emulated-qemu``; returns when no task uses the filter any more. The
    arguments are the wrapper's name, the listener, the launcher's process id, the revision,
    in hex the notification that is to be answered first, if there is one, and a pipe to who
    stands by until we have somebody for that. Standard input has the calls that were let
    through, each with what it pointed to. What goes wrong
    before QEMU can be served is told in one line on standard error, which is QEMU's.
    """
    from kvmi_libvirt.emulator.standby import OpenCalls
    from kvmi_libvirt.emulator.supervisor import Supervisor

    name, listener_fd, launcher, revision, unanswered, first_standby = sys.argv[1:]
    listener = LocalFd(int(listener_fd))
    for fd in (listener, int(first_standby)):
        os.set_inheritable(fd, False)
    with open(0, "rb", closefd=False) as stdin:
        noted = stdin.read()
    _redirect(0, 1)
    _default_signals()
    calls = OpenCalls(bytes.fromhex(unanswered))
    with Trace(f"{TRACE_DIRECTORY}/emulator-{launcher}.jsonl", lazy=True) as trace:
        _have_somebody_stand_by(listener, int(launcher), calls, trace)
        _relieve(int(first_standby))
        try:
            _check_own_rights()
            abi = next(abi for abi in EMULATED if abi.name == revision)
            supervisor = Supervisor(listener, abi, trace, stand_in=False, open_calls=calls)
        except Exception as error:
            print(f"{name}: the emulator's supervisor ended: {error}", file=sys.stderr)
            return
        with supervisor:
            for notification, region in _NOTED.iter_unpack(noted):
                supervisor.remember(notification, region)
            if unanswered:
                supervisor.serve_received(bytes.fromhex(unanswered))
            _redirect(2)
            _rename(int(launcher))
            supervisor.run()


def _relieve(first_standby: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has been killed
        os.write(first_standby, _OK)
    os.close(first_standby)


def _have_somebody_stand_by(
    listener: LocalFd, launcher: int, open_calls: OpenCalls, trace: Trace
) -> None:
    # Before this process is called the supervisor: there must be one of that name.
    from kvmi_libvirt.emulator.standby import stand_by

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombie, whenever a child ends
    try:
        title = f"kvmi-emulator's stand-by for process {launcher}"
        stand_by(listener, open_calls, title=title)
    except OSError as error:
        trace.failure(f"nobody stands by: {error!r}")


def _detach(control: socket.socket, trace: Trace) -> None:
    os.setsid()
    os.chdir("/")
    # Whoever waits for the end of a pipe that QEMU inherits must not wait for us.
    _redirect(0, 1, 2)
    kept = {0, 1, 2, control.fileno(), trace.fd}
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in kept:
            try:
                os.close(fd)
            except OSError:  # the listing's own
                pass
    _default_signals()


def _redirect(*fds: int) -> None:
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in fds:
        os.dup2(null, fd)
    os.close(null)


def _default_signals() -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_DFL)
        except OSError:  # reserved by the C library
            pass
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _check_own_rights() -> None:
    # What some container runtimes forbid; better said now than in the middle of a VM's life.
    us = Pid(os.getpid())
    pidfd = LocalFd(os.pidfd_open(us))
    try:
        os.close(linux.pidfd_getfd(pidfd, RemoteFd(0)))
        linux.kcmp(linux.KCMP_VM, us, us)
    finally:
        os.close(pidfd)


def _check_rights_on(launcher: Pid, fd: RemoteFd) -> None:
    pidfd = LocalFd(os.pidfd_open(launcher))
    try:
        os.close(linux.pidfd_getfd(pidfd, fd))
    except PermissionError as error:
        raise EmulatorError(
            "its supervisor may not look into the program it serves "
            "(see /proc/sys/kernel/yama/ptrace_scope, and the security module's log)"
        ) from error
    finally:
        os.close(pidfd)


def _rename(launcher: int) -> None:
    # Still the launcher's command line, QEMU's -uuid included: nobody must find two of it.
    linux.set_process_title(f"kvmi-emulator for process {launcher}")
    with open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write("kvmi-emulator")


def _complain(control: socket.socket, text: str) -> None:
    try:
        control.send(_FAILED + text.encode())
    except OSError:  # handed over long ago, or the launcher is gone
        pass


# -- the launcher's side ---------------------------------------------------------------------


def _reply(control: socket.socket) -> bytes:
    try:
        data = control.recv(_MESSAGE_LEN)
    except TimeoutError as error:
        raise EmulatorError(
            f"the emulator's supervisor did not come up within {READY_TIMEOUT_S:.0f} s"
        ) from error
    except OSError as error:
        raise EmulatorError(f"the emulator's supervisor is gone: {error.strerror}") from error
    if data.startswith(_FAILED):
        reason = data[len(_FAILED) :].decode(errors="replace")
        raise EmulatorError(f"the emulator's supervisor cannot work here: {reason}")
    if not data.startswith(_OK):
        raise EmulatorError("the emulator's supervisor ended before it was ready")
    return data[len(_OK) :]


def _hand_over_listener(control: socket.socket, abi: KvmiAbi) -> None:
    listener = _install_filter(abi)
    try:
        socket.send_fds(control, [_LAUNCHER.pack(os.getpid(), control.fileno())], [listener])
    except OSError as error:
        raise EmulatorError(f"the emulator's supervisor is gone: {error.strerror}") from error
    finally:
        os.close(listener)


def _install_filter(abi: KvmiAbi) -> LocalFd:
    program = filter_program(abi)
    try:
        try:
            return _new_listener(program)
        except PermissionError:
            linux.set_no_new_privs()
            return _new_listener(program)
    except OSError as error:
        if error.errno == errno.EBUSY:
            why = "another program supervises our system calls already; filters cannot be nested"
        else:
            why = f"seccomp refused the filter: {error.strerror}"
        raise EmulatorError(why) from error


def _new_listener(program: Sequence[sock_filter]) -> LocalFd:
    try:
        # A call that was received is then completed before any signal is: no HOOK
        # is done twice, and none gets lost half-way.
        return linux.seccomp_new_listener(program, SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: before Linux 5.19
            raise
        return linux.seccomp_new_listener(program)


# -- QEMU's wrapper --------------------------------------------------------------------------


def emulated_qemu() -> int:
    """Be QEMU on an emulated KVMI kernel, where the wrapper cannot do it more quickly.

    Runs $KVMI_QEMU or the distribution's QEMU with the arguments it got; the revision is
    the suffix of its own name ("-v11", "-v7"), v12 without. $KVMI_FAULT is a
    comma-separated list of faults. Returns only when it failed, with one line on
    stderr: the exit code.
    """
    name = os.path.basename(sys.argv[0])
    try:
        launch(
            [os.environ.get(QEMU_VARIABLE) or DEFAULT_QEMU, *sys.argv[1:]],
            abi=wrapper_abi(name),
            trace=f"{TRACE_DIRECTORY}/emulator-{os.getpid()}.jsonl",
            lazy_trace=True,
            faults=parse_faults(filter(None, os.environ.get(FAULT_VARIABLE, "").split(","))),
        )
    except KvmiLibvirtError as error:
        code, text = error.exit_code, str(error)
    except OSError as error:
        code, text = ExitCode.FAILED, f"{error.filename or 'execve'}: {error.strerror}"
    print(f"{name}: {text}", file=sys.stderr)
    return code


def wrapper_abi(name: str) -> KvmiAbi:
    """Return the revision a wrapper of this name emulates: the newest, or its suffix's.

    Raises
        EmulatorError  it has a suffix that is no revision.
    """
    if not name.startswith(f"{_WRAPPER}-"):
        return EMULATED[0]
    suffix = name.removeprefix(f"{_WRAPPER}-")
    for abi in EMULATED:
        if abi.name == suffix:
            return abi
    raise EmulatorError(f"{suffix} is no KVMI revision the emulator knows")
