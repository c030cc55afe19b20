# Two commands do everything, set-up included:  make train   make test
#
#   make train | test | quick | lint | bench | mutants | codegen | sanitize |
#        gpu-check | docs | wheel | clean
#   make quick               under a minute: leaves out tests/gpu, tests/tools and what is marked
#                            slow: kernels in Triton's interpreter, conformance, gradient release,
#                            torch.compile, a language model
#   make PY=python3 test     that interpreter as it is: installs nothing, works offline; it needs
#                            torch, setuptools, ninja and pybind11, and pytest to test
#   make PY=python3 INSTALLED=1 train | test | quick
#                            with the lion_kernels that is installed there: builds nothing
#   make wheel               into dist/: a source distribution and a wheel, audited
#   make sanitize            the C++ under ASan and UBSan (GCC's): op tests, exactly sized buffers
#   make gpu-check OUT=DIR   all that it finds is in DIR, also when it fails or is killed
#
# Without PY the commands run in .venv, created on first use (from PYTHON, default python3).

.DEFAULT_GOAL := help
PYTHON ?= python3

ifdef PY
  # A path stays right in another folder.
  RUN := $(if $(findstring /,$(PY)),$(abspath $(PY)),$(PY))
  ENV :=
else
  RUN := .venv/bin/python
  ENV := .venv/.installed
endif

# Where Python looks first: into the tree, or, INSTALLED, past it.
TREE := PYTHONPATH=.
ifdef INSTALLED
  TREE :=
  IN_COPY := cd build/installed &&
endif

SOURCES := setup.py $(addprefix lion_kernels/,_about.py _version.py ops.py) $(shell find csrc -type f)
# What clang-format keeps.
NATIVE := $(shell find csrc bench tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')
BUILT := build/.built

.PHONY: help train test quick lint format bench mutants codegen sanitize gpu-check docs wheel clean built
.DELETE_ON_ERROR:

# The library in the tree belongs to one interpreter: another one builds its own.
ifneq ($(shell cat $(BUILT) 2>/dev/null),$(RUN))
  .PHONY: $(BUILT)
endif

help:
	@awk '!/^#/ {exit} {sub(/^# ?/, ""); print}' Makefile

train: built
	@ranks=$$($(RUN) -c "import torch; print(torch.cuda.device_count() or 4)") && \
	  $(TREE) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	  $(RUN) -m torch.distributed.run --standalone --nproc-per-node $$ranks \
	  examples/train_bytes.py $(ARGS)

test: built
	@$(IN_COPY) $(TREE) $(RUN) -m pytest $(ARGS)

quick: built
	@$(IN_COPY) $(TREE) $(RUN) -m pytest -m "not slow" $(addprefix tests/,ops vote states optimizer) $(ARGS)

lint: $(ENV)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(RUN) -c "import clang_format; clang_format.clang_format()" --dry-run --Werror $(NATIVE)

format: $(ENV)
	@$(RUN) -m ruff check --fix . || true
	@$(RUN) -m ruff format .
	@$(RUN) -c "import clang_format; clang_format.clang_format()" -i $(NATIVE)

bench: built
	@PYTHONPATH=. $(RUN) bench/cpu.py $(ARGS)

# What the compiler makes of every Triton kernel that ships, for GPUs that need not be there: prints
# it, and fails where it breaks the contract. About 4 minutes on two cores; the tests compile a few.
codegen: built
	@PYTHONPATH=. $(RUN) tools/codegen.py $(ARGS)

# On any machine with a CUDA GPU, offline, within 8 minutes beside the build: what the compiler
# makes of the kernels, tests, bench, sanitizers. Writes into OUT or bench/results/ as it goes.
gpu-check: export LION_KERNELS_CUDA ?= 1
gpu-check:
	@$(MAKE) --no-print-directory -s built || \
	  { $(if $(OUT),mkdir -p $(OUT); cp build/log $(OUT)/build.log;) exit 1; }
	@PYTHONPATH=. $(RUN) tools/gpu_check.py $(if $(OUT),--out $(OUT)) $(ARGS)

# With CUDA where a toolkit is there, unless LION_KERNELS_CUDA says otherwise. Needs the extra release.
wheel: $(ENV)
	@$(RUN) tools/wheels.py

# The pages of docs/ that come from code.
docs: built
	@PYTHONPATH=. $(RUN) tools/docs.py

# Breaks a copy of the library on purpose, again and again; every break must fail a test.
mutants: built
	@PYTHONPATH=. $(RUN) tools/mutants.py $(ARGS)

# A library of its own, in build/sanitize. Torch's allocator pads what it gives, so that a read
# beyond the end goes unseen there: test_memory.py has buffers of its own. -O1: -O3 takes three times
# as long to build and hides accesses that the compiler proved away.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED := build/sanitize/lib
SANITIZED_TESTS := test_memory test_stable test_step test_encode test_apply test_tally test_momentum test_rounding
sanitize: $(ENV)
	@mkdir -p build/sanitize
	@LION_KERNELS_CUDA=0 LION_KERNELS_CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer $(SANITIZERS)" \
	  LDFLAGS="$(SANITIZERS)" $(RUN) setup.py -q build --build-base build/sanitize \
	  --build-lib $(SANITIZED) > build/sanitize/log 2>&1 || { tail -n 20 build/sanitize/log; exit 1; } >&2
	@cxx=$${CXX:-c++}; \
	  LD_PRELOAD="$$($$cxx -print-file-name=libasan.so) $$($$cxx -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  LION_KERNELS_SANITIZED=$(SANITIZED) $(RUN) -m pytest -o pythonpath="$(SANITIZED) tests/helpers" \
	  -p no:cacheprovider -o timeout=1800 -k "not GPU and not reference" \
	  $(SANITIZED_TESTS:%=tests/ops/%.py) $(ARGS)

clean:
	rm -rf build dist *.egg-info lion_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A second make, because installing into .venv builds the library too.
built: $(ENV)
ifdef INSTALLED
	@$(RUN) tools/installed.py
else
	@$(MAKE) --no-print-directory -s $(BUILT)
endif

$(BUILT): $(ENV) $(SOURCES)
	@mkdir -p build
	@echo "building lion_kernels for $(RUN) (less than a minute on two cores) ..."
	@$(RUN) setup.py -q build_ext --inplace > build/log 2>&1 || { grep -E "^lion_kernels|error" build/log || tail -n 20 build/log; exit 1; } >&2
	@printf '%s' '$(RUN)' > $@

.venv/.installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'lion_kernels needs Python 3.10 or newer, got ' + sys.version.split()[0])"
	@set -- $${CXX:-c++}; command -v "$$1" > /dev/null || { echo "lion_kernels needs a C++ compiler, and $$1 is not there: install g++ or set CXX"; exit 1; }
	@echo "creating .venv and building into it (some minutes, once) ..."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install -q torch==2.13.0 'setuptools>=77' wheel pybind11 ninja numpy
	@.venv/bin/python -m pip install -q --no-build-isolation -e '.[train,dev,bench,release]' torch==2.13.0
	@touch $@
	@mkdir -p build && printf '%s' '.venv/bin/python' > $(BUILT)
