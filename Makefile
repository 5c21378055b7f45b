# demo: the main job on real images.
# compress: a network's file at a twentieth of its size, with the report that shows it, 2 minutes on 2 cores.
# test: everything that must hold, 11 minutes on 2 cores.
# check: what reads the code and does not run it.
# check-fast: that and the tests that are not slow, 2 minutes on 2 cores, for every save.
# bench: what a step costs, here and elsewhere, under 20 minutes on 2 cores.
# table: a table of accuracies under benchmarks/results.
# Each installs what it needs into .venv first.

PYTHON ?= python3
BIN := .venv/bin
# Of make table. fashion_mnist: 15 minutes on 2 cores. fashion_mnist_methods, fashion_mnist_rotation: two hours and one.
TABLE ?= fashion_mnist

.PHONY: demo compress test check check-fast bench table

demo: .venv/run.stamp
	$(BIN)/distill-lightning compare configs/compare/digits.yaml

compress: .venv/run.stamp
	$(BIN)/distill-lightning compress configs/start/deep_compression_cnn.yaml --seeds 0 1 2

test: .venv/dev.stamp check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-fast: .venv/dev.stamp check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m 'not slow'

bench: .venv/bench.stamp
	# Neither what glibc does with freed memory nor what an earlier run has compiled is to be part of the figures.
	MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 \
		$(BIN)/python -m benchmarks.throughput

table: .venv/run.stamp
	$(BIN)/distill-lightning compare configs/compare/$(TABLE).yaml
	mkdir -p benchmarks/results/$(TABLE)/figures
	cd results/$(TABLE) && cp compare.yaml results.csv teachers.csv results.md ../../benchmarks/results/$(TABLE)
	cp results/$(TABLE)/figures/*.png benchmarks/results/$(TABLE)/figures

.venv/run.stamp: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/bench.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
