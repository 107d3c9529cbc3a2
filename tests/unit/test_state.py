# SPDX-License-Identifier: Apache-2.0
"""The state directory: atomic, private, locked, and never a traceback from a damaged file."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import select
import signal
import stat
import time
import uuid as uuid_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmi_libvirt.errors import StateError
from kvmi_libvirt.state import HOOKED, STATE_DIR, Journal, StateDir, VmState, now_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UUID: Final = "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01"
OTHER: Final = "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a02"

QUICK: Final = settings(max_examples=60, deadline=None, derandomize=True)


def vm(uuid: str = UUID, **changes: Any) -> VmState:
    whole = VmState(
        domain="db1",
        uuid=uuid,
        pid=4321,
        start_ticks=987654,
        abi="v12",
        mode="required",
        state=HOOKED,
        source="unix:/run/kvmi/tool.sock",
        commands=("KVMI_VM_GET_INFO", "KVMI_VM_READ_PHYSICAL"),
        events=("KVMI_VCPU_EVENT_CR",),
        since="2026-01-02T03:04:05Z",
        error=None,
        socket_inode=112233,
    )
    return dataclasses.replace(whole, **changes)


JOURNAL: Final = Journal(
    pid=4321,
    start_ticks=987654,
    sockets_before=(11, 22),
    channel_inode=33,
    request_unhook=0x0000AEC9,
)


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return StateDir(tmp_path / "state")


@contextlib.contextmanager
def another_process(act: Callable[[], None]) -> Iterator[int]:
    """Run *act* in a forked child for the block; yields the read end of its "done" pipe."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            act()
            os.write(writer, b"d")
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    try:
        yield reader
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# -- records -----------------------------------------------------------------------------


def test_the_directory_is_where_the_design_says() -> None:
    assert str(STATE_DIR) == "/run/kvmi-libvirt"
    assert StateDir().path == STATE_DIR


def test_nothing_is_touched_before_the_first_write(state: StateDir) -> None:
    assert state.load(UUID) is None
    assert state.load_journal(UUID) is None
    assert state.all() == []
    state.clear_journal(UUID)
    state.remove(UUID)

    assert not state.path.exists()


@pytest.mark.parametrize(
    "record",
    [
        vm(),
        vm(abi=None, state="failed", source=None, commands=(), events=(), error="no tool listens"),
        vm(domain="n\u00e4me with \U0001f980 and \udc80", mode="optional"),
    ],
    ids=["hooked", "failed", "odd-name"],
)
def test_what_was_saved_is_loaded(state: StateDir, record: VmState) -> None:
    state.save(record)

    assert state.load(UUID) == record


def test_a_journal_is_kept_beside_the_state_until_it_is_cleared(state: StateDir) -> None:
    state.save(vm())
    state.save_journal(UUID, JOURNAL)

    assert state.load_journal(UUID) == JOURNAL
    state.clear_journal(UUID)
    assert state.load_journal(UUID) is None
    assert state.load(UUID) == vm()


def test_only_root_may_look(state: StateDir) -> None:
    state.save(vm())
    state.save_journal(UUID, JOURNAL)
    with state.locked(UUID, deadline=soon()):
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in state.path.iterdir()}

    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700
    assert modes == {f"{UUID}.{suffix}": 0o600 for suffix in ("json", "journal", "lock")}


def test_remove_forgets_one_vm_and_no_other(state: StateDir) -> None:
    for uuid in (UUID, OTHER):
        state.save(vm(uuid))
        state.save_journal(uuid, JOURNAL)
        with state.locked(uuid, deadline=soon()):
            pass

    state.remove(UUID)

    assert {p.name for p in state.path.iterdir()} == {
        f"{OTHER}.{suffix}" for suffix in ("json", "journal", "lock")
    }


def test_all_is_sorted_by_name_and_sees_records_only(state: StateDir) -> None:
    state.save(vm(OTHER, domain="alpha"))
    state.save(vm(UUID, domain="beta"))
    state.save_journal(UUID, JOURNAL)
    (state.path / ".new-left-behind").write_text("{")

    assert [record.domain for record in state.all()] == ["alpha", "beta"]


def test_a_uuid_is_one_whatever_its_spelling(state: StateDir) -> None:
    state.save(vm())

    for spelling in (UUID.upper(), UUID.replace("-", ""), f"{{{UUID}}}"):
        assert state.load(spelling) == vm()


NOT_UUIDS: Final = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    f"../{UUID}",
    f"{UUID}/../x",
    f"{UUID}\0",
    "/etc/shadow",
    f"{UUID}.json",
    "5a4a2b4e",
]


@pytest.mark.parametrize("text", NOT_UUIDS)
def test_what_is_no_uuid_names_no_file(state: StateDir, text: str) -> None:
    for use in (
        lambda: state.load(text),
        lambda: state.load_journal(text),
        lambda: state.save(vm(text)),
        lambda: state.save_journal(text, JOURNAL),
        lambda: state.clear_journal(text),
        lambda: state.remove(text),
    ):
        with pytest.raises(StateError, match="not a uuid"):
            use()


@QUICK
@example(text="{../..-../../0123456789abcdef0123}")
@example(text="urn:uuid:5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01")
@example(text="5a4a2b4e_7c1d_4e0f_9a52_0d6f6f1b0")
@example(text="\u0665a4a2b4e7c1d4e0f9a520d6f6f1b0a01")
@given(text=st.text("0123456789abcdefABCDEF-{}./_+ \n\0ur:id", max_size=60))
def test_no_text_can_name_a_file_of_another_place(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    above = tmp_path_factory.mktemp("above")
    state = StateDir(above / "state")

    with contextlib.suppress(StateError):
        state.save_journal(text, JOURNAL)

    assert {p.name for p in above.iterdir()} <= {"state"}
    for path in state.path.glob("*"):
        assert str(uuid_module.UUID(path.stem)) == path.stem
        assert path.suffix == ".journal"


# -- atomicity ---------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["rename", "dump"])
def test_a_write_that_fails_leaves_the_old_record_and_no_debris(
    state: StateDir, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    state.save(vm())

    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if failing == "rename":
            patch.setattr(os, "rename", no_space)
        else:
            patch.setattr(json, "dump", no_space)
        with pytest.raises(StateError, match="No space left on device"):
            state.save(vm(domain="new"))

    assert state.load(UUID) == vm()
    assert [p.name for p in state.path.iterdir()] == [f"{UUID}.json"]


def test_a_reader_never_sees_half_a_record(state: StateDir) -> None:
    # Records of very different length, replaced as fast as can be by another process.
    short, long = vm(), vm(error="x" * 100_000)
    state.save(short)

    def replace_for_ever() -> None:
        while True:
            state.save(long)
            state.save(short)

    seen: set[VmState | None] = set()
    with another_process(replace_for_ever):
        deadline = soon()
        while len(seen) < 2 and time.monotonic() < deadline:
            for _ in range(50):
                record = state.load(UUID)
                assert record in (short, long)
                seen.add(record)

    assert seen == {short, long}


def test_a_directory_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    state = StateDir(tmp_path / "file" / "state")

    with pytest.raises(StateError, match="cannot make"):
        state.save(vm())
    with pytest.raises(StateError, match="cannot make"), state.locked(UUID, deadline=soon()):
        pass


# -- damaged files -----------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
WHOLE: Final = dataclasses.asdict(vm())
FIELDS: Final = [*WHOLE, *dataclasses.asdict(JOURNAL)]


def damage(directory: Path, content: bytes) -> StateDir:
    directory.mkdir(exist_ok=True)
    for suffix in ("json", "journal"):
        (directory / f"{UUID}.{suffix}").write_bytes(content)
    return StateDir(directory)


def check_is_sound_or_refused(state: StateDir) -> None:
    for load, kind in ((state.load, VmState), (state.load_journal, Journal)):
        text = None
        try:
            assert isinstance(load(UUID), kind)
        except StateError as error:
            text = str(error)
        assert text is None or (UUID in text and "\n" not in text)
    with contextlib.suppress(StateError):
        state.all()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@QUICK
@given(content=st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused_in_one_line(damaged: Path, content: bytes) -> None:
    check_is_sound_or_refused(damage(damaged, content))


@QUICK
@given(value=json_values)
def test_json_of_any_shape_is_refused_in_one_line(damaged: Path, value: object) -> None:
    check_is_sound_or_refused(damage(damaged, json.dumps(value).encode()))


@QUICK
@given(field=st.sampled_from(FIELDS), value=json_values)
def test_a_field_of_any_type_is_refused_in_one_line(
    damaged: Path, field: str, value: object
) -> None:
    changed = {**WHOLE, **dataclasses.asdict(JOURNAL), field: value}

    check_is_sound_or_refused(damage(damaged, json.dumps(changed).encode()))


@QUICK
@given(length=st.integers(0, len(json.dumps(WHOLE)) - 1))
def test_a_record_cut_anywhere_is_refused(damaged: Path, length: int) -> None:
    state = damage(damaged, json.dumps(WHOLE).encode()[:length])

    with pytest.raises(StateError, match="is damaged"):
        state.load(UUID)


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(VmState) if f.default is dataclasses.MISSING]
)
def test_a_record_without_one_of_its_fields_is_refused(tmp_path: Path, field: str) -> None:
    rest = {name: value for name, value in WHOLE.items() if name != field}

    with pytest.raises(StateError, match=f"no {field}"):
        damage(tmp_path / "state", json.dumps(rest).encode()).load(UUID)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pid", "4321"),
        ("pid", 1.5),
        ("domain", None),
        ("abi", 12),
        ("commands", "KVMI_VM_GET_INFO"),
        ("commands", ["KVMI_VM_GET_INFO", 1]),
        ("events", {"KVMI_VCPU_EVENT_CR": 1}),
        ("socket_inode", None),
        ("socket_inode", [1]),
    ],
)
def test_a_field_of_the_wrong_type_is_refused(tmp_path: Path, field: str, value: object) -> None:
    state = damage(tmp_path / "state", json.dumps({**WHOLE, field: value}).encode())

    with pytest.raises(StateError, match=field):
        state.load(UUID)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"pid":' * 50_000,
        b"1" * 10_000,
        b"NaN",
        b"{}",
        b"[]",
        b"null",
        json.dumps(WHOLE).encode() + b"{}",
        json.dumps({**WHOLE, "error": "x" * (1 << 20)}).encode(),
    ],
    ids=["empty", "utf16", "deep", "deeper", "number", "nan", "{}", "[]", "null", "two", "long"],
)
def test_damage_is_one_line_that_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    state = damage(tmp_path / "state", content)

    for load in (state.load, state.load_journal):
        with pytest.raises(StateError, match="remove it") as caught:
            load(UUID)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_a_field_of_a_later_version_is_ignored(tmp_path: Path) -> None:
    state = damage(tmp_path / "state", json.dumps({**WHOLE, "tool_pid": 5}).encode())

    assert state.load(UUID) == vm()


def test_a_directory_in_the_place_of_a_record_is_refused(state: StateDir) -> None:
    (state.path / f"{UUID}.json").mkdir(parents=True)

    with pytest.raises(StateError, match="Is a directory"):
        state.load(UUID)


def test_damage_goes_with_remove(tmp_path: Path) -> None:
    state = damage(tmp_path / "state", b"\0")

    state.remove(UUID)

    assert state.load(UUID) is None
    assert state.load_journal(UUID) is None


# -- locking -----------------------------------------------------------------------------


def test_a_lock_excludes_another_process_until_it_is_released(state: StateDir) -> None:
    # Forked before the lock is taken: a child made later would share it.
    go_reader, go_writer = os.pipe()

    def take() -> None:
        assert os.read(go_reader, 1) == b"g"
        with state.locked(UUID, deadline=soon(30)):
            pass

    try:
        with another_process(take) as done:
            with state.locked(UUID, deadline=soon()):
                os.write(go_writer, b"g")
                poll = select.poll()
                poll.register(done, select.POLLIN)
                assert poll.poll(100) == []

            assert os.read(done, 1) == b"d"
    finally:
        os.close(go_reader)
        os.close(go_writer)


def test_a_lock_excludes_within_one_process_too(state: StateDir) -> None:
    with (
        state.locked(UUID, deadline=soon()),
        pytest.raises(StateError, match="another process is at work"),
        StateDir(state.path).locked(UUID, deadline=soon(0.03)),
    ):
        pass


def test_the_waiter_gets_the_lock_when_its_holder_ends(state: StateDir) -> None:
    ready_reader, ready_writer = os.pipe()

    def hold_until_killed() -> None:
        with state.locked(UUID, deadline=soon()):
            os.write(ready_writer, b"r")
            signal.pause()

    try:
        with another_process(hold_until_killed):
            assert os.read(ready_reader, 1) == b"r"
            with pytest.raises(StateError), state.locked(UUID, deadline=soon(0.03)):
                pass
        # The block's end killed it: a dead holder must not lock a VM for ever.
        with state.locked(UUID, deadline=soon()):
            pass
    finally:
        os.close(ready_reader)
        os.close(ready_writer)


def test_vms_are_locked_apart(state: StateDir) -> None:
    with state.locked(UUID, deadline=soon()), state.locked(OTHER, deadline=soon(0)):
        pass


def test_a_lock_is_released_when_the_work_fails(state: StateDir) -> None:
    with pytest.raises(RuntimeError, match="work"), state.locked(UUID, deadline=soon()):
        raise RuntimeError("work")

    with state.locked(UUID, deadline=soon(0)):
        pass


def test_waiting_for_a_lock_ends_at_its_deadline(state: StateDir) -> None:
    with state.locked(UUID, deadline=soon()):
        before = time.monotonic()
        with pytest.raises(StateError), state.locked(UUID, deadline=before + 0.1):
            pass

        assert 0.1 <= time.monotonic() - before < 2.0


def test_a_lock_file_removed_before_it_was_locked_does_not_count(
    state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The holder before us ended, and took the file with it, between our open and flock.
    flock = fcntl.flock
    removed: list[int] = []

    def slow_flock(fd: int, operation: int) -> None:
        if not removed:
            removed.append(os.fstat(fd).st_ino)
            state.remove(UUID)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", slow_flock)
    with state.locked(UUID, deadline=soon()):
        monkeypatch.undo()
        assert (state.path / f"{UUID}.lock").exists()
        with pytest.raises(StateError), StateDir(state.path).locked(UUID, deadline=soon(0.03)):
            pass

    assert len(removed) == 1


def test_the_lock_file_is_no_way_to_another_file(state: StateDir, tmp_path: Path) -> None:
    state.path.mkdir()
    target = tmp_path / "target"
    (state.path / f"{UUID}.lock").symlink_to(target)

    with pytest.raises(StateError, match="cannot open"), state.locked(UUID, deadline=soon()):
        pass

    assert not target.exists()


def test_the_time_is_rfc_3339_in_utc() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", now_text())
