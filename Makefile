# What there is to do here, each with one word: `make help` lists it. Whatever a target needs is set up by itself.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest
# More arguments for pytest or the demo: make unit ARGS="-k ledger"
ARGS ?=
# kvm | tcg | auto
ACCEL ?= auto
# debian (6.12) | bookworm (6.1) | backports (the newest) | iommufd | debug | all: for qemu-test; vfio-test knows three of
# them. The last two kernels are compiled the first time, and debug, which watches itself, takes its time.
KERNEL ?= debian

SETUP := $(VENV)/.set-up
C_SOURCES := $(wildcard netbridge/datapath/core/*.[ch]) netbridge/datapath/build.py

# What pytest is given: these paths and options, unless ARGS names a path itself, which is then run whole.
tests = $(if $(filter tests/%,$(ARGS)),,$(1))

# Nothing here is a file, but for what is installed.
.PHONY: $(shell sed -n 's/^\([a-z][a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

##@ Begin with

help: ## list the targets
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\n%s\n' 'More for the program behind a target: ARGS, as in make qemu-test ARGS="tests/e2e/test_echo.py -n 1 -x".' \
		'Guests run under KVM where that works: ACCEL=kvm or ACCEL=tcg has it one way or the other.'

setup: $(SETUP) ## install what is missing: system packages (as root), a virtual environment, the C core

# The packages are looked at each time: that is quick, and they may have gone since.
$(SETUP): pyproject.toml setup.py $(C_SOURCES) | host-packages
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# What only one target needs is not among host-packages: $(call install-for,TARGET,PROGRAM,PACKAGES)
define install-for
@command -v $(2) >/dev/null && exit 0; \
	install="apt-get install --yes --no-install-recommends $(3)"; \
	if [ "$$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then \
		echo "$(1): $(2) is missing. Run this, then try again:" >&2; echo "    sudo $$install" >&2; exit 1; \
	fi; \
	apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive $$install
endef

host-packages:
	@qemu/host-packages

demo: $(SETUP) ## boot a guest, claim its NIC through VFIO, echo real frames through the port, check each
	$(PY) -m tests.e2e.demo --accel $(ACCEL) $(ARGS)

shell: $(SETUP) ## a shell in a guest that has a NIC behind an IOMMU
	$(PY) -m qemu.shell --accel $(ACCEL) $(ARGS)

##@ For every change

test: lint unit sanitize qemu-test ## what every change must pass: lint, unit, sanitize and qemu-test

lint: $(SETUP) ## ruff, mypy, the C core under -Wall -Wextra -Werror, and the recipes for CI
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(PY) netbridge/datapath/build.py --check
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-actions .github/actions/*/action.yml
	$(VENV)/bin/zizmor --offline --quiet .github

format: $(SETUP) ## lay the Python out as ruff would
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

unit: $(SETUP) ## tests without a virtual machine, in seconds
	$(PYTEST) $(call tests,tests/unit -m "not thorough") -n 2 $(ARGS)

sanitize: $(SETUP) ## the unit tests that take longer: the C core under sanitizers, random search
	$(PYTEST) $(call tests,tests/unit -m thorough) -n 2 $(ARGS)

# The VFIO tests need other devices, more memory and more time than the rest, so they have a guest and a target of their own.
VFIO_TESTS := tests/guest/test_vfio_selftests.py tests/guest/test_vfio_device.py
IN_GUESTS = tests/guest tests/e2e tests/faults $(VFIO_TESTS:%=--ignore=%)

KERNELS := debian bookworm backports iommufd debug
recipes = $(patsubst debian,trixie,$(patsubst backports,trixie-backports,$(patsubst debug,debug:8,$(1:all=$(KERNELS)))))

qemu-test: TESTS = $(call tests,$(IN_GUESTS) -m "not thorough") -n 2
qemu-test: $(SETUP) ## tests in guests: the driver on a real kernel, and end to end with scapy; KERNEL=all: on each
	$(if $(filter-out all $(KERNELS),$(KERNEL)),$(error KERNEL is all, or of $(KERNELS), not "$(KERNEL)"))
ifeq ($(KERNEL),debian)
	$(PYTEST) $(TESTS) --junitxml=build/tests/junit.xml --accel $(ACCEL) $(ARGS)
else
	$(PY) -m qemu.kernels $(call recipes,$(KERNEL)) -- $(TESTS) --accel $(ACCEL) $(ARGS)
endif

##@ Longer tests

thorough: test sandbox-test vfio-test box-test faults ## test, sandbox-test, vfio-test, box-test and faults, one after the other

sandbox-test: $(SETUP) ## tests in guests that start a driver each: what strict mode forbids, and survival of kills
	$(PYTEST) $(call tests,tests/e2e -m thorough --ignore=tests/e2e/test_box.py) -n 2 --junitxml=build/tests/sandbox.xml --accel $(ACCEL) $(ARGS)

vfio-test: IN_GUEST = --accel $(ACCEL) -o guest_recipe=images/$(if $(filter debian,$(KERNEL)),trixie,$(KERNEL)).toml
ifeq ($(KERNEL),debug) # which watches itself
vfio-test: IN_GUEST += -o guest_patience=8
endif
vfio-test: $(SETUP) ## the cases of Linux's VFIO selftests, and more: KERNEL=debian (the default), iommufd or debug
	$(if $(filter debian iommufd debug,$(KERNEL)),,$(error KERNEL is debian, iommufd or debug, not "$(KERNEL)"))
	$(PYTEST) $(call tests,$(VFIO_TESTS)) --junitxml=build/tests/vfio.xml $(IN_GUEST) $(ARGS)
ifneq ($(KERNEL),debian) # which has no VFIO without an IOMMU
	$(PYTEST) $(VFIO_TESTS) -k without_an_iommu $(IN_GUEST) -o guest_words=intel_iommu=off --artefacts build/tests/no-iommu
endif

box-test: $(SETUP) ## tests on a machine of metal, which a guest with sshd stands in for; on a real one: see docs/harness.md
	$(PYTEST) $(call tests,tests/e2e/test_box.py) --junitxml=build/tests/box.xml --accel $(ACCEL) $(ARGS)

# An environment of its own: labgrid brings a plugin for pytest that changes how every run logs.
LAB_SETUP := $(VENV)-lab/.set-up

$(LAB_SETUP): pyproject.toml setup.py $(C_SOURCES) | host-packages
	$(PYTHON) -m venv $(VENV)-lab
	$(VENV)-lab/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[lab]'
	@touch $@

lab-test: $(LAB_SETUP) ## the same with the box reserved and switched on by labgrid: a farm with one box
	$(VENV)-lab/bin/python -m pytest $(call tests,tests/lab) --junitxml=build/tests/lab.xml --accel $(ACCEL) $(ARGS)

faults: $(SETUP) ## what may go wrong, at every moment: kills, unplugs, links, clocks, and the exact account afterwards
	$(PYTEST) $(call tests,tests/faults) -n 2 --junitxml=build/tests/faults.xml --accel $(ACCEL) $(ARGS)

soak: $(SETUP) ## kills, lies and a flapping link under traffic for SOAK_SECONDS (3600); 1 GiB through the tap service
	SOAK_SECONDS=$${SOAK_SECONDS:-3600} $(PYTEST) tests/e2e/test_soak.py -s --junitxml=build/tests/soak.xml --accel $(ACCEL) $(ARGS)
	TRANSFER_MIB=1024 $(PYTEST) tests/e2e/test_tap.py -k tcp -s --junitxml=build/tests/transfer.xml --accel $(ACCEL) $(ARGS)

interop: $(SETUP) | host-dpdk ## the driver on DPDK's net_vhost as its device: every frame compared, both ways
	$(PYTEST) $(call tests,tests/interop) --require-dpdk $(ARGS)

# No other target but the benches needs DPDK, so it is not among host-packages.
host-dpdk:
	@tests/interop/host-dpdk

model: | host-spin ## model-check wake-ups, memory ordering and ownership; every mutant must fail
	nice $(PYTHON) -m tests.model $(ARGS)

host-spin: | host-packages
	$(call install-for,model,spin,spin)

host-iperf3: | host-packages
	$(call install-for,bench,iperf3,iperf3)

# How long make fuzz looks for more.
FUZZ_SECONDS ?= 60

fuzz: $(SETUP) | host-clang ## fuzz the C core with all that a device can write: FUZZ_SECONDS=60, ARGS=--keep
	nice $(PY) -m tests.unit.core.fuzz --seconds $(FUZZ_SECONDS) $(ARGS)

host-clang: | host-packages
	$(call install-for,fuzz,clang,clang libclang-rt-dev)

##@ How well, and how fast

coverage: $(SETUP) ## what of the code the tests run: Python on the host and in a guest, and the C core
	$(PY) -m tests.measure_coverage --accel $(ACCEL) $(ARGS)

# How many rounds `make flakes` makes, of some minutes each
N ?= 20
flakes: $(SETUP) ## run qemu-test, or others, N times and tell which do not always pass: ARGS="tests/e2e/test_echo.py -n 2"
	$(PY) -m qemu.flakes $(N) $(or $(ARGS),$(IN_GUESTS) -m "not thorough" -n 2) --accel $(ACCEL)

timing: $(SETUP) ## where the time goes until a guest is up
	$(PY) -m qemu.timing --accel $(ACCEL) $(ARGS)

# Installed when a bench is first wanted: what draws its pictures.
BENCH_SETUP := $(VENV)/.set-up-bench

$(BENCH_SETUP): $(SETUP)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev,bench]'
	@touch $@

bench: $(BENCH_SETUP) | host-dpdk host-iperf3 ## beside its peers, in turns: a table and pictures in build/bench
	ACCEL=$(ACCEL) $(PY) -m tests.bench $(ARGS)

bench-quick: $(BENCH_SETUP) | host-dpdk ## the same with fewer metrics
	ACCEL=$(ACCEL) $(PY) -m tests.bench --quick $(ARGS)

##@ The rest

client-library: | host-packages ## the client library in C, and its examples, in build/client-library
	$(MAKE) -C client BUILD=$(CURDIR)/build/client-library

clean: ## remove what was built here (images stay in the cache: python -m qemu.images gc)
	rm -rf build $(VENV) $(VENV)-lab *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f netbridge/datapath/_core.c netbridge/datapath/_core.*.so netbridge/datapath/*.o
	find . -name __pycache__ -prune -exec rm -rf {} +
