# SPDX-License-Identifier: Apache-2.0
"""What the hook's script demands by itself, when the package is broken: what the package would.

Nothing that a tenant of a cloud can say frees its VM of what the host assigns.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from assignments import MODES, assign, policy
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree
from test_nova_xml import DATA, FILES, PROJECT, TEXTS, let_tenant_say, selectors

from kvmi_libvirt.policy.element import parse_domain
from kvmi_libvirt.policy.host import parse_host_policy
from kvmi_libvirt.policy.model import Mode

if TYPE_CHECKING:
    pass

SCRIPT: Final = Path(__file__).resolve().parents[2] / "hooks" / "qemu.d" / "50-kvmi-libvirt"
UUID: Final = "8d1f7a5e-3c46-4b9b-9a55-5f0c2f7d1a01"
MATCHES: Final = st.one_of(
    selectors(),
    st.sampled_from(
        [
            f"uuid='{UUID}'",
            "nova-extra-spec='kvmi:profile=observe'",
            "nova-flavor='guarded.large' name='web-*'",
            "nova-flavor='guarded.large' nova-extra-spec='kvmi:profile=protect'",
        ]
    ),
)


class Script:
    """The script, as a module, with a host policy of its own."""

    def __init__(self, path: Path) -> None:
        self._policy = path
        source = SCRIPT.read_text(encoding="utf-8")
        body, ends, _ = source.rpartition("sys.exit(guarded(sys.argv))")
        assert ends
        self._module = types.ModuleType("hook_script")
        exec(compile(body, SCRIPT, "exec"), self._module.__dict__)
        self._module.__dict__["HOST_POLICY"] = str(path)

    def demands(self, xml: bytes, *assignments: str) -> bool:
        """Say whether it demands introspection of a domain, under such assignments."""
        self._policy.write_bytes(policy(*assignments))
        name = etree.fromstring(xml).findtext("name")
        return bool(self._module.is_required(name, xml))


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    return Script(tmp_path_factory.mktemp("hook") / "host-policy.xml")


def nova_xml(data: st.DataObject) -> bytes:
    """Return a domain as nova makes it, with whatever its tenant says."""
    domain = etree.fromstring(data.draw(st.sampled_from(FILES)).read_bytes())
    said = st.one_of(TEXTS, st.sampled_from([UUID, f"<uuid>{UUID}</uuid>", "name='web-1'"]))
    let_tenant_say(domain, data, said)
    return etree.tostring(domain)


@given(data=st.data(), assignments=st.lists(st.builds(assign, MATCHES, MODES), max_size=4))
def test_the_script_demands_what_the_package_does_whatever_a_tenant_says(
    script: Script, data: st.DataObject, assignments: list[str]
) -> None:
    xml = nova_xml(data)
    host = parse_host_policy(policy(*assignments), source="x")
    found = host.assignment(parse_domain(xml, source="x", with_policy=False))

    demanded = found is not None and found.policy.mode is Mode.REQUIRED
    assert script.demands(xml, *assignments) == demanded


GUARDED: Final = (DATA / "32.2.1-flavor.xml").read_bytes()


def with_spec(value: bytes) -> bytes:
    xml = (DATA / "32.2.1-extra-spec.xml").read_bytes()
    assert xml.count(b">protect<") == 1
    return xml.replace(b">protect<", b">" + value + b"<")


@pytest.mark.parametrize(
    ("value", "is_demanded"), [(b"protect", True), (b"observe", False), (b"a&amp;b", True)]
)
def test_an_extra_spec_of_another_value_is_another(
    script: Script, value: bytes, *, is_demanded: bool
) -> None:
    assignments = (
        assign("nova-extra-spec='kvmi:profile=observe'", " mode='optional'"),
        assign("nova-extra-spec='kvmi:profile=protect'"),
        assign("nova-extra-spec='kvmi:profile=a&amp;b'"),
    )
    assert script.demands(with_spec(value), *assignments) == is_demanded


def test_another_s_uuid_in_a_name_is_not_the_domain_s(script: Script) -> None:
    other = "11111111-2222-4333-8444-555555555555"
    xml = GUARDED.replace(b"<metadata>", f"<title>{other}</title><metadata>".encode(), 1)
    assert other.encode() in xml
    required = assign("nova-flavor='guarded.*'")

    assert script.demands(xml, assign(f"uuid='{other}'", " mode='optional'"), required)
    own = etree.fromstring(xml).findtext("uuid", "")
    assert not script.demands(xml, assign(f"uuid='{own.upper()}'", " mode='optional'"), required)


@pytest.mark.parametrize("match", ["flavour='x'", "flavour='x' nova-flavor='guarded.*'"])
def test_what_only_may_fit_counts_when_it_demands(script: Script, match: str) -> None:
    required = assign("nova-flavor='guarded.*'")

    assert script.demands(GUARDED, assign(match))
    assert script.demands(GUARDED, assign(match, " mode='requird'"))
    assert not script.demands(GUARDED, assign(match, " mode='optional'"))
    assert script.demands(GUARDED, assign(match, " mode='optional'"), required)
    assert not script.demands(GUARDED, assign(f"{match} name='nobody'"))


def test_a_project_is_known_in_either_spelling(script: Script) -> None:
    xml = (DATA / "32.2.1-project.xml").read_bytes()
    for spelling in (PROJECT, PROJECT.replace("-", ""), PROJECT.upper()):
        assert script.demands(xml, assign(f"nova-project='{spelling}'"))
