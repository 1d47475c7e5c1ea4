# Everything runs in .venv, which each target makes or brings up to date: with what cmfast needs (.venv/runtime), or with
# the tools of its development as well (.venv/development).
PYTHON ?= python3
BIN := .venv/bin
CXX ?= g++

.PHONY: demo test coverage test-newest mutants lint docs sanitize bench peers static static-check static-oldest clean

demo: .venv/runtime
	$(BIN)/cmfast env
	$(BIN)/cmfast sample --model digits --count 100 --seed 0 --out samples.png
	$(BIN)/cmfast sample --model fashion --count 40 --seed 0 --accelerate --out clothes.png
	$(BIN)/cmfast bench latency --model digits --steps 5,10,40 --rounds 3 --plot latency.png

# A process more than there are cores, since some tests wait for what they have started; and what is compiled is kept,
# also where PYTHONDONTWRITEBYTECODE is set: tests start hundreds of processes.
test: .venv/development
	CMFAST_WERROR=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist loadfile \
		--no-loadscope-reorder $(MEASURED)

# The same, and which lines no test reaches: it takes a third longer.
coverage: MEASURED := --cov --cov-report=term
coverage: test

# The same with the newest torch and triton (a build for GPUs of several GB), in an environment of its own.
test-newest: .venv-newest/development
	.venv-newest/bin/pytest -n auto --dist loadfile --no-loadscope-reorder

# Do the tests notice? Single faults seeded into cmfast/, one a copy, and the related tests run on each: about an hour on
# two cores. ARGS="--only cmfast/sampling" takes one folder, --count, --seed and --list are others.
mutants: .venv/development
	$(BIN)/python tests/run_mutants.py $(ARGS)

lint: .venv/development
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The pages of docs/ as a site in out/docs; a warning is an error. The variable leaves out a notice of the theme.
docs: .venv/development
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The CPU kernels, and the CUDA kernels in their emulation, under the address and the undefined-behaviour sanitizer. Python
# itself knows nothing of them: so they are loaded first, and what Python leaves allocated is not looked at. Then the CPU
# kernels under the thread sanitizer.
sanitize: .venv/development
	CMFAST_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(BIN)/pytest -n auto tests/kernels -k "cuda or cpu or emulation" -p no:cacheprovider
	CMFAST_SANITIZE=thread $(BIN)/pytest tests/kernels/test_cpu_races.py -p no:cacheprovider

bench: .venv/development
	mkdir -p out
	$(BIN)/pytest benchmarks --benchmark-enable --benchmark-json=out/benchmarks.json

# One evaluation beside ncnn, OpenVINO, ONNX Runtime, torch.compile and PyTorch: at first a quarter of an hour, most of it
# in their converters and compilers.
peers: .venv/peers
	for dtype in fp32 bf16; do \
		$(BIN)/python -m benchmarks.peers.compare --dtype $$dtype --csv out/peers/imagenet64-$$dtype.csv || exit 1; \
	done

# The kernels' resources on every architecture, compiled without a GPU: written anew, or compared with what is committed.
static: .venv/development
	mkdir -p benchmarks/static out
	for arch in sm_80 sm_90 sm_100 sm_120 gfx942; do \
		$(BIN)/cmfast kernels --arch $$arch --json > out/$$arch.json && mv out/$$arch.json benchmarks/static/ || exit 1; \
	done

static-check: .venv/development
	CMFAST_STATIC=full $(BIN)/pytest tests/kernels/test_static.py tests/kernels/test_static_cuda.py

# Whether the oldest Triton that is supported compiles every kernel too.
static-oldest: .venv/triton-oldest
	PYTHONPATH=.venv/triton-oldest $(BIN)/cmfast kernels --arch sm_90

.venv/triton-oldest: .venv/development
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target $@ "triton==3.5.*"
	touch $@

# Without the CUDA extension, which takes a minute or two to compile.
.venv/runtime: pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	CMFAST_BUILD_CUDA=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

# With it, where there is nvcc; what runs is then there as well. A compiler's warning is an error.
.venv/development: pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	CMFAST_WERROR=1 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch .venv/runtime $@

.venv-newest/development: pyproject.toml setup.py $(shell find csrc -type f)
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	CMFAST_BUILD_CUDA=0 .venv-newest/bin/pip install --quiet --disable-pip-version-check --upgrade torch triton -e ".[dev]"
	touch $@

.venv/peers: .venv/runtime benchmarks/peers/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r benchmarks/peers/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-newest build dist out *.egg-info cmfast/*.so
