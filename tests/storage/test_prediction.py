"""What is written is read one epoch later: by any process, after any checkpoint, in any type."""

import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from distill_lightning import InputError
from distill_lightning.storage import FORMAT, PredictionStore
from distill_lightning.storage import rows as rows_file
from distill_lightning.storage.prediction_rows import PredictionRows
from distill_lightning.testing.processes import leave_the_group

N, K = 11, 5
KINDS = [
    {},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16},
    {"top_k": 2},
    {"top_k": 1, "dtype": torch.float16},
    {"top_k": K, "dtype": torch.bfloat16},
]


def probabilities(count, classes=K, seed=0, scale=3.0):
    return (torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)) * scale).softmax(1)


def everything(store):
    return store.read(torch.arange(store.num_samples))


def loaded(state):
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Naive:
    """Two dictionaries."""

    def __init__(self):
        self.now, self.next = {}, {}

    def write(self, index, rows):
        for i, row in zip(index.tolist(), rows.tolist(), strict=True):
            self.next[i] = row

    def advance(self):
        self.now.update(self.next)
        self.next = {}

    def check(self, store):
        probs, known = everything(store)
        assert known.tolist() == [i in self.now for i in range(store.num_samples)]
        for i, row in self.now.items():
            assert probs[i].tolist() == row


def test_it_is_two_dictionaries():
    store, naive = PredictionStore(N, K), Naive()
    generator = torch.Generator().manual_seed(5)
    for epoch in range(4):
        for step in range(4):
            # Drawn with replacement: samples come twice in a batch and in an epoch, others not at all.
            index = torch.randint(N, (3,), generator=generator)
            rows = probabilities(3, seed=10 * epoch + step)
            store.write(index, rows)
            naive.write(index, rows)
            naive.check(store)
        store.advance()
        naive.advance()
        naive.check(store)
    assert 0 < len(naive.now) <= N


def test_nothing_is_known_at_first_and_reads_as_uniform():
    probs, known = everything(PredictionStore(3, 4))
    assert not known.any()
    assert probs.tolist() == [[0.25] * 4] * 3
    assert probs.dtype == torch.float32


def test_what_is_written_in_an_epoch_is_not_read_in_it():
    store = PredictionStore(N, K)
    first, second = probabilities(N), probabilities(N, seed=1)
    store.write(torch.arange(N), first)
    store.advance()
    store.write(torch.arange(N), second)
    assert torch.equal(everything(store)[0], first)
    store.advance()
    assert torch.equal(everything(store)[0], second)


def test_the_last_write_of_a_sample_wins_within_a_batch_and_over_batches():
    store, rows = PredictionStore(N, K), probabilities(4)
    store.write(torch.tensor([3, 1, 3, 3]), rows)
    store.write(torch.tensor([1]), rows[:1])
    store.advance()
    probs, known = everything(store)
    assert torch.equal(probs[3], rows[3])
    assert torch.equal(probs[1], rows[0])
    assert known.nonzero().flatten().tolist() == [1, 3]


def test_a_sample_that_stands_twice_in_a_batch_is_written_the_same_both_times(monkeypatch):
    # Devices write the rows of an index in any order; here they are written in turn, so that would not be seen.
    written = []
    pack = PredictionRows.pack
    monkeypatch.setattr(PredictionRows, "pack", lambda kind, rows: written.append(rows) or pack(kind, rows))
    rows = probabilities(5)
    PredictionStore(N, K).write(torch.tensor([3, 1, 3, 3, 1]), rows)
    assert torch.equal(written[0], rows[[3, 4, 3, 3, 4]])


def test_a_row_that_is_not_written_again_stays():
    store = PredictionStore(N, K)
    store.write(torch.arange(N), probabilities(N))
    store.advance()
    store.write(torch.tensor([4]), probabilities(1, seed=9))
    store.advance()
    store.advance()
    probs, known = everything(store)
    expected = probabilities(N)
    expected[4] = probabilities(1, seed=9)[0]
    assert torch.equal(probs, expected)
    assert known.all()


# Rows that are not kept


def kept_of(count, seed):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_that_are_not_kept_might_as_well_not_be_there(kind):
    masked, chosen = PredictionStore(N, K, **kind), PredictionStore(N, K, **kind)
    generator = torch.Generator().manual_seed(7)
    twice = 0
    for epoch in range(4):
        for step in range(5):
            # Drawn with replacement: some samples come twice in a batch, once kept and once not.
            index = torch.randint(N, (6,), generator=generator)
            rows, keep = probabilities(6, seed=10 * epoch + step), kept_of(6, seed=10 * epoch + step)
            masked.write(index, rows, keep)
            chosen.write(index[keep], rows[keep])
            twice += len(set(index[keep].tolist()) & set(index[~keep].tolist()))
        for store in (masked, chosen):
            store.advance()
        assert all(torch.equal(a, b) for a, b in zip(everything(masked), everything(chosen), strict=True))
    assert twice > 4


@pytest.mark.parametrize("kind", [{}, {"top_k": 2}], ids=str)
def test_what_is_not_kept_leaves_what_an_earlier_batch_wrote(kind):
    store, rows = PredictionStore(N, K, **kind), probabilities(6)
    store.write(torch.tensor([3, 1, 0]), rows[:3])
    # Sample 3 stands in the batch twice and is kept once, in either order; 1 and 0 are not kept.
    store.write(torch.tensor([3, 3, 1, 0]), rows[[3, 4, 4, 4]], torch.tensor([True, False, False, False]))
    store.write(torch.tensor([4, 4]), rows[4:], torch.tensor([False, True]))
    store.advance()
    expected = PredictionStore(N, K, **kind)
    expected.write(torch.tensor([3, 1, 0, 4]), rows[[3, 1, 2, 5]])
    expected.advance()
    assert all(torch.equal(a, b) for a, b in zip(everything(store), everything(expected), strict=True))


def test_of_what_is_not_kept_neither_index_nor_probabilities_matter():
    store, rows = PredictionStore(N, K), probabilities(3)
    rows[1:] = torch.nan
    store.write(torch.tensor([2, -1, N + 5]), rows, torch.tensor([True, False, False]))
    store.advance()
    probs, known = everything(store)
    assert known.nonzero().flatten().tolist() == [2]
    assert torch.equal(probs[2], rows[0])
    assert probs[known.logical_not()].eq(1 / K).all()


def test_a_batch_of_which_nothing_is_kept_changes_nothing():
    store = PredictionStore(N, K)
    store.write(torch.arange(4), probabilities(4), torch.zeros(4, dtype=torch.bool))
    store.advance()
    assert not everything(store)[1].any()
    assert store.state_dict()["pending"].tolist() == []
    store.write(torch.arange(4), probabilities(4), torch.ones(4, dtype=torch.bool))
    assert store.state_dict()["pending"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("keep", [torch.ones(3, dtype=torch.bool), torch.ones(2), torch.ones(2, 1, dtype=torch.bool)])
def test_keep_of_another_shape_or_type_is_refused(keep):
    with pytest.raises(InputError, match=r"keep must be bool \(2,\), one for each sample, got (bool|float32) \("):
        PredictionStore(N, K).write(torch.arange(2), probabilities(2), keep)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_reading_and_writing_run_nothing_that_would_wait_for_a_device(kind, masked):
    store, index, rows = PredictionStore(N, K, **kind), torch.tensor([3, 1, 3]), probabilities(3)
    keep = torch.tensor([True, False, False]) if masked else None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        store.write(index, rows, keep)
        store.read(index)
    ran = {event.key for event in profile.key_averages()}
    assert {"aten::scatter_reduce_", "aten::index_put_"} <= ran
    waits = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
    assert not ran & waits


def test_no_graph_is_kept():
    store, logits = PredictionStore(2, K), torch.zeros(2, K, requires_grad=True)
    store.write(torch.arange(2), logits.softmax(1))
    store.advance()
    assert not everything(store)[0].requires_grad
    assert not any(rows.requires_grad for rows in store.state_dict().values() if isinstance(rows, torch.Tensor))


def test_what_was_written_does_not_change_with_the_tensor_it_came_from():
    store, rows = PredictionStore(2, K), probabilities(2)
    store.write(torch.arange(2), rows)
    kept = rows.clone()
    rows.zero_()
    store.advance()
    read, _ = everything(store)
    read.zero_()
    assert torch.equal(everything(store)[0], kept)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_half_precision_is_off_by_less_than_its_last_bit_and_keeps_the_mass(dtype, bound, scale):
    rows = probabilities(200, 20, scale=scale)
    store = PredictionStore(200, 20, dtype=dtype)
    store.write(torch.arange(200), rows)
    store.advance()
    probs, _ = everything(store)
    assert 0 < float((probs - rows).abs().max()) <= bound
    assert torch.allclose(probs.sum(1), torch.ones(200), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_top_k_is_the_loop(top_k, dtype):
    rows = probabilities(N, K)
    store = PredictionStore(N, K, top_k=top_k, dtype=dtype)
    store.write(torch.arange(N), rows)
    store.advance()
    for row, got in zip(rows.tolist(), everything(store)[0].tolist(), strict=True):
        best = sorted(range(K), key=lambda k, row=row: -row[k])[:top_k]
        rest = (1 - sum(row[k] for k in best)) / (K - top_k)
        expected = [row[k] if k in best else rest for k in range(K)]
        assert got == pytest.approx(
            expected, abs={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        )
        assert sum(got) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_top_k_of_all_classes_is_dense(dtype):
    stores = [PredictionStore(N, K, top_k=top_k, dtype=dtype) for top_k in (K, None)]
    for store in stores:
        store.write(torch.arange(N), probabilities(N))
        store.advance()
    assert torch.equal(*(everything(store)[0] for store in stores))


def test_a_certain_row_survives_every_kind():
    for kind in KINDS:
        store = PredictionStore(1, K, **kind)
        store.write(torch.tensor([0]), torch.eye(K)[3:4])
        store.advance()
        assert everything(store)[0].tolist() == [[0, 0, 0, 1, 0]]


@pytest.mark.parametrize(("classes", "kind"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_class_indices_are_as_small_as_the_classes_allow(classes, kind):
    store = PredictionStore(2, classes, top_k=2)
    rows = torch.zeros(2, classes)
    rows[0, -1], rows[0, 7], rows[1, 0], rows[1, -2] = 0.75, 0.25, 0.5, 0.5
    store.write(torch.arange(2), rows)
    store.advance()
    assert torch.equal(everything(store)[0], rows)
    assert store.state_dict()["classes"].dtype == kind


def test_nbytes_is_what_two_buffers_take():
    marks = 10 * 8 + 10
    assert PredictionStore(10, 100).nbytes == 2 * 10 * 100 * 4 + marks
    assert PredictionStore(10, 100, dtype=torch.float16).nbytes == 2 * 10 * 100 * 2 + marks
    assert PredictionStore(10, 100, dtype=torch.float16, top_k=8).nbytes == 2 * 10 * 8 * 4 + marks


# Checkpoints


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_checkpoint_in_the_middle_of_an_epoch_loses_nothing(kind):
    store = PredictionStore(N, K, **kind)
    store.write(torch.arange(N - 2), probabilities(N - 2))
    store.advance()
    store.write(torch.tensor([1, 2, 10]), probabilities(3, seed=1))
    other = PredictionStore(N, K, **kind)
    # What the other held is forgotten.
    other.write(torch.tensor([5, 9]), probabilities(2, seed=2))
    other.advance()
    other.write(torch.tensor([6, 9]), probabilities(2, seed=3))
    other.load_state_dict(loaded(store.state_dict()))
    for step in range(2):
        assert all(torch.equal(a, b) for a, b in zip(everything(store), everything(other), strict=True))
        for one in (store, other):
            # The later write of sample 2 must win over the loaded one.
            one.write(torch.tensor([2, 3]), probabilities(2, seed=4 + step))
            one.advance()
    assert all(torch.equal(a, b) for a, b in zip(everything(store), everything(other), strict=True))
    # Seen once before the checkpoint, once after it, and never.
    assert everything(other)[1].tolist() == [True] * 9 + [False, True]


def test_saving_changes_nothing():
    stores = [PredictionStore(N, K) for _ in range(2)]
    for step in range(4):
        for save, store in enumerate(stores):
            store.write(torch.tensor([step, 2 * step]), probabilities(2, seed=step))
            if save:
                store.state_dict()
            if step == 1:
                store.advance()
    for store in stores:
        store.advance()
    assert all(torch.equal(a, b) for a, b in zip(*map(everything, stores), strict=True))


def test_a_checkpoint_holds_tensors_and_integers():
    for kind in KINDS:
        state = PredictionStore(N, K, **kind).state_dict()
        assert {type(value) for value in state.values()} == {torch.Tensor, int}
        assert pickle.loads(pickle.dumps(state)).keys() == state.keys()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((N + 1, K, {}), "num_samples=11 and not 12"),
        ((N, K + 1, {}), "num_classes=5 and not 6"),
        ((N, K, {"top_k": 2}), "top_k=None and not 2"),
        ((N, K, {"dtype": torch.float16}), "dtype=float32 and not float16"),
        ((N + 1, K, {"top_k": 3}), "num_samples=11 and not 12, top_k=None and not 3"),
    ],
)
def test_a_checkpoint_of_another_store_is_refused(other, message):
    samples, classes, kind = other
    with pytest.raises(InputError, match=message):
        PredictionStore(samples, classes, **kind).load_state_dict(PredictionStore(N, K).state_dict())


@pytest.mark.parametrize("version", [1, FORMAT + 1])
def test_a_checkpoint_of_another_version_is_refused_in_one_line(version):
    state = loaded(PredictionStore(N, K).state_dict())
    assert state.pop("format") == FORMAT
    # The first version did not say which it was.
    state = state if version == 1 else {**state, "format": version}
    with pytest.raises(InputError, match=f"has format {version}, this version reads {FORMAT}: resume with") as caught:
        PredictionStore(N, K).load_state_dict(state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((0, 3), {}, "at least 1 sample and 2 classes, got num_samples=0 and num_classes=3"),
        ((3, 1), {}, "at least 1 sample and 2 classes"),
        ((3, 3), {"top_k": 0}, "top_k must be between 1 and num_classes=3, got 0"),
        ((3, 3), {"top_k": 4}, "top_k must be between 1 and num_classes=3, got 4"),
        ((3, 3), {"dtype": torch.int8}, "float32, float16, bfloat16, got dtype=int8"),
    ],
)
def test_refusals(arguments, kind, message):
    with pytest.raises(InputError, match=message):
        PredictionStore(*arguments, **kind)


def test_rows_of_another_shape_and_unknown_samples_are_refused():
    store = PredictionStore(N, K)
    for rows in (probabilities(3), probabilities(2, K + 1), probabilities(2)[0]):
        with pytest.raises(InputError, match=r"2 samples of 5 classes need probabilities \(2, 5\), got"):
            store.write(torch.arange(2), rows)
    with pytest.raises(InputError, match="num_samples=11 does not fit the data's indices: index 11 is out of bounds"):
        store.read(torch.tensor([3, N]))


def test_moving_moves_everything():
    store = PredictionStore(N, K, top_k=2).to("meta")
    assert store.device.type == "meta"
    assert {value.device.type for value in vars(store).values() if isinstance(value, torch.Tensor)} == {"meta"}
    probs, known = store.read(torch.arange(3, device="meta"))
    assert (probs.device.type, known.device.type) == ("meta", "meta")
    store.write(torch.arange(3, device="meta"), probs)


# Several processes


def two_processes(rank, folder):
    """Every kind of store, written to unevenly by two processes; what each of them then holds goes to a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    # Small pieces, so that there are several.
    rows_file._PIECE_BYTES = 24
    results = []
    for kind in KINDS:
        store = PredictionStore(N, K, **kind)
        # Rank 1 has fewer rows, sample 7 comes twice on it, and samples 2 and 5 stand on both ranks.
        index = torch.tensor([[0, 2, 4, 5], [1, 2, 7, 7]][rank])
        store.write(index, probabilities(4, seed=rank))
        if rank == 0:
            store.write(torch.tensor([10]), probabilities(1, seed=2))
        else:
            store.write(torch.tensor([5]), probabilities(1, seed=3))
        middle = loaded(store.state_dict())
        before = everything(store)
        store.write(torch.tensor([[4], [3]][rank]), probabilities(1, seed=4 + rank))
        store.advance()
        after = everything(store)
        store.advance()
        # An epoch in which one process writes nothing.
        if rank == 1:
            store.write(torch.tensor([9]), probabilities(1, seed=6))
        store.advance()
        resumed = PredictionStore(N, K, **kind)
        resumed.load_state_dict(middle)
        resumed.write(torch.tensor([[4], [3]][rank]), probabilities(1, seed=4 + rank))
        resumed.advance()
        results.append([before, after, everything(store), everything(resumed), middle])
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_the_group()


@pytest.mark.slow
def test_two_processes_end_with_the_same_complete_store(tmp_path, start_method):
    multiprocessing.start_processes(two_processes, args=(str(tmp_path),), nprocs=2, start_method=start_method)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for kind, ours, theirs in zip(KINDS, *results, strict=True):
        # In turns, as one process would have seen the samples: 0, 1, 2, 2, 4, 7, 5, 7, 10, 5; then 4, 3; then 9.
        first, second = probabilities(4, seed=0), probabilities(4, seed=1)
        alone = PredictionStore(N, K, **kind)
        rows = [first[0], second[0], first[1], second[1], first[2], second[2], first[3], second[3]]
        rows += [probabilities(1, seed=seed)[0] for seed in (2, 3, 4, 5)]
        alone.write(torch.tensor([0, 1, 2, 2, 4, 7, 5, 7, 10, 5, 4, 3]), torch.stack(rows))
        alone.advance()
        after = everything(alone)
        alone.write(torch.tensor([9]), probabilities(1, seed=6))
        alone.advance()
        for before_r, after_r, end_r, resumed_r, middle_r in (ours, theirs):
            assert not before_r[1].any()
            for got, expected in ((after_r, after), (end_r, everything(alone)), (resumed_r, after)):
                assert torch.equal(got[0], expected[0]), kind
                assert torch.equal(got[1], expected[1]), kind
            assert middle_r["pending"].tolist() == [0, 1, 2, 4, 5, 7, 10]
