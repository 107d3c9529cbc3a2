# SPDX-License-Identifier: Apache-2.0
"""Declarative KVM introspection (KVMI) for libvirt-managed virtual machines."""

__version__ = "0.1.0"
