# Everything is set up by the target that needs it: `make demo` and `make test` are all a newcomer types.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out
DATA   ?=

.PHONY: demo test test-full test-browser lab bench bench-dashboards figures demo-checkpoint readme docs hooks clean help

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(VENV)/.ready: settings.ini constraints.txt setup.py
	@echo "Setting up $(VENV): about 2 minutes and 6 GB the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/jupyter labextension disable @jupyterlab/apputils-extension:announcements >/dev/null 2>&1 || true
	@touch $@

setup: $(VENV)/.ready   ## create the environment

demo: $(VENV)/.ready    ## pre-train a small AaSP, probe it, draw figures (DATA=folder-or-manifest for your own audio)
	@mkdir -p $(OUT)/demo
	@$(BIN)/papermill nbs/runs/demo.ipynb $(OUT)/demo/demo.ipynb --no-progress-bar --log-output \
	  -p out "$(abspath $(OUT))/demo" $(if $(DATA),-p data "$(abspath $(DATA))")
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

bench: $(VENV)/.ready   ## time the adaptive convolution against its alternatives
	@mkdir -p $(OUT) && $(BIN)/papermill --cwd nbs/runs nbs/runs/bench_sblu.ipynb $(OUT)/bench_sblu.ipynb --no-progress-bar --log-output

bench-dashboards: $(VENV)/.ready  ## slider step to redraw, in a real browser
	@$(BIN)/python tests/bench_dashboards.py

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
