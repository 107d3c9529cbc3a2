# SPDX-License-Identifier: Apache-2.0
"""AppArmor and SELinux rules: compiled with the distribution's tools, each one explained.

Compiled, not loaded: no test here says what a confined host does with them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest
from support import require_tool

ROOT: Final = Path(__file__).resolve().parents[2]
APPARMOR: Final = ROOT / "packaging" / "apparmor"
SELINUX: Final = ROOT / "packaging" / "selinux"
SELINUX_BASE: Final = ROOT / "tests" / "data" / "selinux" / "base.cil"
SYSTEM_PROFILES: Final = Path("/etc/apparmor.d")

ABSTRACTIONS: Final = sorted(path.name for path in (APPARMOR / "abstractions").iterdir())
VM_PROFILE: Final = "libvirt/libvirt-6b766d69-7465-7374-8000-6b766d692d31"
OPTIONAL_TYPES: Final = (
    *("virt_hook_unconfined_t", "virtd_t", "unconfined_service_t", "unconfined_t"),
    *("svirt_t", "virtqemud_t", "virt_hook_t"),
)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


# -- AppArmor ----------------------------------------------------------------------------


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    """Return a copy of the system's profiles, libvirt's among them."""
    require_tool("apparmor_parser", "apparmor")
    if not (SYSTEM_PROFILES / "usr.sbin.libvirtd").exists():
        pytest.skip("no profile of libvirtd (apt-get install libvirt-daemon-system)")
    copy = tmp_path / "apparmor.d"
    shutil.copytree(SYSTEM_PROFILES, copy)
    template = (copy / "libvirt" / "TEMPLATE.qemu").read_text()
    (copy / VM_PROFILE).write_text(template.replace("LIBVIRT_TEMPLATE", Path(VM_PROFILE).name))
    for name in ABSTRACTIONS:
        shutil.copy(APPARMOR / "abstractions" / name, copy / "abstractions")
    return copy


def include(profiles: Path, abstraction: str, local: str) -> None:
    """Do what the README says: add an include line to a local file."""
    file = profiles / "local" / local
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as lines:
        lines.write(f"include if exists <abstractions/{abstraction}>\n")


@pytest.mark.parametrize("abstraction", ABSTRACTIONS)
def test_an_abstraction_compiles_in_the_profile_it_is_for(profiles: Path, abstraction: str) -> None:
    is_hook = abstraction == "kvmi-libvirt-hook"
    local = "usr.sbin.libvirtd" if is_hook else "abstractions/libvirt-qemu"
    profile = profiles / ("usr.sbin.libvirtd" if is_hook else VM_PROFILE)
    include(profiles, abstraction, local)

    done = run("apparmor_parser", "-QTK", "--base", profiles, profile)
    seen = run("apparmor_parser", "--preprocess", "--base", profiles, profile).stdout

    assert done.returncode == 0, done.stderr
    # The profile really has the rules: "if exists" would hide a wrong name.
    for rule in rules(APPARMOR / "abstractions" / abstraction):
        assert rule in seen


def test_all_abstractions_for_a_vm_go_together(profiles: Path) -> None:
    for abstraction in ABSTRACTIONS:
        if abstraction != "kvmi-libvirt-hook":
            include(profiles, abstraction, "abstractions/libvirt-qemu")

    done = run("apparmor_parser", "-QTK", "--base", profiles, profiles / VM_PROFILE)

    assert done.returncode == 0, done.stderr


def rules(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not _is_comment(line)]


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith(("#", ";"))


def numbers(path: Path) -> list[int]:
    """Return the numbers of the comments that introduce rules."""
    return [int(n) for n in re.findall(r"^\s*[#;] (\d+)\. ", path.read_text(), re.MULTILINE)]


def test_every_apparmor_rule_stands_below_a_number() -> None:
    for name in ABSTRACTIONS:
        text = (APPARMOR / "abstractions" / name).read_text()
        first = re.search(r"^\s*# \d+\. ", text, re.MULTILINE)
        assert first is not None, name
        head = text[: first.start()].splitlines()
        assert [line for line in head if line and not _is_comment(line)] == []


# -- SELinux -----------------------------------------------------------------------------


def compile_module(directory: Path, *, without: str | None = None) -> str:
    """Compile the module with a base policy that may lack a name; return the allow rules."""
    require_tool("secilc", "secilc")
    require_tool("sesearch", "setools")
    lines = SELINUX_BASE.read_text().splitlines(keepends=True)
    if without is not None:
        kept = [line for line in lines if not re.match(rf"\((type|class) {without}\b", line)]
        assert len(kept) == len(lines) - 1
        lines = [re.sub(rf"(\(classorder .*) {without}\b", r"\1", line) for line in kept]
    (directory / "base.cil").write_text("".join(lines))
    # Attributes are expanded, so that each rule names types.
    options = ("-M", "true", "--expand-size", "100", "-f", "/dev/null")
    sources = (directory / "base.cil", SELINUX / "kvmi-libvirt.cil")
    done = run("secilc", *options, "-o", directory / "policy", *sources)
    assert done.returncode == 0, done.stderr
    found = run("sesearch", "-A", directory / "policy")
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory with the policy that has all names, and its rules."""
    directory = tmp_path_factory.mktemp("selinux")
    (directory / "rules").write_text(compile_module(directory))
    return directory


def allowed(policy: Path) -> dict[tuple[str, str, str], set[str]]:
    """Return the permissions of each (source, target, class), whatever a boolean says."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for line in (policy / "rules").read_text().splitlines():
        rule = re.match(r"allow (\S+) (\S+):(\S+) (?:\{ (.*) \}|(\S+?));", line)
        assert rule is not None, line
        found.setdefault((rule[1], rule[2], rule[3]), set()).update((rule[4] or rule[5]).split())
    return found


@pytest.mark.parametrize(
    "helper", ["virt_hook_unconfined_t", "virtd_t", "unconfined_service_t", "unconfined_t"]
)
def test_a_helper_may_trace_a_guest_and_hand_it_a_socket(policy: Path, helper: str) -> None:
    rights = allowed(policy)

    assert rights.get((helper, "svirt_t", "process")) == {"ptrace"}
    assert rights.get(("svirt_t", helper, "fd")) == {"use"}
    for kind in ("unix_stream_socket", "tcp_socket", "vsock_socket"):
        expected = {"getattr", "getopt", "read", "write", "shutdown"}
        assert rights.get(("svirt_t", helper, kind)) == expected


def test_a_guest_gets_nothing_else(policy: Path) -> None:
    # Above all no "connectto": it uses a socket that was handed to it, and opens none.
    kinds = {kind for source, _, kind in allowed(policy) if source == "svirt_t"}

    assert kinds == {"fd", "unix_stream_socket", "tcp_socket", "vsock_socket"}
    assert not any("connectto" in rights for rights in allowed(policy).values())


def test_hooks_run_only_where_the_boolean_says_so(policy: Path) -> None:
    transition = run("sesearch", "-T", "-s", "virtqemud_t", policy / "policy").stdout
    lines = (policy / "rules").read_text().splitlines()
    rights = [line for line in lines if line.startswith("allow virtqemud_t ")]

    expected = "type_transition virtqemud_t virt_hook_t:process virt_hook_unconfined_t;"
    assert transition.strip() == f"{expected} [ virt_hooks_unconfined ]:True"
    assert rights
    assert all(line.endswith("[ virt_hooks_unconfined ]:True") for line in rights)


@pytest.mark.parametrize("name", [*OPTIONAL_TYPES, "vsock_socket"])
def test_a_policy_that_lacks_a_name_still_takes_the_module(tmp_path: Path, name: str) -> None:
    kept = compile_module(tmp_path, without=name)

    # What does not need that name is there: with a guest and a helper, the channel.
    assert bool(re.search(r"^allow svirt_t \S+:fd use", kept, re.MULTILINE)) == (name != "svirt_t")
    assert re.search(rf"\b{name}\b", kept) is None


# -- both --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readme", "sources"),
    [
        (APPARMOR / "README.md", sorted((APPARMOR / "abstractions").iterdir())),
        (SELINUX / "README.md", [SELINUX / "kvmi-libvirt.cil"]),
    ],
    ids=["apparmor", "selinux"],
)
def test_the_readme_explains_each_rule(readme: Path, sources: list[Path]) -> None:
    in_rules = sorted(number for path in sources for number in numbers(path))
    explained = re.findall(r"^\| (\d+) \|", readme.read_text(), re.MULTILINE)

    assert in_rules == list(range(1, len(in_rules) + 1))
    assert [int(number) for number in explained] == in_rules
