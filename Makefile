# make quickstart: set up, prepare text that every machine has, train, write. make test: every test.
PYTHON ?= python3
BIN := .venv/bin

quickstart: .venv/ready
	$(BIN)/python prepare_data.py python
	$(BIN)/python train.py config/quickstart.py
	$(BIN)/python bench/against_xz.py
	printf 'class Server:\n    def' | $(BIN)/python sample.py --out_dir=out-quickstart --start=- --max_new_tokens=200

test: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: quickstart test
