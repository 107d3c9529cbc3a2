# SPDX-License-Identifier: Apache-2.0
"""The trace file."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest

from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.emulator.trace import Trace, traced_args
from kvmi_libvirt.newtypes import Tid


def write_one(trace: Trace, errno: int = 0) -> None:
    args = {"allow": 1, "id": 12}
    name = "KVM_INTROSPECTION_COMMAND"
    trace.ioctl(Tid(7), name, 0x4008AECA, lambda: args, errno=errno)


def test_line_when_written_then_it_is_the_documented_one(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    before = time.time()
    with Trace(path) as trace:
        write_one(trace)

    (line,) = path.read_text(encoding="ascii").splitlines()
    fields = json.loads(line)
    assert before - 0.001 <= fields.pop("t") <= time.time() + 0.001
    assert list(fields) == ["tid", "ioctl", "request", "args", "errno"]
    assert fields == {
        "tid": 7,
        "ioctl": "KVM_INTROSPECTION_COMMAND",
        "request": "0x4008aeca",
        "args": {"allow": 1, "id": 12},
        "errno": 0,
    }


def test_trace_when_opened_again_then_it_appends(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    for _ in range(2):
        with Trace(path) as trace:
            write_one(trace)

    assert len(path.read_text(encoding="ascii").splitlines()) == 2


def test_lazy_trace_when_nothing_is_written_then_no_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with Trace(path, lazy=True):
        pass

    assert not path.exists()


def test_lazy_trace_when_an_old_file_of_the_name_is_there_then_it_is_replaced(
    tmp_path: Path,
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("old\n", encoding="ascii")
    with Trace(path, lazy=True) as trace:
        write_one(trace)
        write_one(trace)

    lines = path.read_text(encoding="ascii").splitlines()
    assert [json.loads(line)["tid"] for line in lines] == [7, 7]


def test_lazy_trace_when_the_directory_is_not_there_then_silence(tmp_path: Path) -> None:
    with Trace(tmp_path / "missing" / "trace.jsonl", lazy=True) as trace:
        write_one(trace)
        write_one(trace)

    assert list(tmp_path.iterdir()) == []


def test_lazy_trace_when_the_name_is_a_link_then_it_is_not_followed(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "trace.jsonl"
    path.symlink_to(target)
    with Trace(path, lazy=True) as trace:
        write_one(trace)

    assert not target.exists()


def test_eager_trace_when_it_cannot_be_opened_then_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Trace(tmp_path / "missing" / "trace.jsonl")


def test_trace_when_the_disk_is_full_then_the_line_is_lost_and_nothing_else() -> None:
    with Trace(Path("/dev/full")) as trace:
        write_one(trace)


@pytest.mark.parametrize(
    ("ioctl", "argument", "expected"),
    [
        (Ioctl.COMMAND, struct.pack("=Ii", 2, -1), {"allow": 2, "id": -1}),
        (Ioctl.EVENT, None, {"pointer": "0x10"}),
        (Ioctl.UNHOOK, b"", {}),
        (
            Ioctl.HOOK,
            struct.pack("=iI16s", -1, 3, bytes(range(16))),
            {"fd": -1, "padding": 3, "uuid": "00010203-0405-0607-0809-0a0b0c0d0e0f"},
        ),
    ],
)
def test_args_when_traced_then_they_are_what_the_caller_passed(
    ioctl: Ioctl, argument: bytes | None, expected: dict[str, object]
) -> None:
    assert traced_args(ioctl, argument, 0x10) == expected
