# SPDX-License-Identifier: Apache-2.0
"""The probe on a real unix socket, with fake VMs that behave and some that do not."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fake_kvmi import FakeKernel, FakeVm, hello_bytes

from kvmi_libvirt.errors import (
    HandshakeProtocolError,
    HandshakeRefused,
    HandshakeTimeout,
    KvmiLibvirtError,
)
from kvmi_libvirt.tool import probe as probe_module
from kvmi_libvirt.tool import wire
from kvmi_libvirt.tool.inquiry import Pace, ProbeResult, Verdict
from kvmi_libvirt.tool.probe import Manner, Probe, listen_unix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACE = Pace(timeout_s=20.0, settle_s=0.05, interval_s=0.005, watch_interval_s=0.01)


@pytest.fixture
def place() -> Iterator[str]:
    """Return a socket path that is short enough, in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="kvmi-") as directory:
        yield f"{directory}/tool.sock"


class Serving:
    """A Probe at a path, what it reported and complained about, and its brake."""

    def __init__(self, place: str, manner: Manner) -> None:
        self.results: list[ProbeResult] = []
        self.complaints: list[str] = []
        self.on_result: Callable[[ProbeResult], None] = lambda result: None
        self.on_complaint: Callable[[], None] = lambda: None
        self._stop, self._brake = socket.socketpair()
        self._place = place
        self._manner = manner
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Serving:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._stop)
            stack.enter_context(self._brake)
            self._listener = stack.enter_context(listen_unix(self._place))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def stop(self) -> None:
        """Make run() return."""
        self._brake.sendall(b"x")

    def run(self) -> bool:
        """Serve in this thread."""
        probe = Probe(
            self._listener,
            stop=self._stop,
            report=self._report,
            complain=self._complain,
            manner=self._manner,
        )
        return probe.run()

    def _report(self, result: ProbeResult) -> None:
        self.results.append(result)
        self.on_result(result)

    def _complain(self, error: KvmiLibvirtError) -> None:
        self.complaints.append(str(error))
        self.on_complaint()


@contextlib.contextmanager
def client(place: str, data: bytes = b"") -> Iterator[socket.socket]:
    """Return a socket connected to the probe that has sent *data*."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(20)
        sock.connect(place)
        sock.sendall(data)
        yield sock


def read_allowed(result: ProbeResult) -> bool:
    """Say whether READ_PHYSICAL is allowed."""
    return result.commands["KVMI_VM_READ_PHYSICAL"] is Verdict.ALLOWED


def test_listen_unix_when_done_then_the_socket_is_gone(place: str) -> None:
    with listen_unix(place) as sock:
        mode = os.stat(place).st_mode
        assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)
        assert not sock.getblocking()

    assert not os.path.lexists(place)


def test_listen_unix_when_the_block_raises_then_the_socket_is_gone(place: str) -> None:
    with pytest.raises(RuntimeError), listen_unix(place):
        raise RuntimeError

    assert not os.path.lexists(place)


def test_listen_unix_when_a_stale_socket_is_there_then_replaced(place: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(place)
        stale.listen()

    with listen_unix(place), client(place):
        pass


def test_listen_unix_when_somebody_listens_then_refused_and_left(place: str) -> None:
    with listen_unix(place):
        with pytest.raises(KvmiLibvirtError, match="another process listens there"):
            listen_unix(place).__enter__()

        with client(place):
            pass


def test_listen_unix_when_the_listener_is_too_busy_to_accept_then_refused(place: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as busy, contextlib.ExitStack() as stack:
        busy.bind(place)
        busy.listen(0)
        stack.enter_context(client(place))

        with pytest.raises(KvmiLibvirtError, match="another process listens there"):
            listen_unix(place).__enter__()
        assert os.path.lexists(place)


def test_listen_unix_when_a_datagram_socket_is_there_then_refused(place: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(place)

        with pytest.raises(KvmiLibvirtError, match="another process listens there"):
            listen_unix(place).__enter__()


def test_listen_unix_when_a_file_is_there_then_refused_and_left(place: str) -> None:
    Path(place).write_text("precious", encoding="ascii")

    with pytest.raises(KvmiLibvirtError, match="it exists and is not a socket"):
        listen_unix(place).__enter__()
    assert Path(place).read_text(encoding="ascii") == "precious"


def test_listen_unix_when_directory_is_missing_then_refused(place: str) -> None:
    with pytest.raises(KvmiLibvirtError, match="its directory does not exist"):
        listen_unix(f"{place}.d/tool.sock").__enter__()
    assert not os.path.lexists(f"{place}.d")


def test_listen_unix_when_it_is_our_own_directory_then_made(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = f"{place}.d"
    monkeypatch.setattr(probe_module, "_OWN_DIRECTORY", own)
    for _ in range(2):
        with listen_unix(f"{own}/tool.sock"):
            pass

    assert stat.S_IMODE(os.stat(own).st_mode) & 0o022 == 0


def test_listen_unix_when_path_is_too_long_then_refused(place: str) -> None:
    with pytest.raises(KvmiLibvirtError, match=r"cannot listen on unix:.*too long"):
        listen_unix(place + "x" * 108).__enter__()


def test_listen_unix_when_another_took_the_place_then_it_is_left(place: str) -> None:
    with listen_unix(place):
        os.unlink(place)
        Path(place).touch()

    assert Path(place).exists()


def test_once_when_a_vm_connects_then_its_rights_and_the_end(place: str) -> None:
    with (
        Serving(place, Manner(pace=PACE, once=True)) as serving,
        FakeVm(place, FakeKernel(commands={12}, events={5})) as vm,
    ):
        done = serving.run()
        vm.join()

    assert done
    assert [(result.name, read_allowed(result)) for result in serving.results] == [("db1", True)]
    assert vm.answer == b"\x18\0\0\0" + bytes(20)


def test_once_when_rights_come_while_it_asks_then_the_settled_state(place: str) -> None:
    def grant_later(kernel: FakeKernel) -> None:
        if kernel.rounds == 3:
            kernel.commands.add(12)

    with (
        Serving(place, Manner(pace=PACE, once=True)) as serving,
        FakeVm(place, FakeKernel(), before=grant_later),
    ):
        serving.run()

    assert [read_allowed(result) for result in serving.results] == [True]


def test_once_when_another_connection_is_silent_then_it_holds_up_nothing(place: str) -> None:
    with (
        Serving(place, Manner(pace=PACE, once=True)) as serving,
        client(place) as silent,
        FakeVm(place, FakeKernel(commands={12})),
    ):
        told: list[bytes] = []
        serving.on_result = lambda _: told.append(silent.recv(1))
        serving.run()

    assert told == [b""]  # before the VM was through


def test_once_when_somebody_only_looks_then_the_vm_is_still_served(place: str) -> None:
    with Serving(place, Manner(pace=PACE, once=True)) as serving:
        with client(place):
            pass
        with FakeVm(place, FakeKernel()):
            assert serving.run()

    assert len(serving.results) == 1


def test_once_when_a_vm_is_served_then_no_other_can_connect(place: str) -> None:
    with Serving(place, Manner(pace=PACE, once=True)) as serving, FakeVm(place, FakeKernel()):
        outcome: list[str] = []

        def connect_again(_: ProbeResult) -> None:
            with pytest.raises(ConnectionRefusedError), client(place):
                pass
            outcome.append("refused")

        serving.on_result = connect_again
        serving.run()

    assert outcome == ["refused"]


@pytest.mark.parametrize("length", [1, 50, 104])
def test_once_when_the_vm_closes_mid_way_then_refused(place: str, length: int) -> None:
    with Serving(place, Manner(pace=PACE, once=True)) as serving:
        with client(place, hello_bytes()[:length]):
            pass
        with pytest.raises(HandshakeRefused, match="closed the connection"):
            serving.run()


def test_once_when_the_kernel_goes_while_answering_then_refused(place: str) -> None:
    with (
        Serving(place, Manner(pace=PACE, once=True)) as serving,
        FakeVm(place, FakeKernel()) as vm,
    ):

        def go_away(kernel: FakeKernel) -> None:
            if kernel.rounds == 1:
                vm.sock.shutdown(socket.SHUT_RDWR)

        vm.before = go_away
        with pytest.raises(HandshakeRefused, match="before it had answered everything"):
            serving.run()


def test_once_when_garbage_comes_then_protocol_error(place: str) -> None:
    with (
        Serving(place, Manner(pace=PACE, once=True)) as serving,
        client(place, b"GET / HTTP/1.1\r\n"),
        pytest.raises(HandshakeProtocolError, match=rf"connection from pid {os.getpid()}: "),
    ):
        serving.run()


@pytest.mark.parametrize(
    ("said", "match"), [(b"", "no whole hello"), (hello_bytes(), "VM db1: it was not hooked")]
)
def test_once_when_the_vm_falls_silent_then_timeout(place: str, said: bytes, match: str) -> None:
    with (
        Serving(place, Manner(pace=Pace(timeout_s=0.1), once=True)) as serving,
        client(place, said),
        pytest.raises(HandshakeTimeout, match=f"{match}.* within 0.1 s"),
    ):
        serving.run()


def test_once_when_no_vm_comes_then_timeout(place: str) -> None:
    with (
        Serving(place, Manner(pace=PACE, once=True, wait_s=0.1)) as serving,
        pytest.raises(HandshakeTimeout, match=r"no VM introduced itself within 0\.1 s"),
    ):
        serving.run()


def test_once_when_stopped_before_a_result_then_not_done(place: str) -> None:
    with Serving(place, Manner(pace=PACE, once=True)) as serving:
        serving.stop()

        assert not serving.run()


def test_hold_when_result_is_out_then_the_channel_lives_until_the_vm_closes(place: str) -> None:
    with (
        Serving(place, Manner(pace=PACE, once=True, hold=True)) as serving,
        FakeVm(place, FakeKernel()) as vm,
    ):
        events: list[str] = []

        def close_vm(_: ProbeResult) -> None:
            events.append("result")
            vm.sock.shutdown(socket.SHUT_RDWR)

        serving.on_result = close_vm

        assert serving.run()
        assert events == ["result"]


def test_hold_when_stopped_after_the_result_then_done(place: str) -> None:
    with (
        Serving(place, Manner(pace=PACE, once=True, hold=True)) as serving,
        FakeVm(place, FakeKernel()),
    ):
        serving.on_result = lambda _: serving.stop()

        assert serving.run()


def test_hold_when_the_kernel_asks_to_leave_then_the_channel_is_closed(place: str) -> None:
    with (
        Serving(place, Manner(pace=PACE, once=True, hold=True)) as serving,
        FakeVm(place, FakeKernel()) as vm,
    ):
        unhook = bytes.fromhex("00000800010000000000000000000000")
        serving.on_result = lambda _: vm.sock.sendall(unhook)

        assert serving.run()
        vm.join()


def test_serving_when_many_come_then_each_is_served_and_kept(place: str) -> None:
    names = ["db1", "db2", "db3"]
    with contextlib.ExitStack() as stack:
        serving = stack.enter_context(Serving(place, Manner(pace=PACE)))
        stack.enter_context(client(place))
        stack.enter_context(client(place, b"garbage!"))
        vms = [
            stack.enter_context(FakeVm(place, FakeKernel(), hello=hello_bytes(name=name)))
            for name in names
        ]
        alive: list[bool] = []

        def stop_when_all_are_there(_: ProbeResult) -> None:
            if len(serving.results) == len(names):
                alive.extend(vm._thread.is_alive() for vm in vms)
                serving.stop()

        serving.on_result = stop_when_all_are_there
        done = serving.run()

    assert done
    assert sorted(result.name for result in serving.results) == names
    assert alive == [True, True, True]
    assert len(serving.complaints) == 1
    assert "announces" in serving.complaints[0]


def test_serving_when_one_fails_then_the_next_is_served(place: str) -> None:
    with Serving(place, Manner(pace=PACE)) as serving:
        with client(place, hello_bytes()):
            pass
        with FakeVm(place, FakeKernel(), hello=hello_bytes(name="db2")):
            serving.on_result = lambda _: serving.stop()
            serving.run()

    assert [result.name for result in serving.results] == ["db2"]
    assert serving.complaints == [
        "VM db1: closed the connection after the handshake: it was not hooked"
    ]


def test_serving_when_too_many_come_then_the_rest_waits(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "CONNECTIONS_MAX", 2)
    with contextlib.ExitStack() as stack:
        serving = stack.enter_context(Serving(place, Manner(pace=PACE)))
        silent = [stack.enter_context(client(place)) for _ in range(2)]
        stack.enter_context(FakeVm(place, FakeKernel()))
        serving.on_result = lambda _: serving.stop()
        # Room only comes when one of the two goes.
        silent[0].shutdown(socket.SHUT_RDWR)
        serving.run()

    assert len(serving.results) == 1


def test_watch_when_rights_change_then_reported_again(place: str) -> None:
    kernel = FakeKernel(commands={12})
    with (
        Serving(place, Manner(pace=PACE, once=True, watch=True)) as serving,
        FakeVm(place, kernel) as vm,
    ):

        def change(_: ProbeResult) -> None:
            if len(serving.results) == 1:
                kernel.commands.discard(12)
            else:
                vm.sock.shutdown(socket.SHUT_RDWR)

        serving.on_result = change

        assert serving.run()
    assert [read_allowed(result) for result in serving.results] == [True, False]


def test_serving_when_questions_do_not_fit_the_buffer_then_the_rest_follows(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel ignores what is beyond a question's 8 bytes; so they may be long.
    monkeypatch.setattr(wire, "pack_check", lambda id_: struct.pack("<H6x8000x", id_))
    with (
        Serving(place, Manner(pace=PACE, once=True)) as serving,
        FakeVm(place, FakeKernel(commands={12})),
    ):
        serving.run()

    assert [read_allowed(result) for result in serving.results] == [True]


def test_run_when_report_raises_then_everything_is_closed(place: str) -> None:
    with (
        Serving(place, Manner(pace=PACE)) as serving,
        client(place) as other,
        FakeVm(place, FakeKernel()) as vm,
    ):

        def fail(_: ProbeResult) -> None:
            raise BrokenPipeError

        serving.on_result = fail
        with pytest.raises(BrokenPipeError):
            serving.run()
        vm.join()

        assert other.recv(1) == b""
