# SPDX-License-Identifier: Apache-2.0
"""The VMs that the agent knows: by uuid, by name, and no more once they are forgotten."""

from __future__ import annotations

from kvmi_libvirt.agent.vms import Vms

FIRST, SECOND = "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01", "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a02"


def test_a_vm_is_seen_once_and_again_with_what_changed() -> None:
    vms = Vms()
    vm, is_changed = vms.see("web", FIRST, b"<domain/>")
    assert is_changed
    assert vms.see("web", FIRST, b"<domain/>") == (vm, False)
    assert vms.see("web", FIRST, b"<domain>x</domain>") == (vm, True)
    assert vm.xml == b"<domain>x</domain>"
    assert (len(vms), list(vms), vms.get(FIRST), vms.named("web")) == (1, [vm], vm, vm)
    assert vms.get(SECOND) is None
    assert vms.named("other") is None


def test_a_name_goes_with_its_vm_and_is_the_next_ones() -> None:
    vms = Vms()
    old, _ = vms.see("web", FIRST, b"")
    vms.see("renamed", FIRST, b"")
    assert (vms.named("web"), vms.named("renamed")) == (None, old)
    # Undefined and defined anew, while the one before still runs.
    new, _ = vms.see("renamed", SECOND, b"")
    assert vms.named("renamed") is new
    vms.forget(old)
    assert vms.named("renamed") is new
    assert (list(vms), vms.known(old), vms.known(new)) == ([new], False, True)


def test_forgetting_what_another_has_replaced_does_nothing() -> None:
    vms = Vms()
    old, _ = vms.see("web", FIRST, b"")
    vms.forget(old)
    new, _ = vms.see("web", FIRST, b"")
    vms.forget(old)
    assert vms.get(FIRST) is new
    assert vms.named("web") is new


def test_vms_may_be_forgotten_while_all_are_gone_through() -> None:
    vms = Vms()
    for number in range(3):
        vms.see(f"vm{number}", f"{FIRST[:-1]}{number}", b"")
    for vm in vms:
        vms.forget(vm)
    assert len(vms) == 0
