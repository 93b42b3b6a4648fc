# Everything a newcomer needs: `make demo` and `make test` set up their own environment in .venv first.
#   PYTHON=python3.12   another interpreter (3.10 to 3.13)
#   TORCH="torch==2.13.0 --index-url URL"   another build of PyTorch, such as a CPU-only one
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# Twice two cores: tests wait for processes that they started and for bundles that another worker makes.
WORKERS ?= 4
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUNTIME := $(VENV)-runtime/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
DEMO := demo
# Compiled into the checkout by the editable install.
KERNELS := hatch_build.py $(wildcard runtimes/moebius_runtime/kernels/src/*)

.PHONY: help setup kernels demo serve page-lint docs test short-tests test-all test-full test-runtime test-webgpu test-avx2 test-avx2-emulated test-aarch64 fuzz lint lint-platforms release-lint dist wheels sbom newest clean

help:  ## Says what there is.
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready  ## Makes .venv with everything for export, tests and development.

kernels: $(VENV)/.ready  ## Compiles the kernels for ONNX Runtime again where their sources have changed.

$(VENV)/.ready: pyproject.toml $(KERNELS)
	@echo "== setting up $(VENV) with $$($(PYTHON) --version) (PyTorch is the large part; some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[ort,export,train,trt-rtx,serve,hub,cloud,ray,dev]'
	@touch $@

demo: $(VENV)/.ready  ## Exports the small network that comes with the project and removes two flowers from a photograph, on the CPU.
	@echo "== 1/2 export: PyTorch -> ONNX, each file compared with PyTorch"
	$(BIN)/moebius-export onnx --preset small --out $(DEMO)/bundle
	@echo "== 2/2 inpaint: no PyTorch from here on"
	$(BIN)/moebius-inpaint docs/demo/photo.jpg --mask docs/demo/mask.png --bundle $(DEMO)/bundle \
	  --out $(DEMO)/after.png --save-comparison --overwrite
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
	$(MAKE) -j2 lint short-tests

short-tests: $(VENV)/.ready  ## The tests of `test`, without the lint.
	@echo "== tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not full and not slow"

test-all: $(VENV)/.ready  ## What `test` does, and the slow proofs with it: processes that train together, all cases of a sweep.
	$(MAKE) lint lint-platforms
	@echo "== all tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not full"

test-full: $(VENV)/.ready  ## The full-size network: export, golden sampler, golden picture (8 GiB, some minutes).
	@echo "== full-size tests"
	$(BIN)/python -m pytest -m full

test-runtime:  ## The runtime's tests in an environment of their own, without PyTorch.
	@echo "== runtime without PyTorch"
	$(PYTHON) -m venv $(VENV)-runtime
	$(RUNTIME)/python -m pip install --quiet '.[ort,serve,hub]' onnx 'pytest<9.2' pytest-xdist hypothesis filelock hatchling httpx openai
	OMP_NUM_THREADS=1 $(RUNTIME)/python -m pytest -n $(WORKERS) --dist loadgroup tests/runtime tests/kernels tests/serve tests/batch

test-avx2: $(VENV)/.ready  ## All tests, as on a processor with AVX2 and no AVX-512 (scripts/test-avx2.sh).
	@echo "== tests on AVX2"
	OMP_NUM_THREADS=1 scripts/test-avx2.sh $(BIN)/python -n $(WORKERS) --dist loadgroup -m "not full and not slow"

test-webgpu: $(VENV)/.ready  ## WebGPU on a Vulkan driver in software, plugin providers, OpenVINO: environments of their own (chromium; minutes).
	@echo "== WebGPU, plugin providers and OpenVINO"
	PYTHON=$(PYTHON) scripts/test-webgpu.sh $(BIN)/python

# What depends on the processor's instructions.
TESTS ?= tests/kernels tests/bench/test_rate.py tests/runtime/test_kernels.py tests/calibration/test_int8_arrays.py \
  tests/calibration/test_ort_cpu.py tests/calibration/test_formats.py

test-avx2-emulated: $(VENV)/.ready  ## Tests of kernels and INT8 on an emulated processor with AVX2 only (qemu-user; 15 minutes).
	@echo "== tests on an emulated AVX2"
	OMP_NUM_THREADS=1 scripts/test-avx2.sh --emulated $(BIN)/python -m "not full" $(TESTS)

test-aarch64: $(VENV)/.ready  ## Kernels for Arm on emulated processors (g++-aarch64-linux-gnu, qemu-user; 3 minutes).
	@echo "== kernels on Arm"
	scripts/test-aarch64.sh $(BIN)/python

fuzz: $(VENV)/.ready  ## 10,000 hostile manifests, pictures, masks and requests.
	MOEBIUS_FUZZ_CASES=10000 $(BIN)/python -m pytest tests/runtime/test_fuzz.py tests/serve/test_load.py -k "fuzz or hostile"

lint: $(VENV)/.ready  ## ruff and mypy.
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-platforms: $(VENV)/.ready  ## mypy with the names that Windows and macOS have.
	@echo "== types on Windows and macOS"
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin

release-lint:  ## Lints the workflows and the container files (npm, and hadolint from PyPI).
	@command -v npm >/dev/null || { echo "make release-lint needs npm: apt install npm"; exit 2; }
	cd tests/page && npm install --silent --no-audit --no-fund && npm run --silent workflows
	$(BIN)/hadolint docker/*.Dockerfile

dist: $(VENV)/.ready  ## Builds an sdist and, from it, a pure wheel, twice: both builds must have the same bytes.
	$(BIN)/python scripts/build_dist.py dist

wheels: $(VENV)/.ready  ## What `dist` builds, and wheels with compiled kernels for this machine and AArch64 (g++-aarch64-linux-gnu; Linux).
	$(BIN)/python scripts/build_dist.py dist c++ aarch64-linux-gnu-g++

sbom: $(VENV)/.ready  ## Lists what `pip install moebius-edge[ort,serve]` brings, with versions and licences (CycloneDX).
	$(PYTHON) -m venv --clear $(VENV)-sbom
	$(VENV)-sbom/$(notdir $(BIN))/python -m pip install --quiet '.[ort,serve]'
	mkdir -p dist
	$(BIN)/cyclonedx-py environment --output-reproducible --output-file dist/sbom.json $(VENV)-sbom/$(notdir $(BIN))/python
	rm -rf $(VENV)-sbom

newest: $(VENV)/.ready  ## Upgrades the dependencies in .venv to their newest versions.
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager accelerate diffusers huggingface_hub numpy onnx onnx-ir onnxruntime onnxscript pillow pydantic

clean:  ## Removes what the other targets made.
	rm -rf $(VENV) $(VENV)-runtime $(VENV)-sbom $(VENV)-webgpu $(VENV)-plugins $(DEMO) dist tests/page/node_modules
