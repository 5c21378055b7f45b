# demo: the main job on real images. test: everything that must hold. check: the quick part of it. bench: the tables
# under benchmarks/results. Each installs what it needs into .venv first.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench

demo: .venv/run.stamp
	$(BIN)/distill-lightning compare configs/compare/digits.yaml

test: .venv/dev.stamp check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/run.stamp
	$(BIN)/distill-lightning compare configs/compare/fashion_mnist.yaml
	mkdir -p benchmarks/results/fashion_mnist/figures
	cd results/fashion_mnist && cp compare.yaml results.csv teachers.csv results.md ../../benchmarks/results/fashion_mnist
	cp results/fashion_mnist/figures/*.png benchmarks/results/fashion_mnist/figures

.venv/run.stamp: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
