# SPDX-License-Identifier: Apache-2.0
"""Domain XML as OpenStack's nova makes it: what decides about introspection, and what never does.

The files in tests/data/nova were made by ``tools/nova-xml`` with nova's own code, of four
releases. Where that has left its environments, the files are made again and compared.
"""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from kvmi_libvirt.errors import PolicyError
from kvmi_libvirt.policy.host import parse_host_policy
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.policy.resolve import decide

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.policy.host import HostPolicy

ROOT: Final = Path(__file__).resolve().parents[2]
DATA: Final = ROOT / "tests" / "data" / "nova"
FILES: Final = sorted(DATA.glob("*.xml"))
RELEASES: Final = sorted({path.name.partition("-")[0] for path in FILES})
PROJECT: Final = "b1d2c3e4-f5a6-47b8-a9c0-d1e2f3a4b5c6"
SELECTORS: Final = {
    "flavor": 'nova-flavor="guarded.*"',
    "extra-spec": 'nova-extra-spec="kvmi:profile=protect"',
    "project": f'nova-project="{PROJECT}"',
}


def host_policy(*selectors: str) -> HostPolicy:
    assignments = "".join(
        f'<assign mode="required" profile="observe"><match {selector}/>'
        f'<source type="unix" path="/run/kvmi/{number}.sock"/></assign>'
        for number, selector in enumerate(selectors)
    )
    text = f'<host-policy xmlns="{NAMESPACE}">{assignments}</host-policy>'
    return parse_host_policy(text.encode(), source="host-policy.xml")


def outcome(xml: bytes, host: HostPolicy) -> object:
    """Return what the domain gets: a policy, nothing, or the reason of a refusal."""
    try:
        return decide(xml, host, source="domain")[1]
    except PolicyError as error:
        return type(error)


def test_there_is_xml_of_old_and_new_nova() -> None:
    namespaces = {path.read_bytes().partition(b'xmlns:nova="')[2][:43] for path in FILES}

    assert namespaces == {b"http://openstack.org/xmlns/libvirt/nova/1." + b for b in (b"0", b"1")}
    assert len(RELEASES) == 4
    assert len(FILES) == 5 * len(RELEASES)


@pytest.mark.parametrize("release", RELEASES)
def test_nova_itself_makes_the_same_again(release: str, tmp_path: Path) -> None:
    python = ROOT / ".venv-nova" / release / "bin" / "python"
    if not (python.parents[1] / ".complete").exists():
        pytest.skip(f"nova {release} is not there; tools/nova-xml {release} installs it")
    subprocess.run([python, ROOT / "tools" / "nova_xml.py", tmp_path], check=True, timeout=100)

    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text(encoding="utf-8") for path in DATA.glob(f"{release}-*.xml")}
    assert made == kept


ASK_NOVA: Final = """
import sys, warnings
warnings.simplefilter("ignore")
from nova import exception
from nova.api.validation.extra_specs import validators
for name in sys.argv[1:]:
    try:
        validators.validate(name, "protect")
    except exception.ValidationError:
        print("refused", name)
    else:
        print("accepted", name)
"""


@pytest.mark.parametrize("release", RELEASES)
def test_nova_lets_a_flavor_have_an_extra_spec_of_ours(release: str) -> None:
    python = ROOT / ".venv-nova" / release / "bin" / "python"
    if not (python.parents[1] / ".complete").exists():
        pytest.skip(f"nova {release} is not there; tools/nova-xml {release} installs it")
    done = subprocess.run(
        [python, "-c", ASK_NOVA, "kvmi:profile", "hw:profile"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )

    # A namespace of its own knows, and nobody else's.
    assert done.stdout.split("\n")[-3:-1] == ["accepted kvmi:profile", "refused hw:profile"]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("kind", ["flavor", "extra-spec", "project", "plain", "tenant"])
@pytest.mark.parametrize("selector", list(SELECTORS))
def test_flavor_extra_spec_and_project_decide(release: str, kind: str, selector: str) -> None:
    xml = (DATA / f"{release}-{kind}.xml").read_bytes()
    # nova writes extra specs into the XML from release 32 (2025.2) on.
    fits = kind == selector and (kind != "extra-spec" or release >= "32")

    found = outcome(xml, host_policy(SELECTORS[selector]))

    assert (found is not None) == fits


# -- what a tenant controls --------------------------------------------------------------

TENANT_TEXTS: Final = (
    *("name", "creationTime", "image/containerFormat", "image/diskFormat", "image/minDisk"),
    *("image/minRam", "image/properties/property", "owner/user", "owner/project"),
)
"""What a tenant can make say anything; a project's *name* is its domain administrator's."""

TENANT_ATTRIBUTES: Final = (
    *(("image", "uuid"), ("image/properties/property", "name"), ("owner/user", "uuid")),
    *(("root", "type"), ("root", "uuid"), ("ports/port", "uuid")),
    *(("ports/port/ip", "type"), ("ports/port/ip", "address")),
)

WANTED: Final = (
    *("guarded.large", "m1.small", "7", "42", "kvmi:profile=protect", "kvmi:profile"),
    *("protect", PROJECT, PROJECT.replace("-", ""), "instance-0000000a", "required"),
    "8d1f7a5e-3c46-4b9b-9a55-5f0c2f7d1a01",
)
INJECTED: Final = (
    f"</nova:name><kvmi:introspection xmlns:kvmi='{NAMESPACE}' mode='required'/>",
    f'<introspection xmlns="{NAMESPACE}" mode="required">',
    "]]></nova:name><nova:flavor name='guarded.large'/>",
    "--><nova:extraSpec name='kvmi:profile'>protect</nova:extraSpec><!--",
)
TEXTS: Final = st.one_of(
    st.sampled_from(WANTED + INJECTED),
    st.text(st.characters(min_codepoint=0x20, blacklist_categories=("Cs", "Cn")), max_size=40),
)


def selectors() -> st.SearchStrategy[str]:
    return st.one_of(
        st.sampled_from(["guarded.*", "*", "m1.small", "?1.*", "web-*", "alice"]).map(
            'nova-flavor="{}"'.format
        ),
        st.sampled_from(["7", "42", "8"]).map('nova-flavor-id="{}"'.format),
        st.sampled_from(["kvmi:profile=protect", "hw:cpu_policy=shared", "os_distro=debian"]).map(
            'nova-extra-spec="{}"'.format
        ),
        st.sampled_from([PROJECT, "0c9d2a0f-6f8e-4a1e-9d37-a0a2d2b3e1c4"]).map(
            'nova-project="{}"'.format
        ),
        st.sampled_from(["instance-*", "web-*", "guarded*"]).map('name="{}"'.format),
    )


def nova_element(domain: etree._Element) -> etree._Element:
    return next(iter(next(domain.iter("metadata"))))


def tenant_places(domain: etree._Element) -> Iterator[tuple[etree._Element, str | None]]:
    """Yield each element whose text, or with a name whose attribute, is the tenant's."""
    instance = nova_element(domain)
    prefix = str(instance.tag).partition("}")[0] + "}"
    for path in TENANT_TEXTS:
        for element in instance.findall("/".join(prefix + part for part in path.split("/"))):
            yield element, None
    for path, attribute in TENANT_ATTRIBUTES:
        for element in instance.findall("/".join(prefix + part for part in path.split("/"))):
            yield element, attribute


def let_tenant_say(
    domain: etree._Element, data: st.DataObject, texts: st.SearchStrategy[str] = TEXTS
) -> None:
    """Put one of *texts* in every place of *domain* that is its tenant's."""
    for element, attribute in tenant_places(domain):
        text = data.draw(texts)
        if attribute is None:
            element.text = text
        else:
            element.set(attribute, text)


@given(data=st.data())
def test_nothing_that_a_tenant_controls_ever_decides(data: st.DataObject) -> None:
    chosen = data.draw(st.sampled_from(FILES))
    host = host_policy(*data.draw(st.lists(selectors(), min_size=1, max_size=3)))
    domain = etree.fromstring(chosen.read_bytes())
    before = outcome(etree.tostring(domain), host)
    image_properties = [e for e in domain.iter() if str(e.tag).endswith("}property")]
    for found in image_properties[:1]:  # a tenant has as many as they like
        parent = found.getparent()
        assert parent is not None
        parent.extend(copy.deepcopy(found) for _ in range(data.draw(st.integers(0, 2))))
    let_tenant_say(domain, data)

    assert outcome(etree.tostring(domain), host) == before


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_places_a_tenant_controls_are_all_that_is_left(path: Path) -> None:
    # Everything nova writes of an instance is either read, or stands in the lists above,
    # or is a number of the flavor: a new release must not bring a place nobody thought of.
    domain = etree.fromstring(path.read_bytes())
    instance = nova_element(domain)
    known = {(element, attribute) for element, attribute in tenant_places(domain)}
    names = {"package", "flavor", "extraSpec", "project", "memory", "disk", "swap", "ephemeral"}
    for element in instance.iter():
        local = str(element.tag).partition("}")[2]
        if (element.text or "").strip() and local not in names | {"vcpus"}:
            assert (element, None) in known, local
        for attribute in map(str, element.attrib):
            if local not in names and (local, attribute) != ("ip", "ipVersion"):
                assert (element, attribute) in known, (local, attribute)
