# Everything a newcomer needs: `make demo` and `make test` set up their own environment in .venv first.
#   PYTHON=python3.12   another interpreter (3.10 to 3.13)
#   TORCH="torch==2.13.0 --index-url URL"   another build of PyTorch, such as a CPU-only one
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
DEMO := demo
# Compiled into the checkout by the editable install.
KERNELS := hatch_build.py $(wildcard runtimes/moebius_runtime/kernels/src/*)

.PHONY: help setup kernels demo serve page-lint docs test test-all test-full test-runtime test-avx2 fuzz lint clean

help:  ## Says what there is.
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready  ## Makes .venv with everything for export, tests and development.

kernels: $(VENV)/.ready  ## Compiles the kernels for ONNX Runtime again where their sources have changed.

$(VENV)/.ready: pyproject.toml $(KERNELS)
	@echo "== setting up $(VENV) with $$($(PYTHON) --version) (PyTorch is the large part; some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[ort,export,train,trt-rtx,serve,dev]'
	@touch $@

demo: $(VENV)/.ready  ## Exports the small network that comes with the project and removes two flowers from a photograph, on the CPU.
	@echo "== 1/2 export: PyTorch -> ONNX, each file compared with PyTorch"
	$(BIN)/moebius-export onnx --preset small --out $(DEMO)/bundle
	@echo "== 2/2 inpaint: no PyTorch from here on"
	$(BIN)/moebius-inpaint docs/demo/photo.jpg --mask docs/demo/mask.png --bundle $(DEMO)/bundle \
	  --start pixels --steps 10 --strength 0.2 --out $(DEMO)/after.png --save-comparison --overwrite
	@echo "== look at $(DEMO)/after-comparison.png (before | mask | after)."
	@echo "   This network has a sixtieth of Moebius' parameters and was trained on two CPU cores for some hours: it fills small"
	@echo "   regions in simple scenery (docs/small.md). With the released weights: moebius-export onnx --out moebius-bundle"
	@echo "== to paint on a page, with this bundle: make serve"

serve: $(VENV)/.ready  ## Serves the bundle of `make demo` and opens its page in the browser.
	@test -f $(DEMO)/bundle/manifest.json || { echo "there is no bundle in $(DEMO)/bundle yet: run make demo first"; exit 2; }
	$(BIN)/moebius-serve $(DEMO)/bundle --open

page-lint:  ## Type checks, lint and unit tests of the page (npm; nothing of it is shipped).
	@command -v npm >/dev/null || { echo "make page-lint needs npm: apt install npm"; exit 2; }
	cd tests/page && npm install --silent --no-audit --no-fund && npm run --silent types && npm run --silent lint && npm test

docs: $(VENV)/.ready  ## Writes docs/commands.md from the commands' own help.
	$(BIN)/python scripts/commands_page.py

test: $(VENV)/.ready  ## Lints, type-checks, and tests every property at least once (some minutes).
	$(MAKE) lint
	@echo "== tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not full and not slow"

test-all: $(VENV)/.ready  ## What `test` does, and the slow proofs with it: processes that train together, all cases of a sweep.
	$(MAKE) lint
	@echo "== all tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not full"

test-full: $(VENV)/.ready  ## The full-size network: export, golden sampler, golden picture (8 GiB, some minutes).
	@echo "== full-size tests"
	$(BIN)/python -m pytest -m full

test-runtime:  ## The runtime's tests in an environment of their own, without PyTorch.
	@echo "== runtime without PyTorch"
	$(PYTHON) -m venv $(VENV)-runtime
	$(VENV)-runtime/bin/python -m pip install --quiet '.[ort,serve]' onnx pytest pytest-xdist hypothesis filelock hatchling httpx openai
	OMP_NUM_THREADS=1 $(VENV)-runtime/bin/python -m pytest -n $(WORKERS) --dist loadgroup tests/runtime tests/kernels tests/serve

# What depends on the processor's instructions. `TESTS=tests` takes all (hours).
TESTS ?= tests/kernels tests/bench/test_rate.py tests/runtime/test_kernels.py tests/calibration/test_int8_arrays.py \
  tests/calibration/test_ort_cpu.py tests/calibration/test_formats.py

test-avx2: $(VENV)/.ready  ## Tests of kernels and INT8 on an emulated processor with AVX2 only (qemu-user; 15 minutes).
	@echo "== tests on AVX2"
	OMP_NUM_THREADS=1 scripts/test-avx2.sh $(BIN)/python -m "not full" $(TESTS)

fuzz: $(VENV)/.ready  ## 10,000 hostile manifests, pictures, masks and requests.
	MOEBIUS_FUZZ_CASES=10000 $(BIN)/python -m pytest tests/runtime/test_fuzz.py tests/serve/test_load.py -k "fuzz or hostile"

lint: $(VENV)/.ready  ## ruff and mypy.
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## Removes what the other targets made.
	rm -rf $(VENV) $(VENV)-runtime $(DEMO) tests/page/node_modules
