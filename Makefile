# `make demo` and `make test` do everything, virtual environment included.
VENV ?= .venv
PYTHON ?= python3
OUTPUT ?= outputs/demo.mp4
PROMPT ?= a red circle moving right on a blue background

BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test lint types benchmark

demo: $(INSTALLED)
	mkdir -p $(dir $(OUTPUT))
	HF_HUB_OFFLINE=1 $(BIN)/diffattn generate "$(PROMPT)" --attn radial --output $(OUTPUT)
	@echo "The video is at $(abspath $(OUTPUT))"

test: $(INSTALLED)
	$(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# mypy cannot follow an editable install: it is given a plain copy of the package.
types: $(INSTALLED)
	rm -rf build/types
	$(BIN)/python -m pip install --quiet --no-deps --target build/types .
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p diffattn

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/cpu.py --output benchmarks

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
