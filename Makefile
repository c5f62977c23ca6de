# make bench    build, filter photographs, run the quick benchmark, print its table, write its figures
# make test     build, then lint, types and every test that needs no GPU
# make train-demo    train a small SPANet on handwritten digits, with other filters and without
# make soak     every operator 20,000 times in two threads
# make gpu      on a GPU machine, with what is installed there: build for it, test, sanitize, benchmark in full

PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/* csrc/*/*) setup.py pyproject.toml
OUT ?= benchmarks/out

.PHONY: bench bench-full test train-demo soak build gpu gpu-build gpu-sanitize compat install-check clean

bench: build
	$(BIN)/python -m benchmarks photos ops layers models report --quick --out $(OUT)

bench-full: build
	$(BIN)/python -m benchmarks --full --out $(OUT)

test: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

train-demo: build
	$(BIN)/python -m spanet train-demo --out $(OUT)

soak: build
	$(BIN)/python tests/soak.py

build: .venv/built

# setuptools, ninja and pybind11 build the package; torch brings its headers and Triton
.venv/installed:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check setuptools==84.2.1 ninja==1.13.2 pybind11==3.1.0 torch==2.14.1 numpy==2.4.6
	touch $@

.venv/built: .venv/installed $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[bench,demo,test]'
	touch $@

# the machine may have no network: nothing is installed, the libraries are built in place for the GPU that is there
gpu: gpu-build
	$(PYTHON) -m pytest -q -n 8 tests/test_gpu.py
	$(MAKE) gpu-sanitize
	$(PYTHON) -m benchmarks --full --device cuda --out $(OUT)

gpu-build:
	SPANET_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST=$$($(PYTHON) -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") \
		$(PYTHON) setup.py -q build_ext --inplace

gpu-sanitize:
	mkdir -p $(OUT)
	for tool in memcheck racecheck initcheck synccheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) tests/gpu_launches.py > $(OUT)/$$tool.log 2>&1 \
			|| { cat $(OUT)/$$tool.log; exit 1; }; \
		tail -n 1 $(OUT)/$$tool.log; \
	done

# one built library on the oldest and on the newest torch
COMPAT = numerics gradients compile bad_input pair mlp mixer_branch outer_sum branch_norm
compat: build
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	$(PYTHON) -m venv build/torch-2.11
	build/torch-2.11/bin/python -m pip install -q torch==2.11.0 numpy==2.4.6 pytest==9.2.0 hypothesis==6.170.15
	build/torch-2.11/bin/python -m pip install -q --no-deps --force-reinstall build/wheel/*.whl
	mkdir -p build/elsewhere && cp -r tests build/elsewhere/
	cd build/elsewhere && ../torch-2.11/bin/python -m pytest -q $(COMPAT:%=tests/test_%.py)

# both ways of pip, each in an empty virtual environment
install-check:
	$(PYTHON) -m venv --clear build/isolated && build/isolated/bin/python -m pip install -q .
	cd build && isolated/bin/python -m spanet_kernels
	$(PYTHON) -m venv --clear build/plain
	build/plain/bin/python -m pip install -q setuptools==84.2.1 ninja==1.13.2 pybind11==3.1.0 torch==2.14.1 numpy==2.4.6
	build/plain/bin/python -m pip install -q --no-build-isolation --no-deps .
	cd build && plain/bin/python -m spanet_kernels

clean:
	rm -rf .venv build *.egg-info spanet_kernels/*.so
