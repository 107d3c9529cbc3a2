# SPDX-License-Identifier: Apache-2.0
"""Prerequisites, leak checks and victims shared by all tests.

A test marked ``ptrace``, ``seccomp``, ``kvm`` or ``libvirt`` is skipped, with the
reason, where the machine cannot run it. ``KVMI_TEST_REQUIRE=ptrace,kvm`` turns
those skips into failures.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support import Tell

pytest_plugins = ["live_support", "two_hosts"]

REQUIRE_VARIABLE = "KVMI_TEST_REQUIRE"

# A machine under load is no defect; in CI every run has the same examples.
settings.register_profile(
    "kvmi",
    deadline=None,
    derandomize=os.environ.get("CI") == "true",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("kvmi")


def _missing_ptrace() -> str | None:
    if shutil.which("cc") is None:
        return "no C compiler (apt-get install gcc libc6-dev)"
    child = subprocess.Popen(["sleep", "60"])
    try:
        from kvmi_libvirt import linux
        from kvmi_libvirt.newtypes import Tid

        try:
            linux.ptrace_seize(Tid(child.pid), 0)
        except OSError as error:
            return f"ptrace is not permitted here ({error.strerror})"
        return None
    finally:
        child.kill()
        child.wait()


def _missing_seccomp() -> str | None:
    try:
        actions = Path("/proc/sys/kernel/seccomp/actions_avail").read_text(encoding="ascii")
    except OSError:
        return "the kernel has no seccomp filters"
    return None if "user_notif" in actions.split() else "the kernel has no seccomp user_notif"


def _missing_kvm() -> str | None:
    if shutil.which("qemu-system-x86_64") is None:
        return "no qemu-system-x86_64 (apt-get install qemu-system-x86)"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm cannot be opened ({error.strerror})"
    return None


def _missing_libvirt() -> str | None:
    if os.geteuid() != 0:
        return "the libvirt hook is installed system-wide: run as root"
    for program in ("libvirtd", "virtlogd", "virsh"):
        if shutil.which(program, path="/usr/sbin:/usr/bin") is None:
            return f"no {program} (apt-get install libvirt-daemon-system libvirt-clients)"
    return None


_PREREQUISITES: dict[str, Callable[[], str | None]] = {
    "ptrace": _missing_ptrace,
    "seccomp": _missing_seccomp,
    "kvm": _missing_kvm,
    "libvirt": _missing_libvirt,
}


@functools.cache
def _missing(name: str) -> str | None:
    return _PREREQUISITES[name]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, or fail, a test whose marked prerequisites are not there."""
    required = os.environ.get(REQUIRE_VARIABLE, "").split(",")
    for name in _PREREQUISITES:
        if item.get_closest_marker(name) is None:
            continue
        reason = _missing(name)
        if reason is None:
            continue
        if name in required:
            pytest.fail(f"{name} is required ({REQUIRE_VARIABLE}): {reason}", pytrace=False)
        pytest.skip(f"{reason}; {REQUIRE_VARIABLE}={name} makes this a failure")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --regenerate, which rewrites golden files for review."""
    parser.addoption("--regenerate", action="store_true", help="rewrite golden files")


def _open_fds() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own fd
            continue
    return found


def _children() -> set[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
    return set(map(int, text.split()))


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    # A leaked fd could keep a VM alive; a leaked child could be a tracer.
    fds, children = _open_fds(), _children()
    yield
    leaked_children = _children() - children
    assert not leaked_children, f"child processes left behind: {leaked_children}"
    leaked = {fd: to for fd, to in _open_fds().items() if fds.get(fd) != to}
    # pytest's own capture files may be re-opened between phases.
    leaked = {fd: to for fd, to in leaked.items() if "/tmp/" not in to or "deleted" not in to}
    assert not leaked, f"fds left open: {leaked}"


@pytest.fixture(scope="session")
def compile_victim(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Return a function that compiles a C victim once a session and returns its path."""
    directory = tmp_path_factory.mktemp("victims")

    @functools.cache
    def compiled(source: Path) -> Path:
        target = directory / source.stem
        command = ["cc", "-O1", "-Wall", "-Werror", "-pthread", "-o", str(target), str(source)]
        subprocess.run(command, check=True)
        return target

    return compiled


@pytest.fixture(scope="session")
def parked(compile_victim: Callable[[Path], Path]) -> Path:
    """Return the program that blocks in a system call and reports what came of it."""
    return compile_victim(Path(__file__).parent / "functional" / "victims" / "parked.c")


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Tell:
    """Have what prints a line where everybody sees it: counts that a run is to show."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", end=" ", flush=True)

    return say
