# Everything runs in .venv, which is made when it is missing: `make demo` and `make test` need nothing
# but Python >= 3.11 (with venv), a C++17 compiler and make. `make help` lists the targets.

PYTHON ?= python3
VENV   ?= .venv
# The PyTorch that is put into .venv; before the package, which is content with any from 2.6 on.
TORCH  ?= torch==2.13.0
# The torchvision that belongs to it, for test-ops.
TORCHVISION ?= torchvision==0.28.0
# Processes that run the tests; a file stays in one.
JOBS   ?= 2
# More options for pytest: make test PYTEST="-x tests/conversions"
PYTEST ?=

# The other bridges' environments, and options of the benchmarks: make bench BENCH="--only size"
PEERS ?= .venv-peers
REVERSE ?= .venv-reverse
# An interpreter with torchax, whose PyTorch has several GB: see benchmarks/README.md
TORCHAX ?=
BENCH ?=

# Options of the sweep over other libraries' models: make sweep SWEEP="--only mixtral --surface lower"
SWEEP ?=

# The folder of PyTorch's tests, and options: make pytorch-tests TESTS=~/pytorch/test SHARE="--share 1 --most 1000"
TESTS ?=
SHARE ?=

# Options of the GPU's checks: make gpu-check GPU="--rehearse"
GPU ?=

# Options of the soak: make soak SOAK="--scale 0.1 --only hangs"
SOAK ?=

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet

CPP     := $(wildcard cpp/*.cc cpp/*.h cpp/*/*.cc cpp/*/*.h)
FAKES   := $(wildcard tests/gpu/*.cc tests/gpu/*.h)
PYTHONS := src tests examples tools $(wildcard benchmarks) install_package_aliased.py

.PHONY: help demo docs test test-ops test-fuzz test-matrix sweep pytorch-tests asan tsan soak bench gpu-check wheel lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## train a PyTorch CNN with JAX on handwritten digits (one minute)
	$(PY) examples/train_digits.py --output build/train_digits.png --require 0.97

test: $(VENV)/.test $(VENV)/.demo ## run the tests; of PyTorch's operator samples one or two of each (test-ops: all)
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --ignore=tests/lower/test_vision.py --ignore=tests/package/test_wheel.py $(PYTEST)

test-ops: $(VENV)/.test $(VENV)/.vision ## all of PyTorch's own operator samples, also through the lowerings (hours)
	T2J_ALL_OP_SAMPLES=1 $(PY) -m pytest -n $(JOBS) tests/bridge/test_operators.py tests/lower/test_lowerings.py tests/lower/test_inner_derivatives.py tests/device/test_eager_key.py tests/device/test_gradcheck.py $(PYTEST)
	T2J_ALL_LOWERINGS=1 $(PY) -m pytest -n $(JOBS) tests/lower/test_models.py $(PYTEST)
	T2J_ALL_LOWERINGS=1 PYTHONPATH=$(VENV)/vision $(PY) -m pytest -n $(JOBS) tests/lower/test_vision.py $(PYTEST)

sweep: $(VENV)/.test $(VENV)/.timm ## tiny models of transformers and timm beside PyTorch: values, all gradients (hours)
	PYTHONPATH=$(VENV)/vision $(PY) tools/sweep.py $(SWEEP)

pytorch-tests: $(VENV)/.test ## PyTorch's own tests for devices: make pytorch-tests TESTS=the/folder/test (an hour)
	$(PY) tools/pytorch_tests.py $(TESTS) $(SHARE)

asan: $(VENV)/.test ## the extension under AddressSanitizer and UBSan, with leaks and injected faults
	$(PY) tools/sanitize.py address -- $(PYTEST)

tsan: $(VENV)/.test ## the handler and the registry under ThreadSanitizer
	$(PY) tools/sanitize.py thread -- $(PYTEST)

soak: $(VENV)/.package ## long runs before a release: memory is flat, nothing hangs (20 minutes)
	$(PY) tools/soak.py $(SOAK)

test-fuzz: $(VENV)/.test ## 20,000 random calls, right and wrong (half an hour)
	T2J_FUZZ_EXAMPLES=20000 $(PY) -m pytest --timeout=0 tests/bridge/test_fuzz.py $(PYTEST)

test-matrix: $(VENV)/.test ## run the core tests on the oldest and newest jax and torch, and newer Pythons
	$(PY) tools/matrix.py $(if $(PYTEST),,--output README.md) -- $(PYTEST)

docs: $(VENV)/.docs ## build the site, strictly, into build/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

bench: $(VENV)/.demo $(VENV)/.test $(PEERS)/.peers $(REVERSE)/.reverse ## run all benchmarks beside the other bridges; write their pages and plots
	$(PY) benchmarks/run.py --peers $(PEERS)/bin/python --reverse $(REVERSE)/bin/python \
	  $(if $(TORCHAX),--torchax $(TORCHAX)) $(BENCH)

gpu-check: ## GPU tests and benchmarks into docs/gpu.md (8 minutes; by PYTHON, which has torch and jax)
	$(PYTHON) benchmarks/programs/gpu.py $(GPU)

wheel: $(VENV)/.test $(VENV)/.wheel ## build sdist and wheels into dist/, audit them, install and call them
	$(PY) tools/wheel.py
	$(PY) -m pytest tests/package/test_wheel.py $(PYTEST)

lint: $(VENV)/.lint ## ruff, pyright and clang-format
	$(VENV)/bin/ruff check $(PYTHONS)
	$(VENV)/bin/ruff format --check $(PYTHONS)
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP) $(FAKES)

format: $(VENV)/.lint ## let ruff and clang-format rewrite the sources
	$(VENV)/bin/ruff check --fix $(PYTHONS)
	$(VENV)/bin/ruff format $(PYTHONS)
	$(VENV)/bin/clang-format -i $(CPP) $(FAKES)

clean: ## remove the environments and all that was built
	rm -rf $(VENV) $(PEERS) $(REVERSE) .venv-matrix build dist .pytest_cache .ruff_cache
	find src tests examples tools -name __pycache__ -type d -prune -exec rm -rf {} +

# -- the environment: one stamp for each step, so that a second run starts at once -------------------

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "torch2jax needs Python >= 3.11 with venv; $(PYTHON) is not. Try: make PYTHON=python3.11"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	@touch $@

# The PyTorch and the jax of the package's own environment: only the bridges differ.
$(PEERS)/.peers: $(VENV)/.torch benchmarks/requirements/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet '$(TORCH)'
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet \
	  -r benchmarks/requirements/peers.txt
	@touch $@

$(REVERSE)/.reverse: $(VENV)/.torch benchmarks/requirements/reverse.txt
	$(PYTHON) -m venv $(REVERSE)
	$(REVERSE)/bin/python -m pip --disable-pip-version-check install --quiet '$(TORCH)'
	$(REVERSE)/bin/python -m pip --disable-pip-version-check install --quiet \
	  -r benchmarks/requirements/reverse.txt
	@touch $@

# Editable: changes under src/ count at once, and what the extension is built of builds it again. In
# isolation, because one binary for jax 0.7 and everything newer needs the headers of jaxlib 0.7.
$(VENV)/.package: $(VENV)/.torch pyproject.toml CMakeLists.txt $(CPP)
	$(PIP) --editable .
	@touch $@

# The extras come without the package, which would be built again with each of them. The tests also
# build it once without isolation, with the newest headers.
$(VENV)/.test: $(VENV)/.package tools/requirements.py
	$(PY) tools/requirements.py test --build | $(PIP) -r /dev/stdin
	@touch $@

# Beside the environment: transformers would import it, and this wheel is built for CUDA.
$(VENV)/.vision: $(VENV)/.test
	$(PIP) --no-deps --target $(VENV)/vision '$(TORCHVISION)' && $(PIP) pillow
	@touch $@

$(VENV)/.timm: $(VENV)/.vision
	$(PIP) --no-deps --target $(VENV)/vision timm
	@touch $@

$(VENV)/.demo $(VENV)/.docs $(VENV)/.lint $(VENV)/.wheel: $(VENV)/.%: $(VENV)/.package tools/requirements.py
	$(PY) tools/requirements.py $* | $(PIP) -r /dev/stdin
	@touch $@
