# Each target does all of its own set-up: a virtual environment, dependencies, the build.
#
#   PYTHON   Python >= 3.10 to start from                 (python3)
#   VENV     the virtual environment; empty: use PYTHON as it is and install nothing but fastattn (.venv)
#   TORCH    the torch to install and build with          (torch==2.13.0)
#   FASTATTN_CUDA  auto, on or off: see CMakeLists.txt    (auto)
#   PYTEST_ARGS, BENCH_ARGS, STEPS   handed on to pytest, python -m bench and tools/gpu_check.sh
#
# On a GPU machine without network, whose Python has torch: make gpu-check PYTHON=python3 VENV=

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

ifeq ($(VENV),)
py := $(PYTHON)
else
py := $(VENV)/bin/python
export PATH := $(abspath $(VENV))/bin:$(PATH)
ready := $(VENV)/.ready
endif
pip = $(py) -m pip --disable-pip-version-check
raw := build/wheel

.PHONY: demo test wheel lint bench gpu-check build install clean

demo: extra = demo
demo: install
	$(py) -m fastattn demo

test: extra = test
test: export FASTATTN_TESTS = ON
test: install
	ctest --test-dir build --output-on-failure
	PYTHONPATH=build $(py) -m pytest $(PYTEST_ARGS)

# The wheel to hand out, in dist/, with the oldest glibc that it runs on in its name.
wheel: build
	rm -rf dist
	$(py) -m auditwheel repair --exclude 'libtorch*.so' --wheel-dir dist $(raw)/*.whl

lint: $(ready)
	$(pip) install --quiet --group lint
	ruff check
	ruff format --check
	mypy
	git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh' | xargs clang-format --dry-run -Werror

bench: extra = demo
bench: export FASTATTN_BENCH = ON
bench: install
	$(py) -m bench $(BENCH_ARGS)

# What only a GPU can prove: the tests marked gpu, the sanitizer, the records. STEPS chooses among them.
gpu-check: export FASTATTN_CUDA = on
gpu-check: export FASTATTN_TESTS = ON
gpu-check: export FASTATTN_BENCH = ON
gpu-check: extra = test
gpu-check: install
	PYTHON=$(py) tools/gpu_check.sh $(STEPS)

install: build
ifneq ($(VENV),)
	$(pip) install --quiet "$$(echo $(raw)/*.whl)[$(extra)]"
endif
	$(pip) install --quiet --no-index --no-deps --force-reinstall $(raw)/*.whl

build: $(ready)
	rm -rf $(raw)
	$(py) -m build --wheel --no-isolation --skip-dependency-check --outdir $(raw)

# torch first: a later requirement such as torch>=2.11 then takes no other.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(pip) install --quiet --upgrade "pip>=25.1"
	$(pip) install --quiet "$(TORCH)"
	$(pip) install --quiet --group build
	$(pip) install --quiet --no-deps --group cutlass
	touch $@

clean:
	rm -rf build dist
