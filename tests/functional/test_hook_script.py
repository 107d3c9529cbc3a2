# SPDX-License-Identifier: Apache-2.0
"""The hook script, run as libvirt runs it: its exit code can kill a VM or save it.

The script runs unchanged where no helper is needed; else a copy with its constants
replaced: another interpreter, a short deadline, no path of this machine.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SCRIPT: Final = Path(__file__).resolve().parents[2] / "hooks" / "qemu.d" / "50-kvmi-libvirt"
NAME: Final = "db1"
UUID: Final = "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01"
URI: Final = "urn:kvmi-libvirt:introspection:1.0"

MAY_REFUSE: Final = ("prepare", "started", "migrate", "restore")
NEVER: Final = ("stopped", "release", "reconnect")
UNKNOWN: Final = ("start", "attach", "frobnicate", "PREPARE", "-", "")

ENVIRONMENT: Final = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
TOO_LONG_S: Final = 20.0
VETO: Final = 10

pytestmark = pytest.mark.skipif(
    not Path("/usr/bin/python3").exists(), reason="no /usr/bin/python3, which the script names"
)


def domain(mode: str | None = None, *, has_element: bool = True, padding: int = 0) -> bytes:
    attribute = "" if mode is None else f' mode="{mode}"'
    element = f'<k:introspection xmlns:k="{URI}"{attribute}/>' if has_element else ""
    text = f"<domain><name>{NAME}</name><uuid>{UUID}</uuid><metadata>{element}</metadata>"
    return (text + f"<description>{'x' * padding}</description></domain>").encode()


PLAIN: Final = domain(has_element=False)
OPTIONAL: Final = domain("optional")
REQUIRED: Final = domain("required")


def call(
    script: Path,
    operation: str | None,
    xml: bytes,
    *,
    arguments: Sequence[str | bytes] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run *script* as libvirt does; like libvirt, wait until stdout and stderr are closed."""
    if arguments is None:
        suboperation = "end" if operation in ("stopped", "release") else "begin"
        arguments = [NAME, operation or "", suboperation, "-"]
    done = subprocess.run(
        [script, *arguments],
        input=xml,
        capture_output=True,
        env=ENVIRONMENT,
        cwd="/",
        timeout=TOO_LONG_S,
        check=False,
    )
    assert done.stdout == b"", "libvirt takes stdout for the domain's new XML"
    return done


def verdict(done: subprocess.CompletedProcess[bytes]) -> tuple[int, str]:
    return done.returncode, done.stderr.decode()


@dataclass(frozen=True)
class Helper:
    """A copy of the script whose interpreter is a shell script of the test's."""

    script: Path
    directory: Path

    def noted(self, name: str) -> str:
        return (self.directory / name).read_text(encoding="utf-8")


@pytest.fixture
def helper(tmp_path: Path) -> Callable[..., Helper]:
    """Return a function that makes a Helper from the shell text it shall run."""

    def make(shell: str | None, *, deadline_s: float = 30, python: str | None = None) -> Helper:
        if python is None:
            fake = tmp_path / "python3"
            python = str(fake)
        if shell is not None:
            fake.write_text(f"#!/bin/sh\ncd {tmp_path}\n{shell}\n", encoding="utf-8")
            fake.chmod(0o755)
        replaced = {
            "PYTHON": repr(python),
            "DEADLINE_S": repr(deadline_s),
            "STATE_DIR": repr(str(tmp_path / "state")),
            "HOST_POLICY": repr(str(tmp_path / "host-policy.xml")),
        }
        text = SCRIPT.read_text(encoding="utf-8")
        for name, value in replaced.items():
            text, count = re.subn(rf"(?m)^{name} = .*$", lambda _: f"{name} = {value}", text)  # noqa: B023
            assert count == 1, f"the script has no line {name} = ..."
        assert text.count('"/dev/log"') == 1
        text = text.replace('"/dev/log"', repr(str(tmp_path / "log")))
        script = tmp_path / "50-kvmi-libvirt"
        script.write_text(text, encoding="utf-8")
        script.chmod(0o755)
        return Helper(script, tmp_path)

    return make


# -- domains that do not concern us ------------------------------------------------------


def test_it_can_be_executed() -> None:
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize("operation", [*MAY_REFUSE, *NEVER, *UNKNOWN])
def test_a_domain_without_an_element_passes(helper: Callable[..., Helper], operation: str) -> None:
    made = helper("touch called; exit 10")

    assert verdict(call(made.script, operation, PLAIN)) == (0, "")
    assert not (made.directory / "called").exists()


@pytest.mark.parametrize("operation", [*UNKNOWN, "started", "reconnect"])
def test_the_script_itself_passes_without_a_copy_being_made(operation: str) -> None:
    xml = REQUIRED if operation in UNKNOWN else PLAIN

    assert verdict(call(SCRIPT, operation, xml)) == (0, "")


@pytest.mark.parametrize("arguments", [[], [NAME], [NAME, ""], [NAME, "reconnect"]])
def test_missing_arguments_are_no_reason_to_refuse(arguments: list[str]) -> None:
    assert verdict(call(SCRIPT, None, PLAIN, arguments=arguments)) == (0, "")


@pytest.mark.parametrize("operation", UNKNOWN)
def test_an_operation_of_a_later_libvirt_is_not_ours(
    helper: Callable[..., Helper], operation: str
) -> None:
    made = helper("touch called; exit 10")

    assert verdict(call(made.script, operation, REQUIRED)) == (0, "")
    assert not (made.directory / "called").exists()


HEAD: Final = f'<host-policy xmlns="{URI}1.0">'
ASSIGN: Final = '<assign><match name="db*"/></assign></host-policy>'


@pytest.mark.parametrize("operation", MAY_REFUSE)
@pytest.mark.parametrize(
    "policy",
    [
        f"{HEAD}{ASSIGN}",
        f"<?xml version='1.0'?>\n<!-- a -->{HEAD}<!-- b -->{ASSIGN}",
        f'<k:host-policy xmlns:k="{URI}1.0"><k:assign/></k:host-policy>',
        f"{HEAD}<![CDATA[<!--]]>{ASSIGN}<!-- -->",
        f"<?x <!-- ?>{HEAD}{ASSIGN}<!-- -->",
        f"<?xml version='1.0'?><?x <!-- ?>{HEAD}{ASSIGN}<!-- -->",
        f"<!DOCTYPE x>{HEAD}</host-policy>",
        f"{HEAD}{' ' * (1 << 20)}{ASSIGN}",
        "<x/>",
        "",
    ],
    ids=lambda text: text[-40:],
)
def test_a_host_policy_that_may_assign_concerns_every_start(
    helper: Callable[..., Helper], operation: str, policy: str
) -> None:
    made = helper("touch called")
    (made.directory / "host-policy.xml").write_text(policy, encoding="utf-8")

    assert verdict(call(made.script, operation, PLAIN)) == (0, "")
    assert (made.directory / "called").exists()


@pytest.mark.parametrize("operation", MAY_REFUSE)
def test_a_host_policy_that_cannot_be_read_concerns_every_start(
    helper: Callable[..., Helper], operation: str
) -> None:
    made = helper("touch called")
    (made.directory / "host-policy.xml").mkdir()

    assert verdict(call(made.script, operation, PLAIN)) == (0, "")
    assert (made.directory / "called").exists()


@pytest.mark.parametrize("operation", MAY_REFUSE)
def test_a_host_policy_that_assigns_nothing_costs_no_helper(
    helper: Callable[..., Helper], operation: str
) -> None:
    made = helper("touch called; exit 10")
    skeleton = SCRIPT.parents[2] / "packaging" / "config" / "host-policy.xml"
    assert b"<assign" in skeleton.read_bytes()  # in its comments
    shutil.copy(skeleton, made.directory / "host-policy.xml")

    assert verdict(call(made.script, operation, PLAIN)) == (0, "")
    assert not (made.directory / "called").exists()


@pytest.mark.parametrize("operation", NEVER)
def test_recorded_state_concerns_the_end_of_a_vm(
    helper: Callable[..., Helper], operation: str
) -> None:
    made = helper("touch called")
    (made.directory / "state").mkdir()
    (made.directory / "state" / f"{UUID}.json").write_text("{}", encoding="utf-8")

    assert verdict(call(made.script, operation, PLAIN)) == (0, "")
    assert (made.directory / "called").exists()


@pytest.mark.parametrize("xml", [b"", b"\xff\xfe\0", b"<uuid>", b"<uuid>\0/../x</uuid>"])
@pytest.mark.parametrize("operation", [*MAY_REFUSE, *NEVER])
def test_stdin_of_any_kind_passes(operation: str, xml: bytes) -> None:
    assert verdict(call(SCRIPT, operation, xml)) == (0, "")


def test_ten_mebibytes_pass(helper: Callable[..., Helper]) -> None:
    made = helper("cat > got; touch called")

    plain = domain(has_element=False, padding=10 << 20)
    assert verdict(call(made.script, "started", plain)) == (0, "")
    assert not (made.directory / "called").exists()

    large = domain("required", padding=10 << 20)
    assert verdict(call(made.script, "started", large)) == (0, "")
    assert (made.directory / "got").read_bytes() == large


# -- the helper --------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [*MAY_REFUSE, *NEVER])
def test_the_helper_is_asked_with_libvirts_arguments_and_the_xml(
    helper: Callable[..., Helper], operation: str
) -> None:
    made = helper('printf "%s\\n" "$@" > arguments; cat > got; env > environment')

    assert verdict(call(made.script, operation, OPTIONAL)) == (0, "")

    suboperation = "end" if operation in ("stopped", "release") else "begin"
    assert made.noted("arguments").splitlines() == [
        *("-I", "-m", "kvmi_libvirt.hook"),
        *(NAME, operation, suboperation, "-"),
    ]
    assert made.noted("got").encode() == OPTIONAL
    names = {line.partition("=")[0] for line in made.noted("environment").splitlines()}
    assert names - {"PWD", "OLDPWD", "SHLVL", "_"} == {"PATH", "LC_ALL"}


def test_the_helper_inherits_three_descriptors_and_no_way_to_libvirts_stdout(
    helper: Callable[..., Helper], tmp_path: Path
) -> None:
    program = tmp_path / "helper.py"
    program.write_text(
        f"""#!{sys.executable} -I
import os, pathlib
found = {{}}
for fd in range(256):
    try:
        found[fd] = os.readlink(f"/proc/self/fd/{{fd}}")
    except FileNotFoundError:
        pass
pathlib.Path({str(tmp_path)!r}, "fds").write_text(repr(found))
print("for libvirt", flush=True)
""",
        encoding="utf-8",
    )
    program.chmod(0o755)
    made = helper(None, python=str(program))

    assert verdict(call(made.script, "migrate", OPTIONAL)) == (0, "")

    links = ast.literal_eval(made.noted("fds"))
    assert links.keys() == {0, 1, 2}
    assert links[0].startswith("/memfd:")
    assert links[1] == "/dev/null"
    assert links[2].startswith("pipe:")


@pytest.mark.parametrize("operation", MAY_REFUSE)
@pytest.mark.parametrize("xml", [OPTIONAL, REQUIRED])
def test_a_veto_of_the_helper_is_libvirts_answer(
    helper: Callable[..., Helper], operation: str, xml: bytes
) -> None:
    # Also for a domain that does not say "required": the helper knows more than its text.
    made = helper("echo 'kvmi-libvirt: no tool listens' >&2; exit 10")

    assert verdict(call(made.script, operation, xml)) == (1, "kvmi-libvirt: no tool listens\n")


@pytest.mark.parametrize("operation", [*MAY_REFUSE, *NEVER])
def test_what_a_successful_helper_says_is_dropped(
    helper: Callable[..., Helper], operation: str
) -> None:
    made = helper("echo a warning >&2")

    assert verdict(call(made.script, operation, REQUIRED)) == (0, "")


BROKEN: Final = {
    "exits 1 with a traceback": (
        "printf 'Traceback (most recent call last):\\n  File x\\nKeyError: 5\\n' >&2; exit 1",
        "is broken (exit 1): KeyError: 5",
    ),
    "exits 1 silently": ("exit 1", "is broken (exit 1): "),
    "exits 127": ("exit 127", "is broken (exit 127): "),
    "is killed": ("kill -KILL $$", "is broken (exit -9): "),
    "segfaults": ("kill -SEGV $$", "is broken (exit -11): "),
    "says no UTF-8": ("printf '\\377\\n' >&2; exit 1", "is broken (exit 1): "),
}


@pytest.mark.parametrize("operation", MAY_REFUSE)
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_helper_refuses_where_introspection_is_demanded(
    helper: Callable[..., Helper], operation: str, how: str
) -> None:
    shell, reason = BROKEN[how]
    made = helper(shell)

    code, text = verdict(call(made.script, operation, REQUIRED))

    assert code == 1
    assert len(text.splitlines()) == 1
    assert text.startswith(f"kvmi-libvirt: the hook's helper {reason}")


@pytest.mark.parametrize("operation", [*MAY_REFUSE, *NEVER])
@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("xml", [OPTIONAL, domain()])
def test_a_broken_helper_stops_no_other_vm(
    helper: Callable[..., Helper], operation: str, how: str, xml: bytes
) -> None:
    made = helper(BROKEN[how][0])

    assert verdict(call(made.script, operation, xml)) == (0, "")


@pytest.mark.parametrize("operation", NEVER)
@pytest.mark.parametrize("how", [*BROKEN, "vetoes"])
def test_a_broken_helper_ends_no_running_vm(
    helper: Callable[..., Helper], operation: str, how: str
) -> None:
    made = helper("exit 10" if how == "vetoes" else BROKEN[how][0])

    assert verdict(call(made.script, operation, REQUIRED)) == (0, "")


@pytest.mark.parametrize("what", ["missing", "not executable", "no program", "a directory"])
def test_an_interpreter_that_is_gone_is_a_broken_helper(
    helper: Callable[..., Helper], tmp_path: Path, what: str
) -> None:
    # The package was removed, or is half upgraded, and libvirtd restarts.
    interpreter = tmp_path / "gone" / "python3"
    interpreter.parent.mkdir()
    if what == "not executable":
        interpreter.write_text("#!/bin/sh\n", encoding="utf-8")
    elif what == "no program":
        interpreter.write_bytes(b"\0\1\2\3")
        interpreter.chmod(0o755)
    elif what == "a directory":
        interpreter.mkdir()
    made = helper(None, python=str(interpreter))

    code, text = verdict(call(made.script, "started", REQUIRED))
    assert code == 1
    assert len(text.splitlines()) == 1
    assert "helper is broken" in text
    assert verdict(call(made.script, "started", OPTIONAL)) == (0, "")
    for operation in NEVER:
        assert verdict(call(made.script, operation, REQUIRED)) == (0, "")


def test_a_broken_helper_is_told_to_syslog_too(helper: Callable[..., Helper]) -> None:
    # libvirt drops the stderr of a hook that succeeds.
    made = helper("echo 'KeyError: 5' >&2; exit 1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(made.directory / "log"))
        syslog.settimeout(5)
        call(made.script, "reconnect", REQUIRED)
        said = syslog.recv(4096).decode()

    assert said.startswith("<27>kvmi-libvirt: domain db1, reconnect: ")
    assert said.endswith("is broken (exit 1): KeyError: 5")


def test_a_syslog_that_does_not_read_is_not_waited_for(helper: Callable[..., Helper]) -> None:
    made = helper("exit 1")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
    ):
        syslog.bind(str(made.directory / "log"))
        other.setblocking(False)
        other.connect(str(made.directory / "log"))
        with contextlib.suppress(BlockingIOError):
            for _ in range(100_000):
                other.send(b"x" * 1000)
            pytest.fail("the queue of a syslog that does not read has no end")

        assert verdict(call(made.script, "reconnect", REQUIRED)) == (0, "")


def test_much_on_stderr_is_read_and_does_not_block_the_helper(
    helper: Callable[..., Helper],
) -> None:
    made = helper("head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 1")

    code, text = verdict(call(made.script, "started", REQUIRED))

    assert code == 1
    assert len(text.splitlines()) == 1
    assert len(text) < 10_000


# -- bounded in time ---------------------------------------------------------------------


def is_gone(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("operation", "xml", "code"),
    [
        ("started", REQUIRED, 1),
        ("started", OPTIONAL, 0),
        ("prepare", REQUIRED, 1),
        *((operation, REQUIRED, 0) for operation in NEVER),
    ],
)
def test_a_helper_that_hangs_is_ended_at_the_deadline(
    helper: Callable[..., Helper], operation: str, xml: bytes, code: int
) -> None:
    made = helper("echo $$ > pid; exec sleep 60", deadline_s=0.3)

    before = time.monotonic()
    found, text = verdict(call(made.script, operation, xml))

    assert found == code
    assert time.monotonic() - before < TOO_LONG_S / 2
    assert len(text.splitlines()) == code
    if code:
        assert "did not end in time" in text
    assert is_gone(int(made.noted("pid")))


def test_a_helper_that_hangs_stubbornly_is_ended_too(helper: Callable[..., Helper]) -> None:
    made = helper("trap '' TERM INT HUP; echo $$ > pid; while :; do sleep 1; done", deadline_s=0.3)

    code, _text = verdict(call(made.script, "started", REQUIRED))

    assert code == 1
    assert is_gone(int(made.noted("pid")))


@pytest.mark.parametrize("code", [0, VETO])
def test_a_grandchild_that_keeps_stderr_open_is_not_waited_for(
    helper: Callable[..., Helper], code: int
) -> None:
    # A worker that still holds QEMU may live on; libvirt would wait for its stderr.
    made = helper(f"sleep 60 & echo $! > pid; echo reason >&2; exit {code}")

    before = time.monotonic()
    found, text = verdict(call(made.script, "started", REQUIRED))

    try:
        assert time.monotonic() - before < TOO_LONG_S / 2
        assert (found, text) == ((1, "reason\n") if code else (0, ""))
        assert not is_gone(int(made.noted("pid")))
    finally:
        os.kill(int(made.noted("pid")), signal.SIGKILL)
        wait_until(lambda: is_gone(int(made.noted("pid"))), what="the grandchild ended")


def test_a_grandchild_survives_the_helpers_deadline(helper: Callable[..., Helper]) -> None:
    # Killing the worker would leave QEMU's thread as it is; only the helper is ended.
    made = helper("sleep 60 & echo $! > worker; exec sleep 60", deadline_s=0.3)

    call(made.script, "started", REQUIRED)

    worker = int(made.noted("worker"))
    try:
        assert not is_gone(worker)
    finally:
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: is_gone(worker), what="the grandchild ended")


# -- odd circumstances -------------------------------------------------------------------


@pytest.mark.parametrize("operation", [*MAY_REFUSE, *NEVER])
def test_a_closed_stdin_stops_no_vm(operation: str) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" <&-', "sh", SCRIPT, NAME, operation, "begin", "-"],
        capture_output=True,
        env=ENVIRONMENT,
        cwd="/",
        timeout=TOO_LONG_S,
        check=False,
    )

    assert (done.returncode, done.stdout) == (0, b"")
    assert b"Traceback" not in done.stderr


def test_a_name_that_is_no_utf_8_passes_through(helper: Callable[..., Helper]) -> None:
    made = helper('printf "%s" "$4" > name; echo "domain $4" >&2; exit 10')

    done = call(made.script, None, REQUIRED, arguments=[b"db\xff1", "started", "begin", "-"])

    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert (made.directory / "name").read_bytes() == b"db\xff1"


def test_a_symbolic_link_to_the_script_works(tmp_path: Path) -> None:
    link = tmp_path / "50-kvmi-libvirt"
    link.symlink_to(SCRIPT)

    assert verdict(call(link, "started", PLAIN)) == (0, "")


def test_an_empty_environment_is_enough(helper: Callable[..., Helper]) -> None:
    made = helper("echo reason >&2; exit 10")
    done = subprocess.run(
        [made.script, NAME, "started", "begin", "-"],
        input=REQUIRED,
        capture_output=True,
        env={},
        timeout=TOO_LONG_S,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"reason\n")


# -- with the package's own helper -------------------------------------------------------


@pytest.fixture
def whole(helper: Callable[..., Helper], tmp_path: Path) -> Helper:
    """Return the script with the real helper, whose every path is a temporary one."""
    program = tmp_path / "helper.py"
    program.write_text(
        f"""#!{sys.executable} -I
import functools, pathlib, sys
here = pathlib.Path({str(tmp_path)!r})
from kvmi_libvirt import hook, hooklog, state
from kvmi_libvirt.policy import host
hook.load_host_policy = functools.partial(host.load_host_policy, here / "host-policy.xml")
hook.hooklog.start = functools.partial(
    hooklog.start, log_dir=here, syslog_socket=str(here / "no-syslog"))
hook.Hook = functools.partial(hook.Hook, state=state.StateDir(here / "state"), run_dir=here)
assert sys.argv[1:4] == ["-I", "-m", "kvmi_libvirt.hook"]
sys.exit(hook.main(sys.argv[4:]))
""",
        encoding="utf-8",
    )
    program.chmod(0o755)
    return helper(None, python=str(program))


SOURCE: Final = '<k:source type="unix" path="/run/kvmi/tool.sock"/>'


def whole_domain(mode: str, body: str = SOURCE) -> bytes:
    element = f'<k:introspection xmlns:k="{URI}" mode="{mode}">{body}</k:introspection>'
    return (
        f"<domain type='kvm' id='1'><name>{NAME}</name><uuid>{UUID}</uuid>"
        f"<metadata>{element}</metadata><memory>262144</memory><vcpu>1</vcpu></domain>"
    ).encode()


def test_a_good_policy_passes_prepare(whole: Helper) -> None:
    assert verdict(call(whole.script, "prepare", whole_domain("required"))) == (0, "")


def test_a_bad_policy_is_refused_with_its_line_or_logged(whole: Helper) -> None:
    code, text = verdict(call(whole.script, "prepare", whole_domain("required", body="")))
    assert code == 1
    assert re.fullmatch(
        r".* \(XML of domain 'db1':1\); domain 'db1' requires introspection; "
        r"next: kvmi-libvirt doctor db1\n",
        text,
    )

    assert verdict(call(whole.script, "prepare", whole_domain("optional", body=""))) == (0, "")
    assert "WARNING: domain db1: prepare: " in whole.noted("hook.log")


def test_a_start_without_qemu_is_refused_or_logged(whole: Helper) -> None:
    code, text = verdict(call(whole.script, "started", whole_domain("required")))
    assert code == 1
    assert "no pidfile" in text
    assert len(text.splitlines()) == 1

    assert verdict(call(whole.script, "started", whole_domain("optional"))) == (0, "")


@pytest.mark.parametrize("operation", NEVER)
@pytest.mark.parametrize("mode", ["required", "requird"])
def test_damaged_state_ends_no_running_vm(whole: Helper, operation: str, mode: str) -> None:
    (whole.directory / "state").mkdir()
    (whole.directory / "state" / f"{UUID}.json").write_bytes(b"\xff{")

    assert verdict(call(whole.script, operation, whole_domain(mode))) == (0, "")
    if operation != "reconnect":
        assert list((whole.directory / "state").iterdir()) == []


def test_ten_mebibytes_of_required_xml_are_judged(whole: Helper) -> None:
    padding = b"<description>" + b"x" * (10 << 20) + b"</description></domain>"
    xml = whole_domain("required", body="").replace(b"</domain>", padding)

    code, text = verdict(call(whole.script, "prepare", xml))

    assert code == 1
    assert len(text.splitlines()) == 1
    assert len(text) < 1000


# -- the package is gone, and the host assigns -------------------------------------------

NOVA = (
    b"<domain><name>db1</name><uuid>5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01</uuid><metadata>"
    b'<nova:instance xmlns:nova="http://openstack.org/xmlns/libvirt/nova/1.1">'
    b'<nova:name>vip</nova:name><nova:flavor name="guarded.large" id="42"><nova:extraSpecs>'
    b'<nova:extraSpec name="kvmi:profile">protect</nova:extraSpec></nova:extraSpecs></nova:flavor>'
    b'<nova:owner><nova:project uuid="b1d2c3e4f5a647b8a9c0d1e2f3a4b5c6">vip</nova:project>'
    b"</nova:owner></nova:instance></metadata></domain>"
)


def assign(*modes_and_matches: tuple[str, str]) -> str:
    return "<host-policy>" + "".join(
        f"<assign profile='observe' mode='{mode}'>{matches}<source type='unix'/></assign>"
        for mode, matches in modes_and_matches
    )


@pytest.mark.parametrize(
    ("match", "fits"),
    [
        ('name="db*"', True),
        ('name="web*"', False),
        ('nova-flavor="guarded.*"', True),
        ('nova-flavor="vip"', False),
        ('nova-flavor-id="42"', True),
        ('nova-flavor-id="4"', False),
        ('nova-extra-spec="kvmi:profile=protect"', True),
        ('nova-extra-spec="kvmi:other=protect"', False),
        ('nova-project="b1d2c3e4-f5a6-47b8-a9c0-d1e2f3a4b5c6"', True),
        ('nova-project="vip"', False),
        ('nova-flavor="guarded.*" name="web*"', False),
        ('uuid="5A4A2B4E-7C1D-4E0F-9A52-0D6F6F1B0A01"', True),
        ('proxmox-vmid="100"', False),
        ('of-a-later-release="x"', True),
    ],
)
def test_without_the_package_an_assignment_still_demands(
    helper: Callable[..., Helper], match: str, *, fits: bool
) -> None:
    made = helper("exit 1")
    policy = made.directory / "host-policy.xml"
    policy.write_text(assign(("required", f"<match {match}/>")), encoding="utf-8")

    code, text = verdict(call(made.script, "prepare", NOVA))
    assert code == (1 if fits else 0)
    assert text.count("\n") == code
    assert verdict(call(made.script, "reconnect", NOVA))[0] == 0

    # The first that fits counts, and what is commented out does not.
    one = f"<match name='nobody'/><match {match}/>"
    policy.write_text(assign(("optional", one), ("required", one)), encoding="utf-8")
    is_certain = fits and match.partition("=")[0] != "of-a-later-release"
    assert verdict(call(made.script, "prepare", NOVA))[0] == (fits and not is_certain)
    policy.write_text(f"<!-- {assign(('required', one))} -->", encoding="utf-8")
    assert verdict(call(made.script, "prepare", NOVA))[0] == 0


def test_without_the_package_a_host_policy_of_garbage_is_passed_over(
    helper: Callable[..., Helper],
) -> None:
    made = helper("exit 1")
    (made.directory / "host-policy.xml").write_bytes(b"<assign mode='required'><match \xff\0>" * 9)

    assert verdict(call(made.script, "prepare", NOVA))[0] == 0
    assert verdict(call(made.script, "prepare", REQUIRED))[0] == 1
