# make test   the whole CPU test suite        make demo   label, train, calibrate, evaluate, report
# Both make their own .venv on first use and need nothing else. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
MODEL ?= recipes/embedded/student
TEACHER ?= recipes/embedded/teacher
DATASET ?= recipes/embedded
SEEDS ?= 3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo evidence test nightly lint format clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## the method end to end; options: MODEL= TEACHER= DATASET= RUN= SEEDS=
	$(BIN)/python recipes/demo.py --model $(MODEL) --teacher_model $(TEACHER) --dataset $(DATASET) \
		--output_dir $(RUN) --num_seeds $(SEEDS)

evidence: $(STAMP)  ## every table of docs/results; options: TABLES= PAIRS= DATA= (see recipes/paper.py --help)
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/paper.py --output_dir runs/paper $(if $(TABLES),--tables $(TABLES)) \
		$(if $(PAIRS),--pairs $(PAIRS)) $(if $(DATA),--data $(DATA))

test: $(STAMP)  ## the CPU test suite
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

nightly: $(STAMP)  ## hours: all tests, 1000 random calls against a naive decoder, 200 pairs of threads, 300 interrupts
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/differential.py --cases 1000 --jobs 2
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/test_threads.py --tries 200
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/test_interrupts.py --tries 300

lint: $(STAMP)  ## ruff, lint and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## rewrite the files the way `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the targets above made
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
