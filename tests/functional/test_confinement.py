# SPDX-License-Identifier: Apache-2.0
"""AppArmor and SELinux rules: compiled with the distribution's tools, each one explained.

Compiled, not loaded: no test here says what a confined host does with them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
from confinement import (
    ABSTRACTIONS,
    APPARMOR,
    EMULATED,
    HOOK,
    PROFILE_OF_A_VM,
    ROOT,
    include,
    preprocessed,
    run,
    system_profiles,
)
from support import require_tool

from kvmi_libvirt.doctor.look_security import POLICY_MARK

SELINUX: Final = ROOT / "packaging" / "selinux"
SELINUX_BASE: Final = ROOT / "tests" / "data" / "selinux" / "base.cil"
MODULES: Final = (SELINUX / "kvmi-libvirt.cil", SELINUX / f"{EMULATED}.cil")
OPTIONAL_TYPES: Final = (
    *("virt_hook_unconfined_t", "virtd_t", "unconfined_service_t", "unconfined_t"),
    *("svirt_t", "virtqemud_t", "virt_hook_t", "bin_t", "shell_exec_t", "qemu_exec_t"),
)


# -- AppArmor ----------------------------------------------------------------------------


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    return system_profiles(tmp_path)


@pytest.mark.parametrize("abstraction", ABSTRACTIONS)
def test_an_abstraction_compiles_in_the_profile_it_is_for(profiles: Path, abstraction: str) -> None:
    is_hook = abstraction == HOOK
    local = "usr.sbin.libvirtd" if is_hook else "abstractions/libvirt-qemu"
    profile = "usr.sbin.libvirtd" if is_hook else PROFILE_OF_A_VM
    include(profiles, abstraction, local)

    done = run("apparmor_parser", "-QTK", "--base", profiles, profiles / profile)
    seen = preprocessed(profiles, profile)

    assert done.returncode == 0, done.stderr
    # The profile really has the rules: "if exists" would hide a wrong name.
    for rule in rules(APPARMOR / "abstractions" / abstraction):
        assert rule in seen


def test_all_abstractions_for_a_vm_go_together(profiles: Path) -> None:
    for abstraction in ABSTRACTIONS:
        if abstraction != HOOK:
            include(profiles, abstraction, "abstractions/libvirt-qemu")

    done = run("apparmor_parser", "-QTK", "--base", profiles, profiles / PROFILE_OF_A_VM)

    assert done.returncode == 0, done.stderr


def test_what_the_hook_needs_is_in_the_profile_of_libvirtd(profiles: Path) -> None:
    # The README's "What is not here, and why" relies on it.
    own = {line.strip() for line in preprocessed(profiles, "usr.sbin.libvirtd").splitlines()}

    assert own >= {
        *("/etc/libvirt/hooks/** rmix,", "/usr/bin/* PUx,", "/** rwmkl,"),
        'signal (send) set=("kill", "term") peer=unconfined,',
        "ptrace (read,trace) peer=libvirt-*,",
    }


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


def compiled(
    directory: Path, *modules: Path, without: str | None = None, expand: bool = True
) -> str:
    """Compile modules with a base policy that may lack a name; return the allow rules.

    Parameters
        expand  attributes, so that each rule names types
    """
    require_tool("secilc", "secilc")
    require_tool("sesearch", "setools")
    lines = SELINUX_BASE.read_text().splitlines(keepends=True)
    if without is not None:
        kept = [line for line in lines if not re.match(rf"\((type|class) {without}\b", line)]
        assert len(kept) == len(lines) - 1
        lines = [re.sub(rf"(\(classorder .*) {without}\b", r"\1", line) for line in kept]
    (directory / "base.cil").write_text("".join(lines))
    options = ["-M", "true", "-f", "/dev/null", *(["--expand-size", "100"] if expand else [])]
    sources = (directory / "base.cil", *modules)
    done = run("secilc", *options, "-o", directory / "policy", *sources)
    assert done.returncode == 0, done.stderr
    found = run("sesearch", "-A", directory / "policy")
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory with the policy that has all names, and its rules."""
    directory = tmp_path_factory.mktemp("selinux")
    (directory / "rules").write_text(compiled(directory, MODULES[0]))
    return directory


def allowed(rules: str) -> dict[tuple[str, str, str], set[str]]:
    """Return the permissions of each (source, target, class), whatever a boolean says."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for line in rules.splitlines():
        rule = re.match(r"allow (\S+) (\S+):(\S+) (?:\{ (.*) \}|(\S+?));", line)
        assert rule is not None, line
        found.setdefault((rule[1], rule[2], rule[3]), set()).update((rule[4] or rule[5]).split())
    return found


def allowed_in(policy: Path) -> dict[tuple[str, str, str], set[str]]:
    return allowed((policy / "rules").read_text())


@pytest.mark.parametrize(
    "helper", ["virt_hook_unconfined_t", "virtd_t", "unconfined_service_t", "unconfined_t"]
)
def test_a_helper_may_trace_a_guest_and_hand_it_a_socket(policy: Path, helper: str) -> None:
    rights = allowed_in(policy)

    assert rights.get((helper, "svirt_t", "process")) == {"ptrace"}
    assert rights.get(("svirt_t", helper, "fd")) == {"use"}
    for kind in ("unix_stream_socket", "tcp_socket", "vsock_socket"):
        expected = {"getattr", "getopt", "read", "write", "shutdown"}
        assert rights.get(("svirt_t", helper, kind)) == expected


def test_a_guest_gets_nothing_else(policy: Path) -> None:
    # Above all no "connectto": it uses a socket that was handed to it, and opens none.
    kinds = {kind for source, _, kind in allowed_in(policy) if source == "svirt_t"}

    assert kinds == {"fd", "unix_stream_socket", "tcp_socket", "vsock_socket"}
    assert not any("connectto" in rights for rights in allowed_in(policy).values())


def test_hooks_run_only_where_the_boolean_says_so(policy: Path) -> None:
    transition = run("sesearch", "-T", "-s", "virtqemud_t", policy / "policy").stdout
    lines = (policy / "rules").read_text().splitlines()
    rights = [line for line in lines if line.startswith("allow virtqemud_t ")]

    expected = "type_transition virtqemud_t virt_hook_t:process virt_hook_unconfined_t;"
    assert transition.strip() == f"{expected} [ virt_hooks_unconfined ]:True"
    assert rights
    assert all(line.endswith("[ virt_hooks_unconfined ]:True") for line in rights)


def test_a_guest_on_the_emulated_kernel_runs_programs_and_traces_its_own(tmp_path: Path) -> None:
    rights = allowed(compiled(tmp_path, MODULES[1]))
    execute = {"execute", "execute_no_trans", "getattr", "map", "open", "read"}

    del rights["kernel_t", "kernel_t", "process"]  # the base policy's
    assert rights == {
        ("svirt_t", "bin_t", "file"): {*execute, "entrypoint"},
        ("svirt_t", "shell_exec_t", "file"): execute,
        ("svirt_t", "qemu_exec_t", "file"): execute,
        ("svirt_t", "svirt_t", "process"): {"ptrace"},
        ("svirt_t", "svirt_t", "dir"): {"getattr", "open", "read", "search"},
        ("svirt_t", "svirt_t", "lnk_file"): {"getattr", "read"},
        ("svirt_t", "svirt_t", "file"): {"getattr", "open", "read", "write"},
    }


@pytest.mark.parametrize("name", [*OPTIONAL_TYPES, "vsock_socket"])
def test_a_policy_that_lacks_a_name_still_takes_the_modules(tmp_path: Path, name: str) -> None:
    kept = compiled(tmp_path, *MODULES, without=name)

    # What does not need that name is there: with a guest and a helper, the channel.
    assert bool(re.search(r"^allow svirt_t \S+:fd use", kept, re.MULTILINE)) == (name != "svirt_t")
    assert re.search(rf"\b{name}\b", kept) is None


def test_the_kernels_policy_tells_that_the_module_is_in_it(tmp_path: Path) -> None:
    # The doctor looks for this name, compiled as semodule(8) does it.
    for modules, is_there in ((MODULES, True), (MODULES[1:], False)):
        compiled(tmp_path, *modules, expand=False)

        assert (POLICY_MARK in (tmp_path / "policy").read_bytes()) is is_there


# -- both --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readme", "sources"),
    [
        (APPARMOR / "README.md", sorted((APPARMOR / "abstractions").iterdir())),
        (SELINUX / "README.md", MODULES),
    ],
    ids=["apparmor", "selinux"],
)
def test_the_readme_explains_each_rule(readme: Path, sources: list[Path]) -> None:
    in_rules = sorted(number for path in sources for number in numbers(path))
    explained = re.findall(r"^\| (\d+) \|", readme.read_text(), re.MULTILINE)

    assert in_rules == list(range(1, len(in_rules) + 1))
    assert [int(number) for number in explained] == in_rules
