# make quickstart: install, prepare a text that every machine has, train, sample. make test: run every test.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

quickstart: .venv/ready
	$(BIN)/python prepare_data.py python
	$(BIN)/python train.py config/quickstart.py
	printf 'class Server:\n    def' | $(BIN)/python sample.py --out_dir=out-quickstart --start=- --max_new_tokens=200
	$(BIN)/python tools/page.py out-quickstart/best --out=out-quickstart/model.html --start="$$(printf 'class Server:\n    def')"

test: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

# On Linux, torch and NVIDIA's libraries are 2.7 GB to download, torch for CPUs is 0.2 GB. The latter is installed if
# there is no NVIDIA GPU and pip is not configured to use another index; if the download fails, the default build is used.
CPU_TORCH := --index-url=https://download.pytorch.org/whl/cpu --retries=1 $(shell grep -o -m1 '^torch==[0-9.]*' requirements.txt)

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) and \
	  f"plainGPT needs Python 3.11 to 3.14, but this is {sys.version.split()[0]}; run: make PYTHON=python3.13")'
	$(PYTHON) -m venv .venv
	@if [ "$$(uname)" = Linux ] && ! ls /dev/nvidia* > /dev/null 2>&1 && ! command -v nvidia-smi > /dev/null \
	    && ! $(BIN)/python -m pip config list | grep -qE 'index|find-links|constraint'; then \
	  $(PIP) $(CPU_TORCH) 2> /dev/null || echo "cannot download the CPU build of torch: installing the default build"; fi
	$(PIP) --requirement=requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(PIP) --requirement=requirements-dev.txt
	touch $@

.PHONY: quickstart test
