# SPDX-License-Identifier: Apache-2.0
# Everything needs no more than a Debian 12 with make; root, or a user with sudo.

SUDO := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=KVMI_TEST_REQUIRE,CI)
PYTEST_FLAGS ?=
BENCH ?=
# The tests that look at KVMI_SOAK, the shorter ones first.
SOAK ?= tests/functional/test_emulator_fleet.py tests/functional/test_agent_kill.py \
	tests/functional/test_agent_tools.py tests/live/test_early.py tests/live/test_session_kvm.py

.PHONY: help demo test unit soak bench lint generated deb rpm test-packages walkthrough setup test-setup clean

help:
	@echo "make demo     show it: a VM hooked with exactly its rights, and a refused start"
	@echo "make test     set up and run all tests (as root: they use libvirt and ptrace)"
	@echo "make unit     only the tests that need no privileges"
	@echo "make soak     the long runs: every trace point, 1,000 kills, 10,000 rounds (hours;"
	@echo "              SOAK=\"FILE ...\" for some of them)"
	@echo "make lint     ruff, mypy --strict, and the schema checks"
	@echo "make bench    measure; the figures go to bench/results.json"
	@echo "make generated  completion and kvmi-libvirt(1) anew, from the command's options"
	@echo "make deb      build the Debian package into dist/, checked with lintian"
	@echo "make rpm      build the RPM packages into dist/, checked with rpmlint"
	@echo "make test-packages  install both in a clean Debian, use them, take them away;"
	@echo "              then the README's quick start, command by command"
	@echo "make walkthrough  docs/walkthrough.md anew: the quick start in a clean Debian"
	@echo "make setup    only the set-up: packages, .venv, access to /dev/kvm (the demo's;"
	@echo "              make test-setup adds what the tests need)"
	@echo "make clean    remove .venv and caches"

setup:
	@tools/setup-host

test-setup:
	@tools/setup-host test

demo: setup
	@$(SUDO) .venv/bin/python tools/demo.py

test: test-setup
	$(SUDO) .venv/bin/pytest -p no:cacheprovider $(PYTEST_FLAGS)

unit: test-setup
	.venv/bin/pytest -p no:cacheprovider tests/unit $(PYTEST_FLAGS)

soak: test-setup
	$(SUDO) env KVMI_SOAK=1 .venv/bin/pytest -p no:cacheprovider $(SOAK) $(PYTEST_FLAGS)

bench: test-setup
	$(SUDO) .venv/bin/python bench/run.py $(BENCH)

lint: test-setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	xmllint --noout --relaxng xml-schemas/introspection.rng xml-schemas/examples/valid/*.xml

generated: test-setup
	@.venv/bin/python tools/generate.py

deb:
	@tools/make-deb

rpm:
	@tools/make-rpm

test-packages: deb rpm
	@tools/need-packages debootstrap iproute2
	@$(SUDO) /usr/bin/python3 tools/try_packages.py

walkthrough:
	@tools/need-packages debootstrap git iproute2
	@$(SUDO) /usr/bin/python3 tools/walkthrough.py

clean:
	rm -rf .venv dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
