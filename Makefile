# `make demo` and `make test` do everything, virtual environment included.
VENV ?= .venv
PYTHON ?= python3
OUTPUT ?= outputs/demo.mp4
TEST_PROCESSES ?= 2
PROMPT ?= a red circle moving right on a blue background

BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo upscale test lint types benchmark machine-code gpu-test gpu-run

demo: $(INSTALLED)
	mkdir -p $(dir $(OUTPUT))
	HF_HUB_OFFLINE=1 $(BIN)/diffattn generate "$(PROMPT)" --attn radial --output $(OUTPUT)
	@echo "The video is at $(abspath $(OUTPUT))"

# Shorter than the defaults, for a CPU, and milder: at twice its size this small model loses its shapes,
# under dense attention too.
upscale: $(INSTALLED)
	mkdir -p outputs
	HF_HUB_OFFLINE=1 $(BIN)/diffattn upscale "$(PROMPT)" --num-frames 8 --base-steps 10 \
		--steps 10 --strength 0.3 --flow-shift 3 --output outputs/upscale.mp4
	@echo "The video is at $(abspath outputs/upscale.mp4)"

# A process per core with a thread each: tests are small, and threads of two tests get in each
# other's way. In the files' own order: those of few tests, which xdist leaves for the end, are the
# slowest.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# mypy cannot follow an editable install: it is given a plain copy of the package. What an earlier
# build has left in build/ would be copied, too.
types: $(INSTALLED)
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --target build/types .
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p diffattn

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/cpu.py --output benchmarks

# Exits with 1 where something is wrong with a kernel.
machine-code: $(INSTALLED)
	$(BIN)/python benchmarks/machine_code

# The next two are for machines with a GPU, which may have torch and Triton but not diffusers:
# docs/gpu.md. Nothing is installed; -P keeps the checkout's diffattn/, which lacks the sub-packages
# beside it, from hiding the installed one. gpu-run needs no installed one.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_TESTS = tests/kernels tests/benchmarks tests/test_attention.py tests/test_block_forms.py
GPU_RUN ?= --minutes 8

gpu-test:
	$(GPU_PYTHON) -P -m pytest $(GPU_TESTS)
	@if $(GPU_PYTHON) -P -c "import diffusers" 2>/dev/null; then \
		$(GPU_PYTHON) -P -m pytest -m gpu $(addprefix --ignore=,$(GPU_TESTS)) || [ $$? -eq 5 ]; \
	else echo "GPU tests of whole models are left out: they need diffusers"; fi

gpu-run:
	$(GPU_PYTHON) benchmarks/gpu_run run $(GPU_RUN)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
