# SPDX-License-Identifier: Apache-2.0
# Two commands do everything on a fresh machine, set-up included:
#   make demo    train, save, load and time a soft prompt on real text
#   make test    lint, then every test
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
DEMO_ARGS ?=
TEST_ARGS ?=
SANITIZE_ARGS ?=
GPU_ARGS ?=
BENCH_ARGS ?= --quick
BENCH_OUT ?= build/bench
RESOURCES_ARGS ?=
CUDA_RESOURCES_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PINS := requirements-dev.txt
# A stamp for each step, so that a second run starts at once and a changed input redoes just its own step.
DEPS := $(VENV)/.stamp-dependencies
BUILD := $(VENV)/.stamp-build
# vLLM pins other versions of what the tests use, so it has an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM_PINS := requirements-vllm.txt
VLLM_DEPS := $(VLLM_VENV)/.stamp-dependencies
VLLM_TEST_ARGS ?=
CSRC := $(shell find csrc -type f)

.DELETE_ON_ERROR:
.PHONY: help install assets demo test test-vllm lint format native sanitize resources bench gpu clean

help:
	@echo "make demo     train, save, load and time a soft prompt on real text (4 to 6 minutes on two cores)"
	@echo "make test     lint, then every test"
	@echo "make test-vllm  the tests of the vLLM plugin alone, in vLLM's own environment"
	@echo "make lint     ruff, mypy and clang-format, changing nothing"
	@echo "make format   let ruff and clang-format rewrite the files"
	@echo "make native   rebuild the C++ extension and say how long it took; fails if it cannot be built"
	@echo "make sanitize run the C++ kernels' tests under AddressSanitizer and UBSan (some minutes)"
	@echo "make bench    time this package against others here (about ten minutes on two cores); ends with a page to read"
	@echo "make gpu      build, test and measure on a GPU, with the packages that PYTHON has (9 minutes at most)"
	@echo "make resources compile every Triton and CUDA kernel, with every configuration that ships, for GPUs that need not be here"
	@echo "make clean    remove what the targets above made"

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: PYTHON=$(PYTHON) must be Python 3.11 or newer (the pins need it), found: $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and by its pin: nothing that comes later can then choose another build of it.
$(DEPS): $(PINS) | $(PY)
	$(PIP) install --quiet "$$(grep '^torch==' $(PINS))"
	$(PIP) install --quiet --requirement $(PINS)
	@touch $@

# Without isolation the extension is built by the pinned tools, and nothing is downloaded twice.
$(BUILD): $(DEPS) pyproject.toml setup.py softprompt_fast/_version.py $(CSRC)
	$(PIP) install --quiet --no-build-isolation --constraint $(PINS) --editable '.[peft,train,bench,demo,dev]'
	$(PIP) check
	@$(PY) -c 'from softprompt_fast.backends import native; print("C++ extension:", native.status()[1])'
	@touch $@

install: $(BUILD)

assets: install
	$(PY) -c 'import sys; from softprompt_fast.demo.assets import main; sys.exit(main())'

demo: assets
	$(PY) -m softprompt_fast.cli demo $(DEMO_ARGS)

# One thread a worker: two workers of two threads each on two cores would only wait for one another.
test: assets lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(TEST_ARGS)
	$(MAKE) test-vllm

$(VLLM_PY): | $(PY)
	$(PYTHON) -m venv $(VLLM_VENV)

# The three that go are optional to vLLM; their CPU wheels are of other torch versions, and fail when imported.
$(VLLM_DEPS): $(VLLM_PINS) | $(VLLM_PY)
	$(VLLM_PY) -m pip --disable-pip-version-check install --quiet "$$(grep '^torch==' $(VLLM_PINS))"
	$(VLLM_PY) -m pip --disable-pip-version-check install --quiet --requirement $(VLLM_PINS)
	$(VLLM_PY) -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# The package is found through the path: its dependencies are there, and the extension is the one built above.
test-vllm: assets $(VLLM_DEPS)
	PYTHONPATH=. $(VLLM_PY) -m pytest -c tests/vllm_engine/pytest.ini --rootdir tests/vllm_engine \
	  tests/vllm_engine $(VLLM_TEST_ARGS)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CSRC)
	$(PY) -m mypy

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC)

native: $(DEPS)
	rm -rf build/temp.*
	@start=$$(date +%s) && SOFTPROMPT_FAST_BUILD=1 $(PY) setup.py --quiet build_ext --inplace --force && \
	  echo "C++ extension: built in $$(($$(date +%s) - start)) s on $$(getconf _NPROCESSORS_ONLN) processors"

# The extension goes to build/sanitize; the installed one stays. SANITIZE_ARGS: pytest's, instead of all tests.
sanitize: install
	$(PY) tests/sanitize.py $(SANITIZE_ARGS)

# BENCH_ARGS: --full, or sets and options (softprompt-fast bench --help).
bench: assets
	$(PY) -m softprompt_fast.cli bench $(BENCH_ARGS) --json $(BENCH_OUT)/rows.json --plot $(BENCH_OUT) \
	  --report $(BENCH_OUT)/benchmarks.md
	@echo "read $(BENCH_OUT)/benchmarks.md"

# With PYTHON and what it finds, no environment of its own: such machines have no network. GPU_ARGS: see --help.
gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(GPU_ARGS)

# Registers, spills and shared memory (some minutes). RESOURCES_ARGS: --write rewrites tests/triton_resources.json, as is
# needed when a kernel has changed; --only REGEX. CUDA_RESOURCES_ARGS: the same for the CUDA kernels, which need nvcc and
# ten minutes of processor time.
resources: install
	$(PY) -m tests.triton_resources $(RESOURCES_ARGS)
	$(PY) -m tests.triton_resources --entries
	$(PY) -m tests.cuda_resources $(CUDA_RESOURCES_ARGS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f softprompt_fast/_C.* softprompt_fast/_cuda.*
