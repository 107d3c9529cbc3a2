# SPDX-License-Identifier: Apache-2.0
"""Golden plans and explanations of whole domains, as their managers write them.

A document whose first line is ``<!-- host: NAME -->`` is taken for one on a host with the
policy ``hosts/NAME.xml``. ``pytest --regenerate`` rewrites the results, for review.

The nova:instance elements are what nova's own classes write for the same values: 22.4
(namespace 1.0), 27.5 (2023.1) and 32.2 (2025.2).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmi_libvirt.cli import explain, main, plan
from kvmi_libvirt.policy.host import HostPolicy, parse_host_policy
from kvmi_libvirt.policy.profile import SHIPPED_DIRECTORY

DATA = Path(__file__).resolve().parents[2] / "data" / "policy"
DOMAINS = sorted(DATA.glob("*.xml"))


def host_of(path: Path) -> HostPolicy:
    found = re.match(r"<!-- host: (\w+) -->\n", path.read_text(encoding="utf-8"))
    if found is None:
        return HostPolicy()
    file = DATA / "hosts" / f"{found.group(1)}.xml"
    return parse_host_policy(file.read_bytes(), source=f"hosts/{file.name}")


@pytest.fixture
def domain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    path: Path = request.param
    for verb in (plan, explain):
        monkeypatch.setattr(verb, "load_host_policy", lambda: host_of(path))
    monkeypatch.chdir(DATA)
    return path


def compare(
    arguments: list[str],
    golden: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    code = main(arguments)
    out, err = capsys.readouterr()
    got = out if code == 0 and out else f"{out}{err}exit code {code}\n"
    got = got.replace(str(SHIPPED_DIRECTORY), "profiles")
    # A table is as wide as its longest path, which differs from machine to machine.
    got = re.sub(r" +$", "", got, flags=re.MULTILINE)
    if request.config.getoption("--regenerate"):
        golden.write_text(got, encoding="utf-8")
    assert golden.read_text(encoding="utf-8") == got


def test_there_are_enough_of_them() -> None:
    assert len(DOMAINS) >= 25


LIBVIRT_SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")


@pytest.mark.skipif(
    shutil.which("xmllint") is None or not LIBVIRT_SCHEMA.exists(),
    reason="no xmllint, or no schemas of libvirt (apt: libxml2-utils, libvirt0)",
)
def test_libvirt_itself_takes_them_for_domains() -> None:
    # What virt-xml-validate does. A status file of libvirtd has a schema of its own.
    domains = [str(path) for path in DOMAINS if path.stem != "libvirt-status"]
    command = ["xmllint", "--noout", "--relaxng", str(LIBVIRT_SCHEMA), *domains]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.stderr.splitlines() == [f"{path} validates" for path in domains]


@pytest.mark.parametrize("abi", ["v12", "v7"])
@pytest.mark.parametrize("domain", DOMAINS, ids=lambda path: path.stem, indirect=True)
def test_plan_of_a_whole_domain(
    domain: Path, abi: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    golden = domain.with_name(f"{domain.stem}-plan-{abi}.json")
    compare(["plan", f"./{domain.name}", "--abi", abi, "--json"], golden, capsys, request)


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda path: path.stem, indirect=True)
def test_explanation_of_a_whole_domain(
    domain: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    golden = domain.with_name(f"{domain.stem}-explain.txt")
    compare(["explain", f"./{domain.name}", "--abi", "v12"], golden, capsys, request)


def test_no_result_is_left_of_a_document_that_is_gone() -> None:
    stems = {path.stem for path in DOMAINS}
    for path in (*DATA.glob("*-plan-*.json"), *DATA.glob("*-explain.txt")):
        assert re.sub(r"-(plan-v\d+|explain)$", "", path.stem) in stems, path
