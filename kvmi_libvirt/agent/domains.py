# SPDX-License-Identifier: Apache-2.0
"""Which domains run, from libvirt or from the status files it keeps.

Whatever changes is only reported as a uuid to look at; the domain is then fetched
anew. Nothing here blocks the event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol
from xml.parsers import expat

from kvmi_libvirt import libvirtio
from kvmi_libvirt.agent.decide import Backoff
from kvmi_libvirt.errors import KvmiLibvirtError, PolicySyntaxError
from kvmi_libvirt.libvirtio import RunningDomain

if TYPE_CHECKING:
    from kvmi_libvirt.agent.inotify import Directories

logger = logging.getLogger(__name__)

_MAX_XML_LEN: Final = 16 << 20
_CONNECT_BACKOFF: Final = Backoff(first_s=0.5, last_s=30.0)


class Listener(Protocol):
    """Who wants to hear of changes; called in the event loop."""

    def changed(self, uuid: str) -> None:
        """Look at a domain again."""

    def resumed(self, uuid: str) -> None:
        """The vCPUs of a domain run again."""

    def stopped(self, uuid: str) -> None:
        """A domain has ended."""

    def all_changed(self) -> None:
        """Look at everything: what happened meanwhile is not known."""


class Domains(Protocol):
    """Where running domains are found."""

    @property
    def is_there(self) -> bool:
        """Say whether it can be asked now."""

    def start(self, listener: Listener) -> None:
        """Begin to report changes, :meth:`Listener.all_changed` first."""

    async def running(self) -> list[RunningDomain]:
        """Return all running domains. Raises KvmiLibvirtError when nobody can tell."""

    async def get(self, uuid: str) -> RunningDomain | None:
        """Return one running domain, None when there is none of that uuid."""

    async def close(self) -> None:
        """Report nothing any more."""


class LibvirtDomains:
    """Domains of a libvirt, which may come and go.

    Parameters
        uri  of a local libvirt
    """

    def __init__(self, uri: str) -> None:
        """Nothing is connected yet."""
        self._uri = uri
        self._events: libvirtio.Events | None = None
        self._listener: Listener | None = None
        # Every libvirt call can block, and is made here: one thread, one after the other.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "libvirt-calls")
        self._connecting: asyncio.Task[None] | None = None

    @property
    def is_there(self) -> bool:
        """Say whether libvirt is connected."""
        return self._events is not None

    def start(self, listener: Listener) -> None:
        """Connect, now or when libvirt is there."""
        self._listener = listener
        self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()

        def call(event: str, uuid: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._event, event, uuid)

        tries = 0
        while True:
            try:
                self._events = await loop.run_in_executor(
                    self._thread, lambda: libvirtio.Events(self._uri, call)
                )
            except KvmiLibvirtError as error:
                tries += 1
                if tries == 1:
                    logger.warning("%s; trying again", error)
                await asyncio.sleep(_CONNECT_BACKOFF.delay_s(tries))
                continue
            logger.info("connected to libvirt at %s", self._uri)
            if self._listener is not None:
                self._listener.all_changed()
            return

    def _event(self, event: str, uuid: str) -> None:
        listener = self._listener
        if listener is None:
            return
        if event == "lost":
            logger.warning("the connection to libvirt at %s has ended; trying again", self._uri)
            events, self._events = self._events, None
            if events is not None:
                self._thread.submit(events.close)
            self._connecting = asyncio.create_task(self._connect())
        elif event == "resumed":
            listener.resumed(uuid)
        elif event == "stopped":
            listener.stopped(uuid)
        else:
            listener.changed(uuid)

    def _connected(self) -> libvirtio.Events:
        if self._events is None:
            raise libvirtio.LibvirtError(f"not connected to libvirt at {self._uri}")
        return self._events

    async def running(self) -> list[RunningDomain]:
        """Return all running domains."""
        events = self._connected()
        return await asyncio.get_running_loop().run_in_executor(self._thread, events.running)

    async def get(self, uuid: str) -> RunningDomain | None:
        """Return one running domain."""
        events = self._connected()
        return await asyncio.get_running_loop().run_in_executor(self._thread, events.get, uuid)

    async def close(self) -> None:
        """Disconnect; a call that hangs is left behind."""
        self._listener = None
        if self._connecting is not None:
            self._connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._connecting
        if self._events is not None:
            self._thread.submit(self._events.close)
        self._thread.shutdown(wait=False)


class StatusFiles:
    """Domains by libvirt's status files: for where its socket cannot be reached.

    Parameters
        directory    normally /run/libvirt/qemu
        directories  for being told of changes
    """

    def __init__(self, directory: Path, directories: Directories) -> None:
        """Nothing is read yet."""
        self._directory = directory
        self._directories = directories
        self._listener: Listener | None = None
        self._uuids: dict[str, str] = {}

    @property
    def is_there(self) -> bool:
        """Say whether the directory is there."""
        return self._directory.is_dir()

    def start(self, listener: Listener) -> None:
        """Begin to watch the directory."""
        self._listener = listener
        if not self._directories.watch(str(self._directory), self._changed):
            logger.warning(
                "%s: no such directory; start the agent when it is there", self._directory
            )
        asyncio.get_running_loop().call_soon(listener.all_changed)

    def _changed(self, _directory: str, names: frozenset[str] | None) -> None:
        listener = self._listener
        if listener is None:
            return
        if names is None:
            listener.all_changed()
            return
        for name in names:
            if not name.endswith(".xml"):
                continue
            domain = self._read(self._directory / name)
            if domain is not None:
                listener.changed(domain.uuid)
            elif name in self._uuids:
                listener.stopped(self._uuids.pop(name))

    def _read(self, path: Path) -> RunningDomain | None:
        try:
            with open(path, "rb") as file:
                xml = file.read(_MAX_XML_LEN)
            name, uuid = identity(xml)
        except (OSError, PolicySyntaxError):
            return None
        self._uuids[path.name] = uuid
        return RunningDomain(name=name, uuid=uuid, xml=xml)

    async def running(self) -> list[RunningDomain]:
        """Return all domains that have a status file."""
        self._uuids.clear()
        found = (self._read(path) for path in sorted(self._directory.glob("*.xml")))
        return [domain for domain in found if domain is not None]

    async def get(self, uuid: str) -> RunningDomain | None:
        """Return one domain."""
        for name, known in self._uuids.items():
            if known == uuid:
                domain = self._read(self._directory / name)
                if domain is not None and domain.uuid == uuid:
                    return domain
        return None

    async def close(self) -> None:
        """Report nothing any more."""
        self._listener = None


def identity(xml: bytes) -> tuple[str, str]:
    """Return name and uuid of a domain or status document, without judging the rest.

    Raises
        PolicySyntaxError  it has none, or is no well-formed XML
    """
    path: list[str] = []
    found: dict[str, str] = {}

    def start(tag: str, _attributes: dict[str, str]) -> None:
        path.append(tag)

    def end(_tag: str) -> None:
        path.pop()

    def text(data: str) -> None:
        if path[:-1] in (["domain"], ["domstatus", "domain"]) and path[-1] in ("name", "uuid"):
            found[path[-1]] = found.get(path[-1], "") + data

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    try:
        parser.Parse(xml, True)
        return found["name"].strip(), found["uuid"].strip().lower()
    except (expat.ExpatError, ValueError, KeyError) as error:
        raise PolicySyntaxError(f"no domain: {error}") from error
