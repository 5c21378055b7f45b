# demo: the main job on real images.
# compress: a network's file at a twentieth of its size, with the report that shows it, 2 minutes on 2 cores.
# test: everything that must hold, 20 minutes on 2 cores.
# test-lightning: every method, some of them by the whole contract, under an older version of Lightning, 1 minute on 2 cores.
# test-bolts: the same and the quick tests of hooks and callbacks under the oldest, and all that is tried with
#   lightning-bolts, which needs it, 2 minutes.
# test-lowest: the contract and the tests of values with the lowest version of everything, two environments of 7 GB.
# check: what reads the code and does not run it.
# check-fast: that and the tests that are not slow, 2 minutes on 2 cores, for every save.
# bench: what a step costs, here and elsewhere, under 20 minutes on 2 cores.
# table: a table of accuracies under benchmarks/results.
# Each installs what it needs into .venv first; test-lightning, into .venv-lightning, too; test-bolts, into .venv-bolts;
# test-lowest, into .venv-lowest.

PYTHON ?= python3
BIN := .venv/bin
# Of make table. fashion_mnist: 15 minutes on 2 cores. fashion_mnist_methods, fashion_mnist_rotation: two hours and one.
TABLE ?= fashion_mnist

# Older than the one that pip installs: the oldest, and the oldest after which nothing is left out.
LIGHTNINGS := 1.9.5 2.5.0
# Tests of the contract and of values: what else there is does not depend on versions, or is about the sources.
VALUES := tests/test_versions.py tests/test_schedules.py tests/callbacks tests/compression tests/data tests/functional \
	tests/layers tests/modules tests/outputs tests/storage tests/teachers
# What of them depends on Lightning, for an older one with the libraries that are there. Every module is trained for an epoch,
# comes back from its checkpoint and validates, tests and predicts; of the methods named the whole contract holds, resuming,
# accumulation and two processes too (and all with lightning-bolts, where that is);
CONTRACT := tests/modules/test_every_method.py \
	tests/modules/test_contract.py -k 'every_method or bolts or versions or kd or feed or under_dense'
# and the quick tests of hooks, loops, logging, callbacks and refusals, but for files that are about what methods compute.
FORMULAS := extracurricular feed feed_features kd kd_regression outputs_of_networks positions regression
QUICK := -m 'not slow' tests/test_versions.py tests/callbacks tests/modules/parts \
	$(filter-out $(FORMULAS:%=tests/modules/test_%.py),$(wildcard tests/modules/test_*.py))
# Old libraries warn of one another, and the tests of warnings look for ours.
OLD := -n auto --dist worksteal -W default -W "ignore:This property will be removed:DeprecationWarning"
LOWEST := OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest $(OLD)
# Of lightning-bolts 0.7.0 and pytorch-lightning 1.9.5 these are accepted, beside those of pyproject.toml; all others are
# errors. Both declare namespaces by pkg_resources and call what lightning-utilities and torchmetrics have renamed;
BOLTS := -n auto --dist worksteal -W 'ignore:pkg_resources is deprecated as an API:UserWarning' \
	-W 'ignore:Deprecated call to `pkg_resources:DeprecationWarning' \
	-W 'ignore:`ModuleAvailableCache` is a special case:DeprecationWarning' \
	-W 'ignore:This property will be removed:DeprecationWarning' \
	-W 'ignore:`pytorch_lightning.utilities.apply_func.apply_to_collection` has been:DeprecationWarning'
# lightning-bolts looks whether NumPy has its old names, and says of most of its classes that they may change.
BOLTS += -W 'ignore:In the future `np.:FutureWarning' -W 'ignore:The feature'
# Lightning 1.9 says that it calls a module's optimizer_step at optimiser steps alone, as the package wants it; that it does
# not know the samples of a prediction, which batches tell; that a run of one batch, logged or not, is a short one; and of
# two processes what pyproject.toml accepts of one: data in memory need no workers.
BOLTS += -W 'ignore:When using `Trainer(accumulate_grad_batches:UserWarning' \
	-W "ignore:Lightning couldn't infer the indices fetched:UserWarning" \
	-W 'ignore:The number of training batches:UserWarning' -W 'ignore:strategy=ddp_spawn and num_workers=0:UserWarning'

.PHONY: demo compress test test-lightning test-bolts test-lowest lint check check-fast bench table

demo: .venv/run.stamp
	$(BIN)/distill-lightning compare configs/compare/digits.yaml --workers 2

compress: .venv/run.stamp
	$(BIN)/distill-lightning compress configs/start/deep_compression_cnn.yaml --seeds 0 1 2

# mypy is a single process: beside the tests, it takes half of its time from them.
test: .venv/dev.stamp lint
	$(BIN)/mypy & types=$$!; \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal; tests=$$?; \
		wait $$types && exit $$tests

# Under the oldest, make test-bolts does the same and more.
test-lightning: .venv/dev.stamp .venv-lightning/$(lastword $(LIGHTNINGS)).stamp
	PYTHONPATH=$(CURDIR)/.venv-lightning/$(lastword $(LIGHTNINGS)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(OLD) \
		tests/test_versions.py $(CONTRACT)

test-bolts: .venv-bolts/stamp
	OMP_NUM_THREADS=1 .venv-bolts/bin/python -m pytest $(BOLTS) tests/bolts $(CONTRACT)
	OMP_NUM_THREADS=1 .venv-bolts/bin/python -m pytest $(BOLTS) $(QUICK)

test-lowest: .venv-lowest/stamp .venv-lowest-onnx/stamp $(LIGHTNINGS:%=.venv-lightning/%.stamp)
	PYTHONPATH=$(CURDIR)/.venv-lightning/$(lastword $(LIGHTNINGS)) $(LOWEST) $(VALUES)
	PYTHONPATH=$(CURDIR)/.venv-lightning/$(firstword $(LIGHTNINGS)) $(LOWEST) $(CONTRACT)
	PYTHONPATH=$(CURDIR)/.venv-lightning/$(firstword $(LIGHTNINGS)) $(LOWEST) $(QUICK)
	OMP_NUM_THREADS=1 .venv-lowest-onnx/bin/python -m pytest $(OLD) tests/compression/test_onnx.py

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: .venv/dev.stamp lint
	$(BIN)/mypy

check-fast: .venv/dev.stamp check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m 'not slow'

bench: .venv/bench.stamp
	# Neither what glibc does with freed memory nor what an earlier run has compiled is to be part of the figures.
	MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 \
		$(BIN)/python -m benchmarks.throughput

table: .venv/table.stamp
	$(BIN)/distill-lightning compare configs/compare/$(TABLE).yaml
	mkdir -p benchmarks/results/$(TABLE)/figures
	cd results/$(TABLE) && cp compare.yaml *.csv results.md ../../benchmarks/results/$(TABLE)
	cp results/$(TABLE)/figures/*.png benchmarks/results/$(TABLE)/figures

.venv/run.stamp: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/table.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet --editable '.[translation,detection]'
	touch $@

.venv/bench.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

.venv/dev.stamp: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch .venv/run.stamp $@

# Beside the environments, so that both can run with them. The oldest imports pkg_resources, which setuptools 81 left out.
.venv-lightning/%.stamp: .venv/dev.stamp
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv-lightning/$* pytorch-lightning==$* 'setuptools<81'
	touch $@

# An environment of its own, in which pip chooses; what it can use of .venv, PyTorch above all, it need not install again.
.venv-bolts/stamp: .venv/dev.stamp
	test -x .venv-bolts/bin/python || $(PYTHON) -m venv .venv-bolts
	$(BIN)/python -c 'import site; print(*site.getsitepackages())' > $$(echo .venv-bolts/lib/python*/site-packages)/shared.pth
	.venv-bolts/bin/python -m pip install --quiet --editable '.[bolts]'
	touch $@

.venv-lowest/stamp: setup.cfg tests/lowest.py
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python tests/lowest.py timm pytorchcv translation detection > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --upgrade pip
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/constraints.txt 'setuptools<81' pytest \
		pytest-xdist tensorly --editable '.[timm,pytorchcv,translation,detection]'
	touch $@

# The extra needs a newer PyTorch than the package.
.venv-lowest-onnx/stamp: setup.cfg tests/lowest.py
	test -x .venv-lowest-onnx/bin/python || $(PYTHON) -m venv .venv-lowest-onnx
	.venv-lowest-onnx/bin/python tests/lowest.py onnx > .venv-lowest-onnx/constraints.txt
	.venv-lowest-onnx/bin/python -m pip install --quiet --upgrade pip
	.venv-lowest-onnx/bin/python -m pip install --quiet --constraint .venv-lowest-onnx/constraints.txt 'setuptools<81' pytest \
		pytest-xdist --editable '.[onnx]'
	touch $@
