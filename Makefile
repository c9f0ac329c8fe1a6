# Everything is set up by the target that needs it: `make demo` and `make test` are all a newcomer types.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out
DATA   ?=
BENCH  ?=
TICK   ?= 10
# `make gpu` uses the environment where there is one, else a Python that has PyTorch; WHEELS holds what else it needs
GPU_PYTHON  ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_VERSION ?= 3.12
GPU_OUT     ?= figures
GPU_PARTS   ?=
WHEELS      ?= .whl

.PHONY: demo test test-full test-browser lab bench bench-train bench-traffic bench-dashboards gpu gpu-wheels figures demo-checkpoint readme docs hooks clean help

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

# pip says nothing for minutes: a line every 10 seconds with the time and what it does; all of it stands in install.log
$(VENV)/.ready: settings.ini constraints.txt setup.py pyproject.toml
	@echo "Setting up $(VENV): 2 minutes on an idle machine, 5 beside other work, 6 GB the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e '.[dev]' \
	  >$(VENV)/install.log 2>&1 & pip=$$!; trap 'kill $$pip 2>/dev/null; exit 130' INT TERM HUP; \
	while sleep $(TICK); kill -0 $$pip 2>/dev/null; do printf '%4d s  %.100s\n' $$SECONDS "$$(tail -n 1 $(VENV)/install.log)"; done; \
	wait $$pip || { tail -n 20 $(VENV)/install.log; echo "the installation failed: all of it is in $(VENV)/install.log"; exit 1; }
	@$(BIN)/jupyter labextension disable @jupyterlab/apputils-extension:announcements >/dev/null 2>&1 || true
	@touch $@

setup: $(VENV)/.ready   ## create the environment

demo: $(VENV)/.ready    ## pre-train a small AaSP, probe it, draw figures (DATA=folder-or-manifest for your own audio)
	@mkdir -p $(OUT)/demo
	@exec $(BIN)/aasp run demo $(OUT)/demo/demo.ipynb -r out "$(abspath $(OUT))/demo" $(if $(DATA),-r data "$(abspath $(DATA))")
	@echo; cat $(OUT)/demo/summary.txt

test: $(VENV)/.ready    ## every test that fits into 14 minutes on two cores
	@$(BIN)/python tests/run.py

test-full: $(VENV)/.ready  ## the long ones too: many kills, every page in the browser, a wheel in a clean environment
	@$(BIN)/python tests/run.py --full

test-browser: $(VENV)/.ready  ## dashboards in a real browser (installs Debian's chromium where it can)
	@command -v chromium >/dev/null || (apt-get update -q && apt-get install -y -q chromium) || echo "no chromium: install it by hand"
	@$(BIN)/python -m pytest -q tests/test_dashboards.py --full

lab: $(VENV)/.ready     ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir nbs

bench: $(VENV)/.ready   ## time the adaptive convolution and a training step (on a busy machine BENCH="-p clock cpu -p threads 1")
	@mkdir -p $(OUT)
	@for name in bench_sblu bench_training; do \
	  $(BIN)/papermill --cwd nbs/runs nbs/runs/$$name.ipynb $(OUT)/$$name.ipynb --no-progress-bar --log-output $(BENCH) || exit 1; done

bench-train: $(VENV)/.ready  ## clips/s of both patch embeddings and both predictors, beside timm's blocks alone (BENCH="-p device cuda")
	@mkdir -p $(OUT)
	@$(BIN)/papermill --cwd nbs/runs nbs/runs/bench_train.ipynb $(OUT)/bench_train.ipynb --no-progress-bar --log-output $(BENCH)

bench-traffic: $(VENV)/.ready  ## what the GPU kernels ask of memory, counted without a GPU, with predicted times (minutes)
	@$(BIN)/python tests/bench_traffic.py

bench-dashboards: $(VENV)/.ready  ## slider step to redraw, in a real browser
	@$(BIN)/python tests/bench_dashboards.py

gpu:             ## what waits for a GPU, part by part (GPU_PARTS="kernels bench", GPU_OUT=folder, wheels of `make gpu-wheels`)
	@if ! test -x $(BIN)/python && compgen -G "$(WHEELS)/*.whl" >/dev/null; then \
	  $(GPU_PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade --target $(OUT)/gpu-site $(WHEELS)/*.whl || exit 1; fi
	@PYTHONPATH=$(abspath $(OUT))/gpu-site:$$PYTHONPATH $(GPU_PYTHON) tests/gpu.py $(GPU_PARTS) --out $(GPU_OUT)

gpu-wheels:      ## fetch what a GPU machine without network lacks, for Python GPU_VERSION (3.12)
	@$(GPU_PYTHON) -m pip download -q --no-deps --only-binary=:all: --python-version $(GPU_VERSION) --implementation cp \
	  $(foreach glibc,2_34 2_28 2_27 2_17 2014 1,--platform manylinux$(if $(findstring _,$(glibc)),_)$(glibc)_x86_64) \
	  -d $(WHEELS) -r tests/gpu_wheels.txt && ls $(WHEELS)

figures: $(VENV)/.ready  ## regenerate every figure
	@mkdir -p $(OUT) && $(BIN)/papermill nbs/runs/figures.ipynb $(OUT)/figures.ipynb --no-progress-bar

demo-checkpoint: $(VENV)/.ready  ## retrain the small committed checkpoint on generated clips
	@mkdir -p $(OUT) && $(BIN)/papermill nbs/runs/train_demo_checkpoint.ipynb $(OUT)/train_demo_checkpoint.ipynb --no-progress-bar --log-output

readme: $(VENV)/.ready  ## README.md from nbs/index.ipynb
	@$(BIN)/python tests/build_readme.py

docs: $(VENV)/.ready    ## the documentation site, into _docs
	@$(BIN)/mkdocs build -q

hooks: $(VENV)/.ready   ## nbdev's merge driver and clean hook for this clone
	@$(BIN)/nbdev_install_hooks

clean:                  ## remove outputs (not the environment)
	rm -rf $(OUT) _proc _docs .pytest_cache
