"""Batches of sentences: what is in them, under which budget, in which order, in how many processes."""

import itertools

import pytest
import torch

from distill_lightning import InputError
from distill_lightning.data.datamodules import LengthSampler, ResumableLoader, TranslationDataset
from distill_lightning.data.fingerprint import data_difference, data_fingerprint

PAD, BOS, EOS = 0, 1, 2


def rows(count, *, seed=0, longest=12):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [[*torch.randint(4, 50, (length - 1,), generator=generator).tolist(), EOS] for length in lengths]


def dataset(count=60, *, seed=0):
    source, target = rows(count, seed=seed), rows(count, seed=seed + 1)
    sentences = [[str(row).encode() for row in side] for side in (source, target)]
    return TranslationDataset(source, target, sentences=tuple(sentences))


def sampler(data, *, max_tokens=96, shuffle=True, **options):
    return LengthSampler(data, data.lengths, max_tokens=max_tokens, shuffle=shuffle, **options)


def loader(data, **options):
    made = sampler(data, **options)
    return ResumableLoader(data, batch_size=None, sampler=made, collate_fn=lambda batch: batch)


def test_a_batch_is_padded_and_the_decoder_one_step_late():
    source, target = [[7, 8, EOS], [9, EOS], [5, EOS]], [[4, EOS], [5, 6, 7, EOS], [EOS]]
    data = TranslationDataset(source, target, sentences=([], []))
    batch = data[[2, (0, 0)]]
    assert batch.input["input_ids"].tolist() == [[5, EOS, PAD], [7, 8, EOS]]
    assert batch.input["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.target.tolist() == [[EOS, PAD], [4, EOS]]
    assert batch.input["decoder_input_ids"].tolist() == [[BOS, PAD], [BOS, 4]]
    assert batch.index.tolist() == [2, 0]
    assert batch.counted is None
    assert data[1].target.tolist() == [target[1]]
    assert data[[0, (1, -1)]].counted.tolist() == [True, False]
    without = TranslationDataset(source, None, sentences=([], []))[[1]]
    assert without.target is None
    assert set(without.input) == {"input_ids", "attention_mask"}


def test_a_batch_against_a_naive_reference():
    source, target = rows(40, seed=3), rows(40, seed=4)
    data = TranslationDataset(source, target, sentences=([], []))
    index = torch.randperm(40)[:17].tolist()
    batch = data[index]

    def padded(lists):
        width = max(map(len, lists))
        return [row + [PAD] * (width - len(row)) for row in lists]

    assert batch.input["input_ids"].tolist() == padded([source[place] for place in index])
    assert batch.target.tolist() == padded([target[place] for place in index])
    assert batch.input["decoder_input_ids"].tolist() == padded([[BOS, *target[place][:-1]] for place in index])


@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"shuffle": False, "in_order": True}])
@pytest.mark.parametrize("max_tokens", [10, 96, 10_000])
def test_every_sentence_once_and_no_batch_above_the_budget(max_tokens, options):
    data = dataset()
    made = sampler(data, max_tokens=max_tokens, **options)
    batches = list(made.batches())
    assert sorted(itertools.chain(*batches)) == list(range(60))
    assert len(batches) == len(made)
    for indices in batches:
        inside = data.lengths[indices]
        assert len(indices) == 1 or len(indices) * int(inside.max(dim=0).values.sum()) <= max_tokens
    if options.get("in_order"):
        assert list(itertools.chain(*batches)) == list(range(60))
    if not made.shuffle:
        # No batch has room for the first sentence of the next one.
        for indices, following in itertools.pairwise(batches):
            inside = data.lengths[[*indices, following[0]]]
            assert len(inside) * int(inside.max(dim=0).values.sum()) > max_tokens


@pytest.mark.parametrize("max_tokens", [1, -5, 96.0])
def test_a_budget_that_is_none(max_tokens):
    with pytest.raises(InputError, match="max_tokens must be a"):
        sampler(dataset(), max_tokens=max_tokens)


def test_sentences_of_a_batch_are_about_as_long():
    data = dataset(2000)
    inside = [data.lengths[indices] for indices in sampler(data, max_tokens=400).batches()]
    read = sum(len(lengths) * int(lengths.max(dim=0).values.sum()) for lengths in inside)
    assert read < 1.1 * int(data.lengths.sum())


def test_the_order_is_a_function_of_seed_and_epoch():
    data = dataset(300)

    def order(seed, epoch):
        made = sampler(data, seed=seed)
        made.set_epoch(epoch)
        return list(made.batches())

    assert order(0, 0) == order(0, 0)
    orders = [order(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for first, second in itertools.combinations(orders, 2):
        assert first != second
        # Not the same batches in another order, either.
        assert set(map(frozenset, first)) != set(map(frozenset, second))
    assert len({len(batches) for batches in orders}) == 1


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_one_with_their_budgets_together(processes, shuffle):
    data = dataset(61)
    alone = list(sampler(data, max_tokens=60 * processes, shuffle=shuffle))
    shares = [
        list(sampler(data, max_tokens=60, shuffle=shuffle, num_replicas=processes, rank=rank))
        for rank in range(processes)
    ]
    assert {len(share) for share in shares} == {len(alone)}
    for number, whole in enumerate(alone):
        parts = [share[number] for share in shares]
        assert len({len(part) for part in parts}) == 1
        assert sorted(key for part in parts for key in part if key[1] == 0) == sorted(whole)
        for part in parts:
            # What fills a share up comes last, does not count and makes the batch no wider.
            assert [view for _, view in part] == sorted((view for _, view in part), reverse=True)
            assert {index for index, _ in part} <= {index for index, _ in whole}
            widest = data.lengths[[index for index, _ in part]].max(dim=0).values.sum()
            assert (len(part) - 1) * int(widest) < 60


@pytest.mark.parametrize("batches", [0, 1, 4])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_loader_goes_on_behind_the_batches_of_its_state(batches, processes):
    data = dataset()

    def indices(made, count=None):
        return [batch.index.tolist() for batch in itertools.islice(made, count)]

    first, second = (loader(data, num_replicas=processes) for _ in range(2))
    first.sampler.set_epoch(1)
    second.sampler.set_epoch(1)
    whole, before = indices(second), indices(first, batches)
    state = first.state_dict()
    assert state == {"epoch": 1, "batches": batches, "max_tokens": 96 * processes}
    # The same batches in another number of processes are the same place.
    other = loader(data, max_tokens=96 * processes)
    other.load_state_dict(state)
    iterator = iter(other)
    other.sampler.set_epoch(1)
    rest = indices(iterator)
    assert len(before) + len(rest) == len(whole)
    if processes == 1:
        assert before + rest == whole


def test_a_state_of_another_budget_is_refused():
    data = dataset()
    first = loader(data)
    next(iter(first))
    other = loader(data, max_tokens=48)
    other.load_state_dict(first.state_dict())
    with pytest.raises(InputError, match=r"with max_tokens=96 of all processes .*now there are max_tokens=48 of"):
        next(iter(other))


@pytest.mark.parametrize("where", [(), ("a:1", "a:2", "a:3")])
def test_the_longest_sentence(where):
    rows = [[7, EOS], [8, 9, EOS], [5, EOS]], [[4, EOS], [EOS], [5, 6, 7, EOS]]
    data = TranslationDataset(*rows, sentences=([], []), where=where)
    assert data.longest() == (4, "a:3" if where else "sentence 3")
    assert TranslationDataset(rows[0], None, sentences=([], []), where=where).longest()[0] == 3


def test_data_are_known_by_their_text():
    known = data_fingerprint(dataset())
    assert known == data_fingerprint(dataset())
    assert known["seen"] == "labels, contents of all samples"
    assert data_difference(known, data_fingerprint(dataset(seed=5))) == "other labels and contents"
