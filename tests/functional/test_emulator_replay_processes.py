# SPDX-License-Identifier: Apache-2.0
"""The records of the real kernel that one VM and one tool cannot replay.

Other processes, several VMs, wrong fds, deaths: tests/data/emulator-kernel-replay-processes.jsonl
has them as they were recorded, this file plays each with processes that make real ioctls.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import pytest
from emulator_harness import (
    COMMAND_LINE,
    TIMEOUT_S,
    Emulated,
    feature,
    hook_argument,
    received,
    tool_pair,
)
from emulator_replay import as_revision, masks_of

from kvmi_libvirt.abi.kvmi import KVM_CHECK_EXTENSION, Ioctl, KvmiAbi
from kvmi_libvirt.abi.v11 import V11
from kvmi_libvirt.abi.v12 import V12

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from emulator_replay import Step
    from support import Tell

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp]

DATA = Path(__file__).parents[1] / "data" / "emulator-kernel-replay-processes.jsonl"
CLONE_VM = Path(__file__).parent / "victims" / "emulator_clone_vm.c"
RECORDED_CAPABILITY = 193
KVM_GET_API_VERSION = 0xAE00
UNKNOWN_IOCTL = 0xAEFF
TINY_GUEST = bytes.fromhex("b02ae60af4")  # mov al,42; out 10,al; hlt
RESET_VECTOR = 0xFFFFFFF0
COMMANDS_AND_EVENTS = {"commands": 4, "events": 6}


Comparisons: TypeAlias = "Iterator[tuple[str, object, object]]"
Player: TypeAlias = "Callable[[Scene, dict[str, Any]], Comparisons]"


class Replayed:
    """What was compared: how much, and what differed."""

    def __init__(self) -> None:
        self.count = 0
        self.differing: list[tuple[int, str, object, object]] = []

    def compare(self, record: dict[str, Any], what: str, recorded: object, answer: object) -> None:
        """Take note of one comparison."""
        self.count += 1
        if recorded != answer:
            self.differing.append((record["record"], what, recorded, answer))


def recorded_ioctl(record: dict[str, Any]) -> int | str:
    """Return an ioctl's recorded result as the victim tells one."""
    return record["errno"] or int(record["ret"])


def records(run: str, abi: KvmiAbi) -> Iterator[dict[str, Any]]:
    for line in DATA.read_text(encoding="ascii").splitlines():
        record: Step = json.loads(line)
        found = cast("dict[str, Any]", as_revision(record, abi))
        if found["run"] == run:
            yield found


class Scene:
    """A victim, its VMs and the tool's ends of their sockets."""

    def __init__(self, victim: Emulated, compile_victim: Callable[[Path], Path]) -> None:
        self.victim = victim
        self.compile_victim = compile_victim
        self.vm = victim.make_vm()
        self.other = -1
        self.tool: socket.socket | None = None
        self.kernel_end: socket.socket | None = None

    def close(self) -> None:
        for sock in (self.tool, self.kernel_end):
            if sock is not None:
                sock.close()
        self.tool = self.kernel_end = None

    def hook(self, vm: int, kernel_end: socket.socket) -> int | str:
        fd = self.victim.give(kernel_end)
        result = self.victim.ioctl(Ioctl.HOOK, vm, hook_argument(fd))
        self.victim.do("close", fd=fd)
        return result

    def hook_anew(self) -> int | str:
        self.close()
        self.vm = self.victim.make_vm()
        self.tool, self.kernel_end = tool_pair()
        return self.hook(self.vm, self.kernel_end)

    def tool_state(self) -> str:
        assert self.tool is not None
        try:
            return "eof" if self.tool.recv(1) == b"" else "data"
        except ConnectionResetError:
            return "eof"

    def exchange(self, sent: str, length: int) -> str:
        assert self.tool is not None
        self.tool.sendall(bytes.fromhex(sent))
        return received(self.tool, length).hex()

    def masks(self, groups: dict[str, list[int]], check_id: int) -> dict[str, list[int]]:
        def exchange(sent: bytes, length: int) -> bytes:
            return bytes.fromhex(self.exchange(sent.hex(), length))

        return masks_of(exchange, check_id, groups)

    def stranger_calls(self) -> dict[str, dict[str, Any]]:
        victim, vm = self.victim, self.vm
        plain = {"op": "ioctl", "fd": vm, "argument": 0}
        return {
            "COMMAND": victim.call(Ioctl.COMMAND, vm, feature(1, 8)),
            "COMMAND bad id": victim.call(Ioctl.COMMAND, vm, feature(1, 999)),
            "COMMAND bad pointer": {**plain, "request": victim.abi.request(Ioctl.COMMAND)},
            "EVENT": victim.call(Ioctl.EVENT, vm, feature(1, 0)),
            "PREUNHOOK": victim.call(Ioctl.PREUNHOOK, vm),
            "UNHOOK": victim.call(Ioctl.UNHOOK, vm),
            "HOOK": victim.call(Ioctl.HOOK, vm, hook_argument(-1)),
            "CHECK_EXTENSION": {
                **plain,
                "request": KVM_CHECK_EXTENSION,
                "argument": victim.abi.capability,
            },
            "unknown ioctl": {**plain, "request": UNKNOWN_IOCTL},
        }


# Each player makes the calls of a record and yields (what, as recorded, as answered).


def check_extension(scene: Scene, record: dict[str, Any]) -> Comparisons:
    fd = scene.victim.do("open_kvm") if "system" in record["op"] else scene.vm
    asked = record["args"]
    extension = scene.victim.abi.capability if asked == RECORDED_CAPABILITY else asked
    yield "", recorded_ioctl(record), scene.victim.check_extension(fd, extension)


def api_version(scene: Scene, record: dict[str, Any]) -> Comparisons:
    kvm = scene.victim.do("open_kvm")
    answer = scene.victim.do("ioctl", fd=kvm, request=KVM_GET_API_VERSION, argument=0)
    yield "", recorded_ioctl(record), answer


def set_region(scene: Scene, record: dict[str, Any]) -> Comparisons:
    # The page of the reset vector, for the guest of the next record.
    page = TINY_GUEST.rjust(0xFF0 + len(TINY_GUEST), b"\xf4").ljust(4096, b"\xf4")
    gpa = RESET_VECTOR & ~0xFFF
    address = scene.victim.do("add_memory", vm=scene.vm, gpa=gpa, data=page.hex())
    yield "", recorded_ioctl(record), 0 if isinstance(address, int) else address


def run_guest(scene: Scene, record: dict[str, Any]) -> Comparisons:
    vcpu = scene.victim.do("create_vcpu", vm=scene.vm, index=0)
    for run in record["runs"]:
        yield "", [run["ret"][0], run["exit_reason"]], scene.victim.do("run", vcpu=vcpu)


def wrong_fds(scene: Scene, record: dict[str, Any]) -> Comparisons:
    victim = scene.victim
    fds = {"dev_kvm": victim.do("open_kvm")}
    fds["vcpu"] = victim.do("create_vcpu", vm=victim.make_vm(), index=0)
    for kind, fd in fds.items():
        for name, result in record[kind].items():
            argument = "" if "UNHOOK" in name else "00" * 24
            answer = victim.ioctl(Ioctl[name], fd, argument)
            yield f"{name} on {kind}", recorded_ioctl(result), answer


def wrong_encodings(scene: Scene, record: dict[str, Any]) -> Comparisons:
    for request, result in record.items():
        if request.startswith("0x"):
            number = int(request, 16)
            answer = scene.victim.do("ioctl", fd=scene.vm, request=number, argument=0)
            yield request, recorded_ioctl(result), answer


def unreadable(scene: Scene, record: dict[str, Any]) -> Comparisons:
    answer = scene.victim.do(
        "ioctl_at_end_of_memory",
        fd=scene.vm,
        request=scene.victim.abi.request(Ioctl.COMMAND),
        argument=feature(1, 8),
        inside=0 if "exactly" in record["op"] else 4,
    )
    yield "", recorded_ioctl(record), answer


def hook(scene: Scene, record: dict[str, Any]) -> Comparisons:
    yield "", recorded_ioctl(record), hook_as_recorded(scene, record)


def unhook(scene: Scene, record: dict[str, Any]) -> Comparisons:
    # Two VMs are hooked on one socket: the second is unhooked first.
    vm, scene.other = (scene.vm if scene.other < 0 else scene.other), -1
    yield "", recorded_ioctl(record), scene.victim.ioctl(Ioctl.UNHOOK, vm)


def close_hooked_vm(scene: Scene, record: dict[str, Any]) -> Comparisons:
    assert scene.hook_anew() == 0
    yield from close_vm(scene, record)


def close_vm(scene: Scene, record: dict[str, Any]) -> Comparisons:
    scene.victim.do("close", fd=scene.vm)
    yield from tool_end(scene, record)


def tool_end(scene: Scene, record: dict[str, Any]) -> Comparisons:
    yield "", record["state"], scene.tool_state()


def message(scene: Scene, record: dict[str, Any]) -> Comparisons:
    yield "", record["got"], scene.exchange(record["sent"], len(record["got"]) // 2)


def masks(scene: Scene, record: dict[str, Any]) -> Comparisons:
    for kind, check_id in COMMANDS_AND_EVENTS.items():
        yield kind, record[kind], scene.masks(record[kind], check_id)


def command(scene: Scene, record: dict[str, Any]) -> Comparisons:
    argument = feature(record["args"]["allow"], record["args"]["id"])
    yield "", recorded_ioctl(record), scene.victim.ioctl(Ioctl.COMMAND, scene.vm, argument)


def lone_preunhook(scene: Scene, record: dict[str, Any]) -> Comparisons:
    shut_down = "shutdown" in record["op"]
    yield "", record["signal"], preunhook_of_a_process_of_its_own(scene.victim.abi, shut_down)


def own_process(scene: Scene, record: dict[str, Any]) -> Comparisons:
    assert scene.hook_anew() == 0
    yield from harmless_command(scene, record)


def harmless_command(scene: Scene, record: dict[str, Any]) -> Comparisons:
    answer = scene.victim.ioctl(Ioctl.COMMAND, scene.vm, feature(0, 8))
    yield "", recorded_ioctl(record), answer


def own_thread(scene: Scene, record: dict[str, Any]) -> Comparisons:
    call = scene.victim.call(Ioctl.COMMAND, scene.vm, feature(0, 8))
    yield "", [recorded_ioctl(record)], scene.victim.do("in_thread", call=call)


def clone_vm(scene: Scene, record: dict[str, Any]) -> Comparisons:
    result, differs = clone_vm_child(scene.victim.abi, scene.compile_victim(CLONE_VM))
    yield "", record["ret"], result
    yield "its pid", record["pid_differs"], differs


def stranger(how: str) -> Player:
    """Return the player of another process that has got the VM fd by *how*."""

    def play_stranger(scene: Scene, record: dict[str, Any]) -> Comparisons:
        calls = scene.stranger_calls()
        results = record["result"]
        if "ret" in results:  # of one call only
            results = {"COMMAND": results}
        results = {name: result for name, result in results.items() if name in calls}
        answers = scene.victim.do(how, calls=[calls[name] for name in results])
        for (name, result), answer in zip(results.items(), answers, strict=True):
            yield name, recorded_ioctl(result), answer[0] if isinstance(answer, list) else answer

    return play_stranger


PLAYERS: dict[str, Player] = {
    "KVM_GET_API_VERSION": api_version,
    "CHECK_EXTENSION(": check_extension,
    "SET_USER_MEMORY_REGION": set_region,
    "tiny VM": run_guest,
    "ioctls on the wrong fd": wrong_fds,
    "wrong ioctl encodings": wrong_encodings,
    "COMMAND struct": unreadable,
    "HOOK": hook,
    "UNHOOK": unhook,
    "VM fd closed while hooked": close_hooked_vm,
    "tool end after the VM is gone": close_vm,
    "tool end": tool_end,
    "MSG": message,
    "MASKS": masks,
    "COMMAND": command,
    "PREUNHOOK, subscribed": lone_preunhook,
    "same process": own_process,
    "thread (": own_thread,
    "fork()ed child": stranger("in_fork"),
    "another process, pidfd_getfd()": stranger("in_fork_with_pidfd"),
    "another process, SCM_RIGHTS": stranger("in_fork_with_scm_rights"),
    "clone(CLONE_VM)": clone_vm,
    "back in the VMM": harmless_command,
}
"""By how the record's "op" begins; the longest counts."""


def play(scene: Scene, record: dict[str, Any], replayed: Replayed) -> None:
    """Make the calls of one record and compare the answers."""
    begin = max((key for key in PLAYERS if record["op"].startswith(key)), key=len)
    for what, recorded, answered in PLAYERS[begin](scene, record):
        replayed.compare(record, what, recorded, answered)


def hook_as_recorded(scene: Scene, record: dict[str, Any]) -> int | str:
    """Make the HOOK of a record."""
    kind = record["args"]["fd"]
    if kind == "vm2, same socket":
        assert scene.hook_anew() == 0
        scene.other = scene.victim.make_vm()
        assert scene.kernel_end is not None
        return scene.hook(scene.other, scene.kernel_end)
    if kind == "netlink":
        scene.close()
        scene.vm = scene.victim.make_vm()
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
            return scene.hook(scene.vm, netlink)
    if "2nd HOOK" in kind:
        tool, kernel_end = tool_pair()
        with tool, kernel_end:
            return scene.hook(scene.vm, kernel_end)
    # "pair", of which the VMM closes its own fd after HOOK
    answer = scene.hook_anew()
    assert scene.kernel_end is not None
    scene.kernel_end.close()
    return answer


def preunhook_of_a_process_of_its_own(abi: KvmiAbi, shut_down: bool) -> int:
    """Return the signal that ended a process whose PREUNHOOK found its tool gone."""
    with Emulated(abi) as victim:
        vm = victim.make_vm()
        with victim.hook(vm) as tool:
            victim.do("sigpipe", is_ignored=False)
            assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 10)) == 0
            assert victim.ioctl(Ioctl.EVENT, vm, feature(1, 0)) == 0
            tool.sendall(struct.pack("<HHIHBBI", 10, 8, 5, 0, 1, 0, 0))
            assert received(tool, 16)[8:12] == bytes(4)
            if shut_down:
                tool.shutdown(socket.SHUT_RD)
            else:
                tool.close()
            victim.ask(**victim.call(Ioctl.PREUNHOOK, vm))
            return -victim.process.wait(TIMEOUT_S)


def clone_vm_child(abi: KvmiAbi, program: Path) -> tuple[int, bool]:
    """Return what COMMAND on a hooked VM gives such a child, and whether its pid differs."""
    requests = [hex(abi.request(ioctl)) for ioctl in (Ioctl.HOOK, Ioctl.COMMAND)]
    result = subprocess.run(
        [str(COMMAND_LINE), "emulate", "--abi", abi.name, "--", str(program), *requests],
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    answer, _, differs = map(int, result.stdout.split())
    return answer, bool(differs)


@pytest.mark.parametrize("run", ["main", "off"])
@pytest.mark.parametrize("abi", [V11, V12], ids=lambda abi: abi.name)
def test_recorded_kernel_when_replayed_by_several_processes_then_every_answer_is_equal(
    abi: KvmiAbi, run: str, compile_victim: Callable[[Path], Path], tell: Tell
) -> None:
    options = ["--fault", "introspection-off"] if run == "off" else []
    replayed = Replayed()
    with Emulated(abi, options=options) as victim:
        scene = Scene(victim, compile_victim)
        try:
            for record in records(run, abi):
                play(scene, record, replayed)
        finally:
            scene.close()

    assert replayed.differing == []
    assert replayed.count == {"main": 74, "off": 24}[run]
    tell(f"{replayed.count} steps of several processes compared, run {run}, KVMI {abi.name}")
