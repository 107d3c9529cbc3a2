# SPDX-License-Identifier: Apache-2.0
"""Write domain XML as OpenStack's nova does, with nova's own classes; or its fault messages.

Run by an interpreter that has nova: ``tools/nova-xml`` makes one for each release.
``nova_xml.py DIRECTORY`` writes a file for each of INSTANCES. ``nova_xml.py --fault`` reads
libvirt's error text and prints, as JSON, what nova makes of it for the tenant.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import types
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest import mock

CREATED_S: Final = 1_790_000_000
UUID: Final = "8d1f7a5e-3c46-4b9b-9a55-5f0c2f7d1a01"
IMAGE: Final = "155d900f-4e14-4e4c-a73d-069cbf4541e6"
PROJECT: Final = "b1d2c3e4f5a647b8a9c0d1e2f3a4b5c6"
OTHER_PROJECT: Final = "0f0e0d0c0b0a09080706050403020100"
ELEMENT: Final = (
    '<kvmi:introspection xmlns:kvmi="urn:kvmi-libvirt:introspection:1.0" mode="required"/>'
)


@dataclass(frozen=True)
class Instance:
    """An instance as its operator and its tenant made it.

    Parameters
        properties  of its image, all of them the tenant's
    """

    flavor: str
    flavor_id: str
    project: str
    extra_specs: dict[str, str] = field(default_factory=dict)
    display_name: str = "web-1"
    project_name: str = "payments"
    properties: dict[str, str] = field(default_factory=lambda: {"os_distro": "debian"})


INSTANCES: Final = {
    "flavor": Instance("guarded.large", "42", OTHER_PROJECT),
    "extra-spec": Instance(
        "m1.small", "7", OTHER_PROJECT, {"hw:cpu_policy": "shared", "kvmi:profile": "protect"}
    ),
    "project": Instance("m1.small", "7", PROJECT),
    "plain": Instance("m1.small", "7", OTHER_PROJECT),
    # A tenant who wants introspection, or wants somebody else's.
    "tenant": Instance(
        "m1.small",
        "7",
        OTHER_PROJECT,
        display_name=f"guarded.large</nova:name></nova:instance>{ELEMENT}",
        project_name="guarded.large",
        properties={"os_distro": "kvmi:profile=protect", "os_admin_user": ELEMENT},
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run; needs nova."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--fault", action="store_true")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    from nova import version
    from oslo_config import cfg

    cfg.CONF([], project="nova", default_config_files=[])
    if args.fault:
        print(json.dumps(faults(sys.stdin.read()), indent=2))
        return 0
    args.directory.mkdir(parents=True, exist_ok=True)
    for name, instance in INSTANCES.items():
        file = args.directory / f"{version.version_string()}-{name}.xml"
        file.write_text(domain_xml(instance), encoding="utf-8")
    return 0


def domain_xml(instance: Instance) -> str:
    """Return the XML of the domain nova would define.

    Its metadata is made by the libvirt driver itself. The devices are as few as a test
    starts; what only the machine knows is named in capitals.
    """
    from nova.virt.libvirt import config

    guest = config.LibvirtConfigGuest()
    guest.virt_type = "kvm"
    guest.name = "instance-0000000a"
    guest.uuid = UUID
    guest.memory = 64 * 1024
    guest.vcpus = 2
    guest.metadata.append(_metadata(instance))
    guest.os_type = "hvm"
    guest.os_arch = "x86_64"
    guest.os_mach_type = "pc"
    guest.os_loader = "/ROM"
    guest.os_loader_type = "rom"
    system = config.LibvirtConfigGuestSysinfo()
    system.system_manufacturer = "OpenStack Foundation"
    system.system_product = "OpenStack Nova"
    system.system_serial = system.system_uuid = UUID
    system.system_family = "Virtual Machine"
    guest.sysinfo = system
    guest.os_smbios = config.LibvirtConfigGuestSMBIOS()
    guest.features.append(config.LibvirtConfigGuestFeatureACPI())
    serial = config.LibvirtConfigGuestSerial()
    serial.type = "file"
    serial.source_path = "/SERIAL"
    guest.add_device(serial)
    balloon = config.LibvirtConfigMemoryBalloon()
    balloon.model = "none"
    guest.add_device(balloon)
    text: str = guest.to_xml()
    return text


def _metadata(instance: Instance) -> Any:  # nova has no type information
    from nova import context, objects
    from nova.network import model
    from nova.virt.libvirt import driver

    objects.register_all()
    flavor = objects.Flavor(
        name=instance.flavor,
        flavorid=instance.flavor_id,
        memory_mb=64,
        vcpus=2,
        root_gb=1,
        ephemeral_gb=0,
        swap=0,
        extra_specs=instance.extra_specs,
    )
    properties = {f"image_{key}": value for key, value in instance.properties.items()}
    made = objects.Instance(
        context=context.get_admin_context(),
        uuid=UUID,
        display_name=instance.display_name,
        image_ref=IMAGE,
        user_id="0c9d2a0f6f8e4a1e9d37a0a2d2b3e1c4",
        project_id=instance.project,
        flavor=flavor,
        system_metadata={
            "owner_user_name": "alice",
            "owner_project_name": instance.project_name,
            "image_min_disk": "1",
            "image_min_ram": "0",
            "image_container_format": "bare",
            "image_disk_format": "raw",
            "image_base_image_ref": IMAGE,
            **properties,
        },
    )
    address = model.IP("192.0.2.10", type="fixed")
    subnet = model.Subnet(ips=[address])
    port = model.VIF(id="0a1b2c3d-4e5f-4a6b-8c7d-8e9f0a1b2c3d", network=model.Network())
    port["network"]["subnets"] = [subnet]
    ports = model.NetworkInfo([port])
    compute = driver.LibvirtDriver.__new__(driver.LibvirtDriver)  # without a libvirt
    with mock.patch.object(time, "time", return_value=float(CREATED_S)):
        if hasattr(compute, "get_instance_driver_metadata"):
            return compute._get_guest_config_meta(compute.get_instance_driver_metadata(made, ports))
        if compute._get_guest_config_meta.__code__.co_argcount == 3:
            return compute._get_guest_config_meta(made, ports)
        return compute._get_guest_config_meta(made)


def faults(libvirt_error: str) -> dict[str, str]:
    """Return nova's fault message, as the tenant sees it, for each way a start can fail."""
    from nova import exception
    from nova.compute import utils
    from nova.scheduler import utils as scheduler

    error = types.new_class("libvirtError", (Exception,))(libvirt_error)
    reason = str(error)
    once = exception.RescheduledException(instance_uuid=UUID, reason=reason)
    tried = {"retry": {"num_attempts": 3, "hosts": [], "exc_reason": reason}}
    try:
        scheduler.populate_retry(tried, UUID)
    except exception.MaxRetriesExceeded as raised:
        last = raised
    return {
        # Built once, because no other host was to be tried (compute/manager.py).
        "build": utils.exception_to_dict(once, message=once.kwargs["reason"])["message"],
        # Built on as many hosts as [scheduler]max_attempts says.
        "build-retried": utils.exception_to_dict(last)["message"],
        # Hard reboot, start, resume, migration: the bare exception.
        "action": utils.exception_to_dict(error)["message"],
    }


if __name__ == "__main__":
    sys.exit(main())
