# SPDX-License-Identifier: Apache-2.0
"""A wheel and a source distribution built from this tree: they are whole, and they work."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.policy.profile import SHIPPED

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
SHARE = "share/kvmi-libvirt"
BUILD = """\
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
NOT_SOURCES = (
    *(".git", ".venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"),
    *(".hypothesis", "*.egg-info", "build", "dist", "results.json"),
)


def built(kind: str, tree: Path, directory: Path) -> Path:
    """Build from a copy of *tree*, since building leaves files in it."""
    copy = directory / f"tree-of-{kind}"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(directory)],
        cwd=copy,
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return directory / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("build_sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source distribution: what that lacks, this lacks."""
    directory = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory / "unpacked")
    (tree,) = (directory / "unpacked").iterdir()
    return built("build_wheel", tree, directory)


def files_below(directory: str) -> Iterator[str]:
    for path in sorted((ROOT / directory).rglob("*")):
        if path.is_file() and not set(path.parts) & set(NOT_SOURCES):
            yield str(path.relative_to(ROOT))


def declared() -> dict[str, str]:
    """Return where setup.cfg puts which file, for all that is no module."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return {
        f"{place}/{path.name}": str(path.relative_to(ROOT))
        for place, patterns in config["options.data_files"].items()
        for pattern in patterns.split()
        for path in ROOT.glob(pattern)
    }


def test_wheel_holds_every_module_profile_schema_example_and_the_hook(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    name = wheel.name.partition("-py3")[0]
    shared = declared()
    assert set(shared.values()) >= {*files_below("xml-schemas"), "hooks/qemu.d/50-kvmi-libvirt"}
    wanted = {
        *(path for path in files_below("kvmi_libvirt") if path.endswith(".py")),
        *(f"kvmi_libvirt/policy/profiles/{profile}.xml" for profile in SHIPPED),
        *(f"{name}.data/data/{place}" for place in shared),
        *(f"{name}.data/scripts/{path.name}" for path in (ROOT / "scripts").iterdir()),
    }
    # And nothing else: no test, nothing that was not meant for others.
    assert {path for path in held if not path.startswith(f"{name}.dist-info/")} == wanted


def test_source_distribution_holds_all_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for directory in ("kvmi_libvirt", "xml-schemas", "hooks", "scripts", "docs", "tests", "tools"):
        assert set(files_below(directory)) - held == set()
    assert held >= {"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "setup.cfg", ".ci/run"}


POLICY = """<introspection xmlns="urn:kvmi-libvirt:introspection:1.0" profile="observe">
  <source type="unix" path="/run/kvmi/x"/></introspection>"""


def test_wheel_that_is_installed_needs_nothing_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run(
        [sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", environment],
        check=True,
    )
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    install = ["install", "--no-index", "--no-deps", str(wheel)]
    subprocess.run([*pip, "--python", str(environment / "bin" / "python"), *install], check=True)
    (tmp_path / "policy.xml").write_text(POLICY, encoding="utf-8")

    def run(*arguments: str) -> str:
        command = [str(environment / "bin" / "kvmi-libvirt"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("check", "policy.xml") == ""
    explained = json.loads(run("explain", "policy.xml", "--abi", "v12", "--json"))
    files = {entry["file"] for entry in explained["commands"] if entry["verdict"] == "allowed"}
    (profile,) = files
    assert Path(profile).is_relative_to(environment)
    examples = environment / SHARE / "xml-schemas" / "examples"
    for directory in ("valid", "host-policy/valid"):
        for path in (examples / directory).glob("*.xml"):
            if path.stem != "tcp":  # that is for a host with a policy
                run("check", str(path))
    assert "nothing is allowed" in run("check", str(examples / "valid" / "minimal.xml"))
