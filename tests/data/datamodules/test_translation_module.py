"""The data module for translation: its splits, its tokenizer, its loaders, and a training that goes on."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from distill_lightning import InputError, LibreOfficeHelp, TranslationDataModule
from distill_lightning.data.datamodules import BytePairTokenizer
from distill_lightning.data.datamodules.translation.corpus import Pair
from distill_lightning.data.datamodules.translation.splits import deal
from distill_lightning.studies.data import differences_of, splits_of
from distill_lightning.testing import tiny_trainer

WORDS = ["the", "a", "small", "large", "red", "dog", "cat", "house", "sees", "has", "likes", "under", "over", "and"]


def sentence(number):
    drawn = random.Random(number)
    return " ".join(drawn.choice(WORDS) for _ in range(drawn.randint(2, 9))) + f" {number}."


def german(text):
    return text.upper().replace("A", "Ä")


@pytest.fixture
def folder(tmp_path):
    """Plain text: 80 pairs for training, of which two stand for validation too, and one is there twice."""
    train = [sentence(number) for number in range(80)]
    splits = {"train": [*train, train[5]], "val": [train[7], *map(sentence, range(100, 119))]}
    splits["test"] = [train[9], *map(sentence, range(200, 209))]
    for split, sources in splits.items():
        (tmp_path / f"{split}.en").write_text("".join(f"{source}\n" for source in sources))
        (tmp_path / f"{split}.de").write_text("".join(f"{german(source)}\n" for source in sources))
    return tmp_path


def data_of(folder, **options):
    return TranslationDataModule(**{"data_dir": folder, "vocab_size": 300, "max_tokens": 200} | options)


def text_of(data, split):
    dataset = data.dataset(split)
    rows = [dataset[place] for place in range(len(dataset))]
    return [(data.decode(row.input["input_ids"][0]), data.decode(row.target[0])) for row in rows]


# Splits


def pairs(*texts):
    return [Pair(source, target, f"file:{number}") for number, (source, target) in enumerate(texts, start=1)]


def test_training_pairs_are_distinct_and_know_no_other_split():
    read = {
        "train": pairs(("a", "x"), ("b", "y"), ("a", "x"), ("a", "z"), ("c", "v"), ("d", "w")),
        "val": pairs(("c", "v"), ("e", "u"), ("d", "w")),
        "test": pairs(("d", "t"), ("f", "s"), ("f", "s")),
    }
    dealt = deal(read, val_size=None, test_size=None, drawn=9, seed=0)
    assert [pair[:2] for pair in dealt.splits["train"]] == [("a", "x"), ("b", "y"), ("a", "z")]
    assert [pair.where for pair in dealt.splits["train"]] == ["file:1", "file:2", "file:4"]
    assert [pair[:2] for pair in dealt.splits["val"]] == [("c", "v"), ("e", "u")]
    assert dealt.splits["test"] == read["test"]
    assert dealt.left_out == {"repeated": 1, "with a source sentence of another split": 3}


@pytest.mark.parametrize("has_val", [True, False])
def test_what_has_no_files_is_drawn_by_source_sentence(has_val):
    texts = [(f"s{number // 2}", f"t{number}") for number in range(100)]
    read = {"train": pairs(*texts)} | ({"val": pairs(*texts[:10])} if has_val else {})
    dealt = deal(read, val_size=10, test_size=None, drawn=7, seed=0)
    assert {split: len(found) for split, found in dealt.splits.items()} == {"train": 82, "val": 10, "test": 7}
    sources = [{pair.source for pair in found} for found in dealt.splits.values()]
    assert len(set.union(*sources)) == sum(map(len, sources)) == 50
    assert deal(read, val_size=10, test_size=None, drawn=7, seed=0) == dealt
    assert deal(read, val_size=10, test_size=None, drawn=7, seed=1).splits["test"] != dealt.splits["test"]


@pytest.mark.parametrize(
    "read",
    [
        {"train": pairs(*[(f"s{number // 3}", f"t{number % 7}") for number in range(60)], ("s1", "t4"))},
        {"train": pairs(("a", "x"), *[("b", f"y{number}") for number in range(5)])},
        {"train": pairs(("a", "x"), ("b", "y"), ("c", "y")), "test": pairs(("b", "y"), ("d", "w"), ("d", "w"))},
        {"train": pairs(("a", "x"), ("b", "y")), "val": pairs(("d", "v"), ("e", "u")), "test": pairs(("d", "w"))},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_every_pair_is_in_a_split_or_counted(read, seed):
    dealt = deal(read, val_size=1 if "val" in read else None, test_size=1, drawn=0, seed=seed)
    assert sum(map(len, [*dealt.splits.values()])) + sum(dealt.left_out.values()) == sum(map(len, read.values()))
    assert all(dealt.left_out.values())


@pytest.mark.parametrize("twin", ["A  dog.", "A\N{NO-BREAK SPACE}dog.", "A\u2028dog.", "a DOG.", " A dog. "])
def test_white_space_and_case_make_no_other_sentence(twin):
    rest = [(f"s{number}", "t") for number in range(6)]
    held = deal(
        {"train": pairs((twin, "x"), *rest), "test": pairs(("A dog.", "y"))},
        val_size=1,
        test_size=None,
        drawn=0,
        seed=0,
    )
    assert [len(held.splits[split]) for split in ("train", "val", "test")] == [5, 1, 1]
    for seed in range(4):
        read = {"train": pairs((twin, "x"), ("A dog.", "x"), ("A dog.", "z"), *rest)}
        drawn = deal(read, val_size=4, test_size=3, drawn=0, seed=seed)
        homes = [split for split, found in drawn.splits.items() if any("dog" in pair.source.lower() for pair in found)]
        assert len(homes) == 1
        assert ("repeated" in drawn.left_out) == (twin != "a DOG.")


@pytest.mark.parametrize(
    ("read", "line"),
    [
        (
            {"val": pairs(("c", "v")), "test": pairs(("C", "v"))},
            "all 1 pairs for val have a source sentence of another",
        ),
        ({"val": pairs(("a", "x"), ("b", "y"))}, "all 2 pairs for train have a source sentence of another split's"),
        ({"val": [], "test": pairs(("c", "v"))}, "no pair for val can be used: mend its files, or give others"),
        ({"val": pairs(("c", "v"))}, "test has no files, and 3 pairs cannot be drawn for it from the 2 that are left"),
        ({}, "test has no files, and 3 pairs cannot be drawn .*: give files for it, or a lower test_size"),
    ],
)
def test_splits_without_pairs(read, line):
    with pytest.raises(InputError, match=line):
        deal({"train": pairs(("a", "x"), ("b", "y"))} | read, val_size=None, test_size=None, drawn=3, seed=0)


def test_a_training_without_pairs():
    with pytest.raises(InputError, match="drawn for validation and test leaves none of 2 pairs to train on: lower val"):
        deal({"train": pairs(("a", "x"), ("b", "y"))}, val_size=1, test_size=1, drawn=3, seed=0)


def test_sentences_keep_their_split_where_others_are_added():
    texts = [(f"s{number}", "t") for number in range(500)]
    few, many = (
        deal({"train": pairs(*texts[:count])}, val_size=20, test_size=20, drawn=0, seed=0).splits
        for count in (490, 500)
    )
    kept = {pair.source for pair in few["test"]} & {pair.source for pair in many["test"]}
    assert len(kept) >= 17


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ({"val_size": 21}, "val_size=21 is larger than the 20 pairs of its files: lower it"),
        ({"subset": 79}, "subset=79 is larger than the 78 training pairs that are left"),
    ],
)
def test_sizes_beyond_the_files_are_refused(folder, sizes, line):
    with pytest.raises(InputError, match=line):
        data_of(folder, **sizes).setup()


def test_the_splits_of_files(folder, monkeypatch):
    told = []
    monkeypatch.setattr("distill_lightning.data.datamodules.translation.module.rank_zero_info", told.append)
    data = data_of(folder)
    data.setup()
    data.setup()
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [78, 20, 10]
    assert text_of(data, "test")[0] == (sentence(9), german(sentence(9)))
    assert told == [
        "TranslationDataModule: pairs of en and de: 78 for train, 20 for val, 10 for test; left out: 1 repeated, 2 "
        "with a source sentence of another split"
    ]
    small = data_of(folder, val_size=5, test_size=3, subset=70, min_length=8)
    assert text_of(data_of(folder, test_size=3), "test") == text_of(data, "test")[:3]
    sizes = [len(small.dataset(split)) for split in ("train", "val", "test")]
    short = 78 - sum(sizes)
    assert short > 0
    assert told[-1].endswith(
        "; left out: 1 repeated, 2 with a source sentence of another split, 7 beyond test_size, 15 beyond val_size, 8 "
        f"beyond subset=70, {short} shorter than min_length=8"
    )


def test_a_smaller_subset_is_part_of_a_larger_one(folder):
    every, some, few = (set(text_of(data_of(folder, subset=size), "train")) for size in (None, 40, 10))
    assert few < some < every
    assert few != set(text_of(data_of(folder, subset=10, seed=1), "train"))


# The tokenizer


@pytest.mark.parametrize(
    "text",
    ["Ein  Hund.", "  ", "", "</s> <pad>", "naïve 中文 \U0001f600 \u2028", "a\tb\r\nc", "x" * 300, "\x00\x7f", "/usr"],
)
def test_nothing_is_lost(text):
    tokenizer = BytePairTokenizer.trained(["Ein Hund sieht das Haus.", "A dog."], vocab_size=280)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *ids, 0, 0, 279_000]) == text
    assert ids[-1] == 2
    assert all(3 < id_ < 280 for id_ in ids[:-1])


def test_both_languages_are_learned_from_the_training_pairs_alone(folder):
    (folder / "val.en").write_text("zqzqzqzqzq zqzqzq zqzq\n" * 20)
    data = data_of(folder, vocab_size=600, subset=10)
    assert data.num_classes == 600
    assert len(data.tokenizer) <= 600
    assert len(data.encode_source("zqzq")) == 5
    assert len(data.encode_source(" large")) == len(data.encode_target(" LÄRGE")) == 2


def test_the_tokenizer_is_kept_and_never_stale(folder):
    data = data_of(folder)
    data.prepare_data()
    (first,) = folder.glob("tokenizer-*.json")
    # It is read, and not trained again.
    first.write_text(json.dumps(json.loads(first.read_text()), indent=3))
    assert data_of(folder).tokenizer.definition == first.read_text()
    data_of(folder, vocab_size=310).prepare_data()
    (folder / "train.en").write_text((folder / "train.en").read_text().replace("dog", "cow"))
    data_of(folder).prepare_data()
    assert len(list(folder.glob("tokenizer-*.json"))) == 3
    # What stands in validation alone does not count.
    (folder / "val.en").write_text((folder / "val.en").read_text().replace("dog", "cow"))
    data_of(folder).prepare_data()
    assert len(list(folder.glob("tokenizer-*.json"))) == 3


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": {"type": "BPE"}}', "\xff"])
def test_a_damaged_tokenizer_is_refused(folder, content):
    data_of(folder).prepare_data()
    (path,) = folder.glob("tokenizer-*.json")
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=f"{path.name} is damaged: remove it, and it is made again: .") as caught:
        data_of(folder).prepare_data()
    assert "\n" not in str(caught.value)


def test_where_the_tokenizer_is_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_of(folder).cache_dir == folder
    assert data_of(folder, cache_dir=tmp_path / "own").cache_dir == tmp_path / "own"
    assert TranslationDataModule(corpus=LibreOfficeHelp()).cache_dir == tmp_path / "cache/distill_lightning"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert data_of(folder).cache_dir == tmp_path / "cache/distill_lightning"


def test_the_same_text_makes_the_same_tokenizer():
    texts = [sentence(number) for number in range(60)]
    made = [BytePairTokenizer.trained(texts, vocab_size=320).definition for _ in range(3)]
    assert made[0] == made[1] == made[2]


def test_a_digest_tells_tokenizers_apart():
    texts = [sentence(number) for number in range(60)]
    one, again, other, larger = (
        BytePairTokenizer.trained(given, vocab_size=size)
        for given, size in ((texts, 280), (texts, 280), (texts[:9], 280), (texts, 290))
    )
    kept = BytePairTokenizer(json.dumps(json.loads(one.definition), indent=3))
    assert one.digest == again.digest == kept.digest
    assert len({one.digest, other.digest, larger.digest}) == 3


def test_without_the_library_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        InputError, match=r"tokenizers is not installed: pip install 'distill-lightning\[translation\]'"
    ):
        data_of(folder).prepare_data()


# Lengths


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_sentence_that_is_too_long_is_told_with_file_and_line(folder, split, monkeypatch):
    lines = (folder / f"{split}.de").read_text().splitlines()
    lines[3] = "".join(map(chr, range(0x4E00, 0x4E14)))
    (folder / f"{split}.de").write_text("\n".join(lines))
    with pytest.raises(InputError, match=rf"{split}\.en:4: the target has \d+ ids, more than max_length=45: mend it"):
        data_of(folder, max_length=45).setup()
    told = []
    monkeypatch.setattr("distill_lightning.data.datamodules.translation.module.rank_zero_info", told.append)
    data = data_of(folder, max_length=45, on_damaged="skip")
    assert len(data.dataset(split)) == {"train": 77, "val": 19}[split]
    assert f"skipped: 1 pairs longer than max_length=45 (the first: {folder}/{split}.en:4: the target" in told[0]


@pytest.mark.parametrize(("split", "side"), [("train", "en"), ("val", "de"), ("test", "de")])
def test_the_longest_sentence_is_told_with_file_and_line(folder, split, side):
    path = folder / f"{split}.{side}"
    lines = path.read_text().splitlines()
    lines[6] = "".join(map(chr, range(0x4E00, 0x4E40)))
    path.write_text("\n".join(lines))
    data = data_of(folder)
    assert data.longest() == (len(data.encode_target(lines[6])), f"{folder}/{split}.en:7")


def test_short_pairs_are_left_out(folder):
    every, longer = data_of(folder), data_of(folder, min_length=10)
    lengths = every.dataset("train").lengths
    expected = int((lengths.min(dim=1).values >= 10).sum())
    assert 0 < expected < 78
    assert len(longer.dataset("train")) == expected
    with pytest.raises(InputError, match="none of 78 pairs for train has between min_length=400 and"):
        data_of(folder, min_length=400).setup()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"vocab_size": 259}, "vocab_size must be at least 260, 4 special ids and 256 bytes, got 259"),
        ({"target": "en"}, "source and target are both 'en'"),
        ({"max_tokens": 1}, "max_tokens must be at least 2"),
        ({"vocab_size": 300.0}, "vocab_size must be an integer, got 300.0"),
        ({"max_tokens": 2.5}, "max_tokens must be an integer, got 2.5"),
        ({"min_length": True}, "min_length must be an integer, got True"),
        ({"min_length": 9, "max_length": 8}, "max_length must be at least 9, min_length, got 8"),
        ({"on_damaged": "warn"}, "on_damaged must be one of error, skip"),
        ({"val_size": 0}, "val_size must be at least 1"),
    ],
)
def test_options_out_of_range(folder, options, line):
    with pytest.raises(InputError, match=line):
        data_of(folder, **options)


# Loaders


def test_prediction_is_in_the_order_of_the_text(folder):
    data = data_of(folder)
    rows = [row for batch in data.predict_dataloader() for row in batch.target]
    assert [data.decode(row) for row in rows] == [target for _, target in text_of(data, "test")]
    (folder / "new.txt").write_text("a dog\n\nthe cat sees\n")
    data = data_of(folder, predict_file=folder / "new.txt")
    (batch,) = data.predict_dataloader()
    assert batch.target is None
    assert [data.decode(row) for row in batch.input["input_ids"]] == ["a dog", "", "the cat sees"]
    (folder / "new.txt").write_text(f"a dog\n{'Ö' * 300}\n")
    with pytest.raises(InputError, match=r"new\.txt:2 has 601 ids, more than max_length=512"):
        data.predict_dataloader()
    (folder / "new.txt").unlink()
    with pytest.raises(InputError, match=r"new\.txt cannot be read \(No such .*\): give a file that is there and that"):
        data.predict_dataloader()


def test_a_study_knows_its_data_again(folder):
    known = splits_of(data_of(folder))
    assert set(known) == {"train", "val", "test"}
    assert not differences_of(known, splits_of(data_of(folder, order_seed=3, max_tokens=90)))
    (folder / "val.de").write_text((folder / "val.de").read_text().replace("DOG", "HUND"))
    assert differences_of(known, splits_of(data_of(folder))) == ["val: other labels"]


def test_processes_get_their_share(folder):
    data = data_of(folder)
    data.trainer = SimpleNamespace(
        world_size=2, global_rank=1, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    loader = data.train_dataloader()
    assert (loader.sampler.num_replicas, loader.sampler.rank, loader.sampler.budget) == (2, 1, 400)


@pytest.mark.parametrize("overfit_batches", [2, 0.5])
def test_overfitting_reads_the_same_whole_batches(folder, overfit_batches):
    seen = {"train": [], "val": []}

    class Reads(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            seen["train"].append(batch.index.tolist())
            return self.weight**2

        def validation_step(self, batch, batch_idx):
            seen["val"].append(batch.index.tolist())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = data_of(folder)
    trainer = tiny_trainer(max_epochs=2, overfit_batches=overfit_batches, num_sanity_val_steps=0)
    trainer.fit(Reads(), datamodule=data)
    for split, loader in (("train", data_of(folder).train_dataloader()), ("val", data_of(folder).val_dataloader())):
        whole = [[index for index, _ in keys] for keys in loader.sampler]
        count = 2 if overfit_batches == 2 else len(whole) // 2
        assert seen[split] == whole[:count] * 2
        assert max(map(len, whole[:count])) > 1


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 6, 9])
def test_a_training_goes_on_from_any_step(folder, step):
    pytest.importorskip("transformers")
    from distill_lightning import TranslationModule
    from distill_lightning.networks import translation_transformer

    class Save(pl.callbacks.Checkpoint):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == step:
                trainer.save_checkpoint(folder / "middle.ckpt")

    def fit(ckpt_path=None, callbacks=()):
        torch.manual_seed(0 if ckpt_path is None else 1)
        network = translation_transformer(
            300, width=16, encoder_depth=1, decoder_depth=1, heads=2, feedforward=16, dropout=0.0
        )
        module = TranslationModule(network, num_classes=300, pad_id=0, bleu_every=0)
        data = data_of(folder, max_tokens=1000)
        trainer = tiny_trainer(max_epochs=3, callbacks=list(callbacks), enable_checkpointing=bool(callbacks))
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        assert trainer.global_step == 3 * len(data.train_dataloader()) > 11
        return module.state_dict()

    whole = fit(callbacks=[Save()])
    resumed = fit(folder / "middle.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
