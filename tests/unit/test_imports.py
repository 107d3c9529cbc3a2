# SPDX-License-Identifier: Apache-2.0
"""Imports go one way: the table below is the architecture, and nothing may bend it.

Every ``import`` of the package is read with ast, those inside functions and behind
TYPE_CHECKING too: knowing a type is knowing the module. A module that no row covers
fails, so that its place is decided when it is made.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGE: Final = "kvmi_libvirt"
HOOK: Final = ROOT / "hooks" / "qemu.d" / "50-kvmi-libvirt"
HOST_POLICY_SKELETON: Final = ROOT / "packaging" / "config" / "host-policy.xml"
HOOK_PYTHON: Final = Path("/usr/bin/python3")

BASE: Final = frozenset({"errors", "newtypes", "quoting"})
POLICY: Final = BASE | {"abi", "policy", "datafiles"}
TRACING: Final = BASE | {"abi", "linux", "qemu"}
SERVING: Final = (
    TRACING
    | POLICY
    | {"plan", "tool", "session", "worker", "state", "startmark", "sockdiag"}
    | {"beforehand"}
)
INSTALLING: Final = frozenset({"ownership", "installer", "installation", "daemons", "snippets"})
MACHINES: Final = frozenset({"commandline", "proxmoxfiles"})
DOCTORING: Final = SERVING | INSTALLING | {"introspect", "bounded", "kernel", "hooklog", "doctor"}

MAY_IMPORT: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "": frozenset(),
        "errors": frozenset(),
        "newtypes": frozenset(),
        "quoting": frozenset(),
        "advice": frozenset({"errors", "quoting"}),
        "datafiles": frozenset({"errors"}),
        "abi": BASE | {"abi"},
        "linux": BASE | {"abi"},
        "kernel": BASE | {"abi"},
        "beforehand": POLICY | {"kernel", "plan"},
        "policy": POLICY,
        "policy.model": frozenset({"errors", "abi", "quoting"}),
        "plan": frozenset({"errors", "abi", "policy.model"}),
        "qemu": TRACING,
        "qemu.layout": frozenset(),
        "qemu.process": BASE | {"abi"},
        "qemu.parked": frozenset({"abi"}),
        "qemu.urgency": frozenset(),
        "qemu.looking": BASE | {"abi", "linux", "qemu.parked", "qemu.process"},
        "qemu.kept_signals": BASE | {"abi", "linux", "qemu.process"},
        "qemu.remote": BASE | {"abi", "linux", "qemu.process"},
        "qemu.rehearsal": BASE
        | {"abi", "linux"}
        | {f"qemu.{name}" for name in ("looking", "parked", "process", "remote", "tracee")},
        "qemu.tracee": BASE
        | {"abi", "linux"}
        | {f"qemu.{name}" for name in ("parked", "urgency", "looking", "kept_signals", "process")},
        "session": TRACING | {"plan"},
        "worker": frozenset({"errors", "session", "qemu"}),
        "tool": BASE | {"abi", "tool", "policy.model"},
        "tool.handshake": BASE | {"abi"},
        "tool.wire": BASE | {"abi"},
        "sockdiag": frozenset(),
        "startmark": frozenset({"errors"}),
        "state": BASE | {"startmark"},
        "hooklog": frozenset(),
        "introspect": SERVING | {"introspect"},
        "early": SERVING | {"introspect", "linux", "commandline"},
        "hook": SERVING | {"introspect", "early", "linux", "hooklog"},
        "qmp": BASE,
        "commandline": frozenset({"policy"}),
        "proxmoxfiles": POLICY,
        "machines": TRACING | MACHINES | {"policy", "state", "introspect"},
        "proxmox": SERVING | MACHINES | {"introspect", "hooklog", "machines", "qmp"},
        "installer": frozenset({"errors", "datafiles"}),
        "snippets": frozenset({"errors", "datafiles"}),
        "installation": frozenset({"errors", "datafiles", "installer"}),
        "bounded": frozenset(),
        "ownership": frozenset(),
        "daemons": BASE | {"state"},
        "libvirtio": frozenset({"errors"}),
        "agent": SERVING
        | MACHINES
        | {
            "machines",
            "",
            "introspect",
            "hook",
            "early",
            "libvirtio",
            "linux",
            "agent",
            "agentclient",
        },
        "agentclient": frozenset(),
        "agent.decide": frozenset({"policy.model", "state"}),
        "agent.frames": frozenset(),
        "agent.listening": frozenset({"errors"}),
        "agent.logs": frozenset(),
        "agent.notify": frozenset(),
        "agent.tracing": frozenset(),
        "agent.watch": frozenset(),
        "cli.agent": frozenset({"errors", "agent", "cli"}),
        "emulator": BASE | {"abi", "linux", "emulator"},
        "doctor": DOCTORING | {"", "libvirtio", "agentclient", "agent.settings"},
        "cli": DOCTORING | MACHINES | {"", "libvirtio", "cli", "agentclient", "advice", "machines"},
        "cli.emulate": frozenset({"errors", "emulator", "cli"}),
    }
)
"""Module or package -> what it may import, a package meaning all modules in it.

The longest row that covers a module counts.
"""

DEPENDENCIES: Final = frozenset({"lxml", "libvirt", "prometheus_client"})

PURE: Final = (
    *("abi", "policy.model", "plan", "tool.handshake", "tool.wire", "qemu.parked"),
    *("emulator.kernel", "emulator.protocol", "emulator.filter"),
    *("doctor.report", "doctor.facts", "doctor.check_hook", "doctor.check_host"),
    *("doctor.check_files", "doctor.check_vm"),
)
PURE_STDLIB: Final = frozenset(
    {
        *("__future__", "collections", "dataclasses", "enum", "errno", "functools", "hashlib"),
        *("hmac", "itertools", "operator", "posixpath", "re", "string", "struct", "types"),
        *("typing", "uuid"),
    }
)
"""No file, socket, clock, process or environment can be reached through these."""

LAYOUT_ONLY: Final = ("abi", "emulator")
"""Pure modules that may use ctypes: to lay out structures, never to call."""

CTYPES_CALLS: Final = frozenset(
    {
        *("CDLL", "PyDLL", "LibraryLoader", "cdll", "pydll", "pythonapi", "CFUNCTYPE"),
        *("PYFUNCTYPE", "memmove", "memset", "string_at", "wstring_at", "from_address"),
    }
)


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    is_for_types_only: bool


@functools.cache
def modules() -> Mapping[str, ast.Module]:
    """Return every module of the package, by its name without the package's."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return MappingProxyType(found)


def _nodes(tree: ast.AST, *, types_only: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for node in ast.iter_child_nodes(tree):
        guarded = (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        )
        yield node, types_only
        yield from _nodes(node, types_only=types_only or guarded)


def own_imports(name: str) -> list[Import]:
    """Return what module *name* imports of the package."""
    found = []
    for node, types_only in _nodes(modules()[name]):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            top, _, rest = target.partition(".")
            if top == PACKAGE:
                # "from package.module import name" names something inside the module.
                module = rest if rest in modules() else rest.rpartition(".")[0]
                found.append(Import(module, node.lineno, types_only))
    return found


def outside_imports(tree: ast.AST, *, with_types: bool = True) -> set[str]:
    """Return the top-level names of everything imported that is not of the package."""
    found = set()
    for node, types_only in _nodes(tree):
        if types_only and not with_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found - {PACKAGE}


def covers(row: str, name: str) -> bool:
    return name == row or (row != "" and name.startswith(f"{row}."))


def row_of(name: str) -> str | None:
    rows = [row for row in MAY_IMPORT if covers(row, name)]
    return max(rows, key=len) if rows else None


def is_pure(name: str) -> bool:
    return any(covers(row, name) for row in PURE)


def reachable(name: str) -> set[str]:
    """Return every module that importing *name* loads, lazily imported ones included."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += [i.target for i in own_imports(current) if not i.is_for_types_only]
    return seen


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_what_its_row_allows(name: str) -> None:
    row = row_of(name)
    assert row is not None, f"{name} has no row in MAY_IMPORT: decide where it belongs"

    wrong = [
        f"line {item.line}: {item.target or PACKAGE}"
        for item in own_imports(name)
        if not any(covers(allowed, item.target) for allowed in MAY_IMPORT[row])
    ]

    assert wrong == []


def test_the_table_has_no_row_for_what_is_gone() -> None:
    assert [row for row in MAY_IMPORT if not any(covers(row, name) for name in modules())] == []


def test_the_checker_sees_every_kind_of_import() -> None:
    # Else a bug of own_imports would make every test above pass.
    assert {item.target for item in own_imports("introspect.hooking")} >= {
        *("session", "worker", "state", "abi.kvmi", "errors", "policy.element"),
    }
    assert {item.target for item in own_imports("cli")} == {"", "advice", "errors"}
    assert "emulator.launch" in {item.target for item in own_imports("cli.emulate")}
    assert next(i for i in own_imports("plan") if i.target == "policy.model").is_for_types_only


def test_no_modules_import_each_other_in_a_circle() -> None:
    edges = {
        name: {i.target for i in own_imports(name) if not i.is_for_types_only} - {name}
        for name in modules()
    }
    remaining = dict(edges)
    while free := [name for name, needs in remaining.items() if not needs & remaining.keys()]:
        for name in free:
            del remaining[name]

    assert remaining == {}


def reach_outside(name: str) -> set[str]:
    """Return what *name* itself imports that a pure module must not."""
    allowed = set(PURE_STDLIB)
    if any(covers(row, name) for row in LAYOUT_ONLY):
        allowed.add("ctypes")
    return outside_imports(modules()[name], with_types=False) - allowed


@pytest.mark.parametrize("name", sorted(filter(is_pure, modules())))
def test_a_pure_module_can_reach_nothing_outside(name: str) -> None:
    impure = {other: found for other in reachable(name) if (found := reach_outside(other))}

    assert impure == {}


def test_the_checker_knows_an_impure_module() -> None:
    assert {"os", "socket", "time"} <= reach_outside("tool.connect")
    assert {"ctypes", "os"} <= reach_outside("linux")


def test_calls_through_ctypes_are_made_in_linux_only() -> None:
    callers = {
        name
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in CTYPES_CALLS
    }

    assert callers == {"linux"}


@pytest.mark.parametrize(
    ("library", "importers"),
    [("libvirt", {"libvirtio"}), ("lxml", {"policy.document", "policy.shape"})],
)
def test_a_foreign_library_has_few_importers(library: str, importers: set[str]) -> None:
    found = {
        name
        for name, tree in modules().items()
        if library in outside_imports(tree, with_types=False)
    }

    assert found == importers


def test_the_package_needs_nothing_but_its_dependencies() -> None:
    for name, tree in modules().items():
        strangers = outside_imports(tree) - sys.stdlib_module_names - DEPENDENCIES
        assert strangers == set(), name


@pytest.mark.parametrize("entry", ["hook", "worker", "session"])
def test_the_hook_cannot_reach_libvirt_the_emulator_or_the_command_line(entry: str) -> None:
    # libvirt waits for the hook with the domain locked: to ask it would be a deadlock.
    banned = ("libvirtio", "emulator", "cli", "installer")

    assert [name for name in reachable(entry) if any(covers(b, name) for b in banned)] == []


def test_only_its_verb_imports_the_emulator() -> None:
    importers = {
        name
        for name in modules()
        if any(covers("emulator", item.target) for item in own_imports(name))
    }

    assert {name for name in importers if not covers("emulator", name)} == {"cli.emulate"}


def test_the_command_line_imports_no_verb_before_it_is_used() -> None:
    assert not any(covers("cli", i.target) for i in own_imports("cli") if i.target != "cli")
    assert outside_imports(modules()["cli"]) <= sys.stdlib_module_names


# -- the hook script ---------------------------------------------------------------------


def test_the_hook_script_imports_the_standard_library_only() -> None:
    tree = ast.parse(HOOK.read_bytes())

    assert outside_imports(tree) <= sys.stdlib_module_names
    assert PACKAGE not in {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    at_top = {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }
    assert at_top == {"posix", "sys"}
    assert not any(isinstance(node, ast.ImportFrom) for node in tree.body)


def _imported(script: Path, *arguments: str, stdin: bytes) -> set[str]:
    # The shebang's own options, so that what libvirt runs is what is measured.
    shebang = HOOK.read_bytes().splitlines()[0].removeprefix(b"#!").decode().split()
    assert shebang == [str(HOOK_PYTHON), "-IS"]
    done = subprocess.run(
        [*shebang, "-X", "importtime", str(script), *arguments],
        input=stdin,
        capture_output=True,
        check=True,
        timeout=30,
        env={"LC_ALL": "C"},
    )
    lines = done.stderr.decode().splitlines()
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


@pytest.mark.skipif(not HOOK_PYTHON.exists(), reason=f"no {HOOK_PYTHON}")
@pytest.mark.parametrize("operation", ["prepare", "started", "stopped", "release", "reconnect"])
@pytest.mark.parametrize("policy", ["none", "skeleton"])
def test_a_domain_without_element_costs_no_import(
    tmp_path: Path, operation: str, policy: str
) -> None:
    # This machine's host policy may concern every domain: look at none, or at the one
    # that "install" puts there.
    place = tmp_path / "none" if policy == "none" else HOST_POLICY_SKELETON
    script = tmp_path / "hook"
    text = HOOK.read_text(encoding="utf-8")
    text = text.replace('"/etc/kvmi-libvirt/host-policy.xml"', repr(str(place)))
    script.write_text(text, encoding="utf-8")
    empty = tmp_path / "empty"
    empty.write_text("import posix, sys\n", encoding="utf-8")
    xml = b"<domain><name>vm</name><uuid>5a4a2b4e-0000-4000-8000-000000000000</uuid></domain>"

    started_anyway = _imported(empty, stdin=b"")
    imported = _imported(script, "vm", operation, "begin", "-", stdin=xml)

    assert imported - started_anyway == set()
    assert "encodings" in imported  # else the listing was not understood
