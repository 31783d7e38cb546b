# Two commands: `make demo` and `make test`. Both make .venv first.
MODEL ?= bert
PYTHON ?= python3
PY := .venv/bin/python
# One device is enough for the demo, and nothing of it comes from the Hub.
export CUDA_VISIBLE_DEVICES ?= 0
export HF_HUB_OFFLINE ?= 1

.PHONY: help install demo test test-slow soak lint format clean

help: ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

install: .venv/.installed ## Make .venv and install the pinned requirements

.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# What the tests alone need beside it; they are skipped where it cannot be had.
.venv/.installed-for-tests: .venv/.installed tests/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt \
	    && touch $@ || echo "Not all of tests/requirements.txt could be installed: some tests will be skipped."

demo: install ## Pretrain, fine-tune and report on the built-in corpus (MODEL=bert or gpt)
	$(PY) scripts/pretrain.py recipes/quickstart/$(MODEL).yaml
	./run_finetune.sh --model_name_or_path runs/quickstart-$(MODEL)
	$(PY) scripts/report.py --run_dir runs/quickstart-$(MODEL)

test: .venv/.installed-for-tests ## Run the tests (no network)
	$(PY) -m pytest

test-slow: .venv/.installed-for-tests ## Run the tests that take minutes
	$(PY) -m pytest -m slow

soak: install ## Kill a run 50 times at random moments (about half an hour)
	$(PY) tests/soak.py

lint: install ## Check style
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: install ## Format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## Remove the environment and caches of the tools, not runs/
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
