# `make demo` and `make test` set up everything they need: a virtual environment in .venv, and in .cache the ComfyUI that
# they run on, unless COMFYUI_DIR names another one.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo error-growth benchmark experiments smooth norms times answers pictures test check test-gpu gpu gpu-kit lint setup train clean

demo: setup
	$(RUN) tools/demo.py

# How a known error grows over 100 steps, with and without IEC: about 20 minutes on one CPU core.
error-growth: setup
	$(RUN) tools/error_growth.py

# What corrections, caches and quantization cost and keep: the tables of docs/benchmarks.md, docs/caching.md and
# docs/quantization.md, about three hours on two CPU cores.
benchmark: setup
	$(RUN) tools/benchmark.py
	$(RUN) tools/benchmark.py bias caches calibrated --architecture transformer
	$(RUN) tools/cache_benchmark.py --seeds 8 --intervals 2 3 5 10
	$(RUN) tools/cache_benchmark.py --steps 50 --seeds 4 --intervals 5 10 --repeat 1
	$(RUN) tools/cache_benchmark.py --quantized --seeds 1 --intervals 3
	$(RUN) tools/cache_benchmark.py --speed --latent 16
	$(RUN) tools/quantization_benchmark.py
	$(RUN) tools/quantization_benchmark.py --speed
	$(RUN) tools/layer_overhead.py

# The rows of docs/results that are missing; all take less than four hours on two CPU cores. It can be stopped, and goes on.
experiments: setup
	$(RUN) tools/experiments.py $(OPTIONS)

# The U-Net's weights that smoothness.csv and smoothness_norms.csv are of: half an hour on two CPU cores. It can be stopped likewise. Needs npm.
smooth: setup
	$(RUN) tools/train_smooth.py

# The norms of docs/results/norms.csv and smoothness_norms.csv that are missing; all take about twelve minutes on two CPU cores. It can be stopped likewise.
norms: setup
	$(RUN) tools/norms.py $(OPTIONS)

# How long the runs take that a user chooses between, for docs/results/times.csv: about 20 minutes of a machine that has nothing else to
# do. All are measured together.
times: setup
	$(RUN) tools/times.py $(OPTIONS)

# The tables and figures of docs/results.md, from the rows, in seconds.
answers: setup
	$(RUN) tools/answers.py

# The example workflows as ComfyUI's frontend saves them, their pictures, and one of every node, and those of the README: about nine minutes.
pictures: setup
	$(RUN) tools/draw_workflows.py

# In three processes of one thread each, for two used 72 % of two cores; a file of tests in one of them, and in one, first, all that
# share a server, those in the browser among them, which take longest: tests/conftest.py groups them.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The tests in tests/browser need Chromium, and install it where they may. OPTIONS are pytest's, such as --random-order.
test: setup lint
	$(PYTEST) tests $(OPTIONS)

# For whoever changes a line: linter, types, unit tests, and a path through each kind of node in the real host.
check: setup lint
	$(PYTEST) tests/unit tests/host -m fast $(OPTIONS)

test-gpu: setup
	$(RUN) -m pytest tests/gpu

# What a GPU says: the tests of tests/gpu, then, also where one fails, the tables of docs/gpu/<card>.md and .csv, in at most eight minutes.
gpu: setup
	$(RUN) -m pytest tests/gpu; failed=$$?; $(RUN) tools/gpu_tables.py $(OPTIONS) && exit $$failed

# The folder output/gpu-kit, with which a machine that has a GPU but no network does the work of `make gpu`: copy it there and run its
# run.py with a Python 3.12 that has torch 2.11. About a minute.
gpu-kit: setup
	$(RUN) tools/gpu_kit.py

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

setup: $(VENV)/.installed
	$(RUN) tools/comfyui.py

# Trains the built-in models on by one run each, about two hours of one CPU core, and says what it brought. It can be stopped, and
# goes on. Needs npm, which fetches the images. What comes out becomes the built-in models' weights (nodes/assets) when the numbers
# of all pages are taken anew with it.
TRAINING := tools/assets/training
train: setup
	$(RUN) tools/train_builtin_model.py
	$(RUN) tools/train_transformer.py
	$(RUN) tools/model_distance.py --model $(TRAINING)/emoji32.safetensors
	$(RUN) tools/model_distance.py --architecture transformer --model $(TRAINING)/emoji32_flow.safetensors

$(VENV)/.installed: requirements-dev.txt tools/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c tools/constraints.txt
	touch $@

clean:
	rm -rf $(VENV) .cache output
