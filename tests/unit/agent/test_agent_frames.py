# SPDX-License-Identifier: Apache-2.0
"""What the daemon and its workers send each other, cut into any pieces."""

from __future__ import annotations

import os
import socket
import threading
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from kvmi_libvirt.agent import frames

headers = hs.dictionaries(hs.text(max_size=5), hs.none() | hs.integers() | hs.text(), max_size=4)
# Domain names may hold bytes that are no UTF-8.
surrogates = hs.just({"name": "vm\udcff"})


@settings(max_examples=60)
@given(headers | surrogates, hs.binary(max_size=200), hs.data())
def test_a_frame_comes_out_as_it_went_in_however_it_is_cut(
    header: dict[str, Any], blob: bytes, data: hs.DataObject
) -> None:
    frame = frames.encode(header, blob)
    cuts = sorted(data.draw(hs.sets(hs.integers(0, len(frame)), max_size=6)) | {0, len(frame)})
    decoder = frames.Decoder()
    for _ in range(2):  # the second is not disturbed by the first
        pieces = [frame[begin:end] for begin, end in pairwise(cuts)]
        assert all(decoder.feed(piece) is None for piece in pieces[:-1])
        assert decoder.feed(pieces[-1]) == (header, blob)


def test_a_frame_is_not_there_before_its_last_byte() -> None:
    frame = frames.encode({"job": "reconcile"}, b"<domain/>")
    decoder = frames.Decoder()
    for byte in frame[:-1]:
        assert decoder.feed(bytes([byte])) is None
    assert decoder.feed(frame[-1:]) == ({"job": "reconcile"}, b"<domain/>")


def test_a_descriptor_comes_with_the_first_bytes_and_is_not_inherited() -> None:
    ours, theirs = socket.socketpair()
    big = frames.encode({}, b"x" * (4 << 20))  # more than a socket takes at once
    with ours, theirs, open("/dev/null", "rb") as null:
        sender = threading.Thread(target=frames.send, args=(ours, big, null.fileno()))
        sender.start()
        decoder, found = frames.Decoder(), []
        answer = None
        while answer is None:
            chunk, fd = frames.receive_some(theirs)
            assert chunk
            found += [] if fd is None else [fd]
            answer = decoder.feed(chunk)
        sender.join()
        assert answer == ({}, b"x" * (4 << 20))
        (fd,) = found
        try:
            assert os.path.samestat(os.fstat(fd), os.fstat(null.fileno()))
            assert not os.get_inheritable(fd)
        finally:
            os.close(fd)


def test_the_end_is_an_empty_chunk_and_nothing_yet_is_not() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setblocking(False)
        with ours, pytest.raises(BlockingIOError):
            frames.receive_some(theirs)
        assert frames.receive_some(theirs) == (b"", None)
