# SPDX-License-Identifier: Apache-2.0
"""The tool's socket, served without ever waiting for the tool.

The kernel gives a thread to each channel; here one loop serves them all, so a
tool that floods, stalls or never reads must cost the others nothing: one read
and a few messages a turn, and no more reading while replies pile up.

The socket's own flags are left alone: the file is shared with QEMU. May import
``emulator.protocol`` and ``newtypes``.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.emulator.protocol import ChannelBroken, Decoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.emulator.protocol import Service
    from kvmi_libvirt.newtypes import LocalFd

READ_LEN: Final = 16 * 1024  # bytes a turn; two messages of the largest size fit
MESSAGES_PER_TURN: Final = 32
REPLIES_LIMIT_LEN: Final = 64 * 1024  # unsent bytes at which reading stops

_TIMEVAL: Final = struct.Struct("qq")  # struct timeval: seconds, microseconds
_NO_FLAGS_SEND: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def _unwatched(_fd: int) -> None:
    return


class Channel:
    """Owner of our copy of the tool's socket.

    Parameters
        fd        taken over, also when this raises
        service   answers the messages
        released  called with the fd, just before our copy of the socket is closed
    Raises
        OSError  *fd* is not a socket; it is closed.
    """

    def __init__(
        self, fd: LocalFd, service: Service, *, released: Callable[[int], None] = _unwatched
    ) -> None:
        try:
            # Under this family Python hands every option of whatever socket on as it is; one
            # that it knows to be vsock has numbers only, for Python.
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
        except OSError:
            socket.close(fd)
            raise
        kind = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        self._service = service
        self._released = released
        self._decoder = Decoder()
        self._unsent = bytearray()
        self._has_messages = False
        self._event_left = 0
        self._event_sent: bool | None = None
        # On a packet socket the kernel's two reads, header and payload, take a
        # packet each; what a packet has beyond the read is lost.
        self._is_stream = kind == socket.SOCK_STREAM
        # A receive timeout ends the kernel's read, and with it the channel; a send
        # timeout ends its write: the event fails, a reply takes the channel with it.
        self._idle_limit_s = self._timeout_s(socket.SO_RCVTIMEO)
        self._send_limit_s = self._timeout_s(socket.SO_SNDTIMEO)
        self._last_read = self._last_sent = time.monotonic()

    @property
    def is_open(self) -> bool:
        """Say whether the channel is alive; it never comes back."""
        return self._socket.fileno() >= 0

    @property
    def fd(self) -> int:
        """Return the fd to poll (borrowed)."""
        return self._socket.fileno()

    @property
    def interest(self) -> int:
        """Return the poll events this channel waits for."""
        interest = select.POLLOUT if self._unsent else 0
        if not self._has_messages and len(self._unsent) < REPLIES_LIMIT_LEN:
            interest |= select.POLLIN
        return interest

    @property
    def deadline(self) -> float | None:
        """Return the monotonic time of the next turn wanted without any event, if any."""
        if self._has_messages and len(self._unsent) < REPLIES_LIMIT_LEN:
            return 0.0
        wanted = []
        if self._idle_limit_s:
            wanted.append(self._last_read + self._idle_limit_s)
        if self._send_limit_s and self._unsent:
            wanted.append(self._last_sent + self._send_limit_s)
        return min(wanted, default=None)

    def turn(self, ready: int) -> None:
        """Do a bounded piece of work; never blocks, never raises for what the tool does.

        Parameters
            ready  poll events; 0 when only the deadline passed
        """
        try:
            self._flush()
            if ready & ~select.POLLOUT and not self._has_messages:
                self._read(has_hung_up=bool(ready & (select.POLLHUP | select.POLLERR)))
            elif self._is_late(self._send_limit_s, self._last_sent) and self._unsent:
                self._give_up_sending()
            elif self._idle_limit_s and time.monotonic() >= self._last_read + self._idle_limit_s:
                raise ChannelBroken("receive timeout")
            self._answer()
            self._flush()
        except (ChannelBroken, OSError):
            self.close()

    @property
    def event_sent(self) -> bool | None:
        """Say whether the last event was handed to the socket; None while that is open."""
        return self._event_sent

    def send_event(self, seq: int) -> None:
        """Begin to send the unhook event; :attr:`event_sent` tells how it went.

        A tool that does not read leaves that open for as long as the socket's send
        timeout, or for ever. Only one event may be under way.
        """
        self._event_sent = None
        if not self.is_open:
            self._event_sent = False
            return
        if not self._unsent:
            self._last_sent = time.monotonic()
        self._unsent += self._service.unhook_event(seq)
        self._event_left = len(self._unsent)
        try:
            self._flush()
        except OSError:
            self.close()

    def close(self) -> None:
        """Shut the socket down in both directions, for all who have it. Idempotent."""
        if self.is_open:
            try:
                self._flush()
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:  # not connected, or no such operation: any socket is taken
                pass
            self.release()

    def release(self) -> None:
        """Close our copy only; whoever else has the socket notices nothing. Idempotent."""
        if self.is_open:
            self._released(self.fd)
        self._socket.close()
        if self._event_left:
            self._event_left, self._event_sent = 0, False

    def _timeout_s(self, option: int) -> float:
        raw = self._socket.getsockopt(socket.SOL_SOCKET, option, _TIMEVAL.size)
        seconds, microseconds = _TIMEVAL.unpack(raw)
        return float(seconds + microseconds / 1e6)

    @staticmethod
    def _is_late(limit_s: float, since: float) -> bool:
        return bool(limit_s) and time.monotonic() >= since + limit_s

    def _give_up_sending(self) -> None:
        event_len = self._event_left and len(self._service.unhook_event(0))
        if not event_len or self._event_left < event_len or len(self._unsent) > event_len:
            # In the middle of an event, or of a reply: the stream cannot go on.
            raise ChannelBroken("send timeout")
        self._unsent.clear()
        self._event_left, self._event_sent = 0, False

    def _read(self, *, has_hung_up: bool) -> None:
        if len(self._unsent) >= REPLIES_LIMIT_LEN:
            if has_hung_up:
                raise ChannelBroken("the tool hung up and reads no reply")
            return
        length = READ_LEN if self._is_stream else self._decoder.wanted()
        try:
            data = self._socket.recv(length, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not data or (not self._is_stream and len(data) < length):
            raise ChannelBroken("end of stream")
        self._last_read = time.monotonic()
        self._decoder.feed(data)

    def _answer(self) -> None:
        self._has_messages = True
        for _ in range(MESSAGES_PER_TURN):
            if len(self._unsent) >= REPLIES_LIMIT_LEN:
                return
            message = self._decoder.take()
            if message is None:
                self._has_messages = False
                return
            if not self._unsent:
                self._last_sent = time.monotonic()
            self._unsent += self._service.reply(message)

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent, _NO_FLAGS_SEND)
            except BlockingIOError:
                return
            del self._unsent[:sent]
            self._last_sent = time.monotonic()
            if self._event_left:
                self._event_left = max(0, self._event_left - sent)
                self._event_sent = None if self._event_left else True
