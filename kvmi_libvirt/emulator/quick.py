# SPDX-License-Identifier: Apache-2.0
"""QEMU's wrapper: become QEMU on an emulated kernel before much of Python is loaded.

What ``launch`` does, in the order in which nobody waits: the supervisor loads its
modules while this process already becomes QEMU, whose first KVM ioctl waits for it
if need be. So only what a start needs is imported here, and the filters lie ready.
``launch`` is the careful one: it executes nothing before its supervisor works. Here
a supervisor that cannot work says so on QEMU's stderr, and QEMU fails to make a VM.

Imports ``linux`` and ``abi.seccomp`` after the supervisor was forked, ``launch`` in the
supervisor and on the way to an error message.
"""

import _signal  # type: ignore[import-not-found]  # not "signal": that loads "enum"
import _socket
import os
import sys

DEFAULT_QEMU = "/usr/bin/qemu-system-x86_64"
TRACE_DIRECTORY = "/var/log/kvmi-libvirt"
FAULT_VARIABLE = "KVMI_FAULT"
WRAPPER = "kvmi-emulated-qemu"

# filter_program() of each revision, as the kernel takes it; a test compares them.
FILTERS = {
    "v12": (
        "2000000004000000150000113e0000c020000000000000001500000f100000002000000018000000"
        "15000e00c8ae184015000d00c9ae000015000c00ccae000015000b00caae084015000a00cbae0840"
        "1500090001ae00001500080041ae00001500070046ae20401500060049aea0401500000403ae0000"
        "20000000240000001500000200000000200000002000000015000100ce000000060000000000ff7f"
        "060000000000c07f"
    ),
    "v11": (
        "2000000004000000150000123e0000c0200000000000000015000010100000002000000018000000"
        "15000f00c8ae184015000e00c9ae000015000d00ccae000015000c00caae084015000b00cbae0840"
        "15000a0001ae00001500090041ae00001500080046ae20401500070049aea0401500000503ae0000"
        "20000000240000001500000300000000200000002000000015000200c100000015000100ce000000"
        "060000000000ff7f060000000000c07f"
    ),
    "v7": (
        "2000000004000000150000113e0000c020000000000000001500000f100000002000000018000000"
        "15000e00ffae184015000d00fbae000015000c00feae000015000b00fdae084015000a00fcae0840"
        "1500090001ae00001500080041ae00001500070046ae20401500060049aea0401500000403ae0000"
        "20000000240000001500000200000000200000002000000015000100b4000000060000000000ff7f"
        "060000000000c07f"
    ),
}
DEFAULT_REVISION = "v12"

_EINVAL, _EBUSY = 22, 16


def emulated_qemu() -> int:
    """Be QEMU on an emulated KVMI kernel: the ``kvmi-emulated-qemu`` scripts.

    For libvirt's ``<emulator>``. Runs $KVMI_QEMU or the distribution's QEMU with the
    arguments it got; the revision is the suffix of its own name ("-v11", "-v7"), v12
    without. $KVMI_FAULT is a comma-separated list of faults. Returns only when it
    failed, with one line on stderr: the exit code.
    """
    name = os.path.basename(sys.argv[0])
    revision = name[len(WRAPPER) + 1 :] or DEFAULT_REVISION
    qemu = os.environ.get("KVMI_QEMU") or DEFAULT_QEMU
    is_program = "/" in qemu and os.path.isfile(qemu) and os.access(qemu, os.X_OK)
    if revision not in FILTERS or os.environ.get(FAULT_VARIABLE) or not is_program:
        from kvmi_libvirt.emulator.launch import emulated_qemu as careful

        return careful()
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    supervisor = _fork_supervisor(ours, theirs, revision, name)
    theirs.close()
    reason = _filter(FILTERS[revision], supervisor, ours)
    if reason is None:
        _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
        _signal.signal(_signal.SIGXFSZ, _signal.SIG_DFL)
        try:
            os.execv(qemu, [qemu, *sys.argv[1:]])  # noqa: S606 - becoming it is the point
        except OSError as error:
            print(f"{name}: {qemu}: {error.strerror}", file=sys.stderr)
            return 1
    ours.close()  # the supervisor ends by that
    print(f"{name}: {reason}", file=sys.stderr)
    return 4


def _fork_supervisor(ours: _socket.socket, theirs: _socket.socket, revision: str, name: str) -> int:
    # Forked twice: QEMU must never see a child it did not make.
    launcher = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            supervisor = os.fork()
            if supervisor == 0:
                _supervise(theirs, revision, launcher, name)
            else:
                theirs.send(b"%d" % supervisor)
        finally:
            os._exit(0)
    number = int(ours.recv(32))
    try:
        os.waitpid(child, 0)
    except ChildProcessError:  # SIGCHLD is ignored here, and stays so for QEMU
        pass
    return number


def _supervise(control: _socket.socket, revision: str, launcher: int, name: str) -> None:
    # Until the supervisor serves, what goes wrong is told where QEMU's messages go.
    stderr = os.dup(2)
    try:
        import gc

        gc.disable()  # all that the modules make stays
        from kvmi_libvirt.emulator.launch import supervise_quickly

        gc.enable()

        supervise_quickly(
            control.detach(),
            revision,
            launcher,
            trace=f"{TRACE_DIRECTORY}/emulator-{launcher}.jsonl",
            stderr=stderr,
        )
    except BaseException as error:
        os.write(stderr, f"{name}: the emulator's supervisor ended: {error}\n".encode())


def _filter(program: str, supervisor: int, control: _socket.socket) -> str | None:
    # Put the filter on this process, hand the listener over; return why not.
    from kvmi_libvirt import linux
    from kvmi_libvirt.abi.seccomp import SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, sock_filter
    from kvmi_libvirt.newtypes import Pid

    raw = bytes.fromhex(program)
    steps = [sock_filter.from_buffer_copy(raw[i : i + 8]) for i in range(0, len(raw), 8)]
    flags = SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    may_gain_privileges = True
    try:
        linux.set_ptracer(Pid(supervisor))
    except OSError:  # no Yama here: nothing to allow
        pass
    while True:
        try:
            listener = linux.seccomp_new_listener(steps, flags)
            break
        except OSError as error:
            if isinstance(error, PermissionError) and may_gain_privileges:
                may_gain_privileges = False
                linux.set_no_new_privs()
            elif error.errno == _EINVAL and flags:  # before Linux 5.19
                flags = 0
            elif error.errno == _EBUSY:
                return "another program supervises our system calls already; no nesting"
            else:
                return f"seccomp refused the filter: {error.strerror}"
    rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, listener.to_bytes(4, "little"))
    try:
        control.sendmsg([b"l"], [rights])
    except OSError as error:
        return f"the emulator's supervisor is gone: {error.strerror}"
    os.close(listener)
    return None
