# SPDX-License-Identifier: Apache-2.0
"""An introspection tool that takes every VM that comes, and keeps it: for tests of scale.

    python patient_tool.py SOCKET [SECONDS]

listens, shakes hands with any number of VMs and holds their channels open. It is told what to do
by JSON lines on its standard input, and ends with it; :class:`PatientTool` is the other
end. One thread, nothing done while nothing happens.
"""

from __future__ import annotations

import asyncio
import collections
import json
import struct
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import HandshakeProtocolError
from kvmi_libvirt.tool.handshake import Hello, HelloReader, pack_answer
from kvmi_libvirt.tool.probe import listen_unix
from kvmi_libvirt.tool.wire import (
    UNHOOK_EVENT,
    Message,
    MessageReader,
    WireError,
    decode_reply,
    pack_check,
    pack_message,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_BACKLOG: Final = 4096
_CHECK_COMMAND: Final = 4
_CHECK_EVENT: Final = 6
_CONTROL_EVENTS: Final = V12.commands_by_name["KVMI_VM_CONTROL_EVENTS"].id
_CONTROL: Final = struct.Struct("<HBBI")  # event, enable, two paddings


class PatientTool:
    """A running patient tool. Use it with ``with``.

    Parameters
        path            where it listens, before this returns; /run/kvmi/tool.sock for example
        answer_after_s  seconds it takes for its part of the handshake
    """

    def __init__(self, path: Path, *, answer_after_s: float = 0.0) -> None:
        command = [sys.executable, __file__, str(path), str(answer_after_s)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def __enter__(self) -> PatientTool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it: every VM's channel closes. Idempotent."""
        self.process.communicate()

    def connected(self) -> list[str]:
        """Return the UUIDs of the VMs it has, in the order in which they came."""
        found: list[str] = self._ask(op="connected")
        return found

    def wait(self, *, at_least: int = 0, at_most: int | None = None, timeout_s: float) -> int:
        """Wait until it has so many VMs; return how many it has then, or at the timeout."""
        found: int = self._ask(op="wait", low=at_least, high=at_most, timeout_s=timeout_s)
        return found

    def check(
        self, domain_uuid: str, *, commands: Sequence[int] = (), events: Sequence[int] = ()
    ) -> list[int | None]:
        """Ask the kernel what this tool may do with a VM, in v11 or v12.

        Returns
            the error numbers of CHECK_COMMAND and CHECK_EVENT, in turn: 0 is allowed, 1
            KVM_EPERM; None for each where the channel is closed
        """
        asked = [(_CHECK_COMMAND, id_) for id_ in commands]
        asked += [(_CHECK_EVENT, id_) for id_ in events]
        found: list[int | None] = self._ask(op="check", uuid=domain_uuid, asked=asked)
        return found

    def subscribe(self, domain_uuid: str, *, lets_go: bool) -> int | None:
        """Ask the kernel to be told when the VM is to be let go, and close its channel then or not.

        Returns
            the error number of CONTROL_EVENTS; None when the channel is closed
        """
        found: int | None = self._ask(op="subscribe", uuid=domain_uuid, lets_go=lets_go)
        return found

    def asked(self, domain_uuid: str) -> int:
        """Return how often the tool was asked to let go of a VM, on all its channels."""
        found: int = self._ask(op="asked", uuid=domain_uuid)
        return found

    def drop(self, domain_uuid: str | None = None) -> int:
        """Close the channel of one VM, or of all; return how many it closed."""
        found: int = self._ask(op="drop", uuid=domain_uuid)
        return found

    def _ask(self, **request: object) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the tool has ended")
        return json.loads(line)


# -- the program -----------------------------------------------------------------------------


class _Channel(asyncio.Protocol):
    def __init__(self, tool: _Tool) -> None:
        self._tool = tool
        self._hello = HelloReader()
        self._messages: MessageReader | None = None
        self._waiting: list[asyncio.Future[Message | None]] = []
        self.lets_go = False
        self.vm: Hello | None = None
        self.transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            while self._messages is None and data:
                wanted = self._hello.wanted()
                self._take_hello(self._hello.feed(data[:wanted]))
                data = data[wanted:]
            self._take_messages(data)
        except (HandshakeProtocolError, WireError):
            self.close()

    def _take_hello(self, hello: Hello | None) -> None:
        if hello is not None:
            assert self.transport is not None
            self.vm = hello
            self._messages = MessageReader()
            asyncio.get_running_loop().call_later(self._tool.answer_after_s, self._answer)

    def _answer(self) -> None:
        assert self.transport is not None
        if not self.transport.is_closing():
            self.transport.write(pack_answer())
            self._tool.came(self)

    def _take_messages(self, data: bytes) -> None:
        if self._messages is None:
            return
        self._messages.feed(data)
        while (message := self._messages.take()) is not None:
            if message.id == UNHOOK_EVENT:
                assert self.vm is not None
                self._tool.asked_to_leave(str(self.vm.uuid))
                if self.lets_go:
                    self.close()
            elif self._waiting:
                self._waiting.pop(0).set_result(message)

    def connection_lost(self, _error: Exception | None) -> None:
        for future in self._waiting:
            future.set_result(None)
        self._waiting.clear()
        self._tool.went(self)

    def close(self) -> None:
        assert self.transport is not None
        self.transport.close()

    async def check(self, command: int, asked: int) -> int | None:
        return await self._call(command, pack_check(asked))

    async def subscribe(self) -> int | None:
        return await self._call(_CONTROL_EVENTS, _CONTROL.pack(UNHOOK_EVENT, 1, 0, 0))

    async def _call(self, command: int, payload: bytes) -> int | None:
        assert self.transport is not None
        if self.transport.is_closing():
            return None
        future: asyncio.Future[Message | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self.transport.write(pack_message(command, 0, payload))
        message = await future
        return None if message is None else decode_reply(message, id=command, seq=0).error


class _Tool:
    def __init__(self, answer_after_s: float) -> None:
        self.answer_after_s = answer_after_s
        self._channels: list[_Channel] = []
        self._asked: collections.Counter[str] = collections.Counter()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    def came(self, channel: _Channel) -> None:
        self._channels.append(channel)
        self._tell()

    def went(self, channel: _Channel) -> None:
        if channel in self._channels:
            self._channels.remove(channel)
            self._tell()

    def asked_to_leave(self, domain_uuid: str) -> None:
        self._asked[domain_uuid] += 1

    def _tell(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.get_running_loop().create_task(notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def do(self, request: dict[str, Any]) -> object:
        actions: dict[str, Callable[..., Any]] = {
            "connected": self._connected,
            "wait": self._wait,
            "check": self._check,
            "subscribe": self._subscribe,
            "asked": self._asked_of,
            "drop": self._drop,
        }
        return await actions[request.pop("op")](**request)

    async def _connected(self) -> list[str]:
        return [str(channel.vm.uuid) for channel in self._channels if channel.vm is not None]

    async def _wait(self, low: int, high: int | None, timeout_s: float) -> int:
        def is_met() -> bool:
            return low <= len(self._channels) and (high is None or len(self._channels) <= high)

        async def met() -> None:
            async with self._changed:
                await self._changed.wait_for(is_met)

        try:
            await asyncio.wait_for(met(), timeout_s)
        except asyncio.TimeoutError:
            pass
        return len(self._channels)

    async def _check(self, uuid: str, asked: list[list[int]]) -> list[int | None]:
        errors: list[int | None] = [None] * len(asked)
        for channel in self._of(uuid):
            errors = [await channel.check(command, id_) for command, id_ in asked]
        return errors

    async def _subscribe(self, uuid: str, lets_go: bool) -> int | None:
        error: int | None = None
        for channel in self._of(uuid):
            channel.lets_go = lets_go
            error = await channel.subscribe()
        return error

    async def _asked_of(self, uuid: str) -> int:
        return self._asked[uuid]

    async def _drop(self, uuid: str | None) -> int:
        chosen = self._of(uuid) if uuid is not None else list(self._channels)
        for channel in chosen:
            channel.close()
        return len(chosen)

    def _of(self, domain_uuid: str) -> list[_Channel]:
        # The latest: the VM's channel before may not have been seen to end yet.
        wanted = uuid.UUID(domain_uuid)
        found = [each for each in self._channels if each.vm is not None and each.vm.uuid == wanted]
        return found[-1:]


async def _serve(path: str, answer_after_s: float) -> None:
    loop = asyncio.get_running_loop()
    tool = _Tool(answer_after_s)
    requests = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
    with listen_unix(path) as listener:
        server = await loop.create_unix_server(
            lambda: _Channel(tool), sock=listener, backlog=_BACKLOG
        )
        print(json.dumps(path), flush=True)
        while line := await requests.readline():
            print(json.dumps(await tool.do(json.loads(line))), flush=True)
        server.close()


def main() -> None:
    """Be the tool."""
    from fleet import raise_fd_limit

    raise_fd_limit()
    asyncio.run(_serve(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.0))


if __name__ == "__main__":
    main()
