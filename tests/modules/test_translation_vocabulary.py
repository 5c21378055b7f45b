"""Translation: what data, module and student say of token ids, and where they do not agree."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from distill_lightning import (
    Batch,
    BeamSearch,
    InputError,
    NoSearch,
    SelfKDTranslationModule,
    TranslationModule,
    translation_transformer,
)
from distill_lightning.callbacks import TranslationWriter
from distill_lightning.testing import TinyTranslationDataModule, tiny_trainer

IDS = 12


def network(ids=IDS, **options):
    torch.manual_seed(0)
    sizes = {"width": 8, "encoder_depth": 1, "decoder_depth": 1, "heads": 2, "feedforward": 8, "max_length": 16}
    return translation_transformer(ids, **(sizes | options))


def t5(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": IDS, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**(sizes | options)))


def module_of(student=None, *, pad_id=0, num_classes=IDS, kind=TranslationModule, **options):
    options = {"beam": BeamSearch(size=2, max_length=6), "decode": str} | options
    return kind(student or network(), num_classes=num_classes, pad_id=pad_id, **options)


def batch_of(target, **fields):
    target = torch.tensor(target)
    source = torch.full((len(target), 3), 5)
    read = torch.cat([torch.full_like(target[:, :1], 1), target[:, :-1].clamp(min=0)], dim=1)
    return Batch({"input_ids": source, "attention_mask": source.sign(), "decoder_input_ids": read}, target, **fields)


class Data(TinyTranslationDataModule):
    """Sentences with special ids of their own."""

    pad_id, bos_id, eos_id, num_classes = 0, 1, 2, IDS
    batches = (batch_of([[5, 6, 2], [7, 2, 0]]),)

    def __init__(self, **told):
        super().__init__()
        vars(self).update(told)

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def run(stage, module, data):
    trainer = tiny_trainer(num_sanity_val_steps=0)
    return getattr(trainer, stage)(module, datamodule=data)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(
    ("build", "told", "message"),
    [
        (lambda: module_of(pad_id=3), {}, "pad_id=3, and Data fills sentences up with 0: give pad_id=0"),
        (module_of, {"num_classes": 20}, "num_classes=12, and Data has 20 ids"),
        (
            lambda: module_of(network(9)),
            {},
            r"the student \(MarianMTModel\) has embeddings for 9 ids, and num_classes=12",
        ),
    ],
    ids=["padding", "data", "student"],
)
def test_ids_that_do_not_agree_are_refused_at_the_start(stage, build, told, message):
    with pytest.raises(InputError, match=message) as error:
        run(stage, build(), Data(**told))
    assert "\n" not in str(error.value)


def test_an_id_without_an_embedding_names_the_sample():
    batch = batch_of([[5, 2], [6, 2]], index=torch.tensor([30, 40]))
    batch.input["input_ids"][1, 2] = 12
    for stage, named in (("fit", "training"), ("validate", "validation"), ("test", "test"), ("predict", "prediction")):
        message = rf"the source of sample 40 in {named} batch 0 has the id 12, .* embeddings for ids from 0 to 11"
        with pytest.raises(InputError, match=message):
            run(stage, module_of(), Data(batches=[batch]))


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(
    ("pad_id", "mask", "message"),
    [
        (
            3,
            [[1, 1, 1], [1, 0, 0]],
            r"sample 40 in \w+ batch 0 has the id 0 where attention_mask is 0, and pad_id=3: ",
        ),
        (0, None, r"sample 40 in \w+ batch 0 is filled up with 0, and without attention_mask the student"),
    ],
    ids=["another padding", "no mask"],
)
def test_padding_that_would_be_read_as_words_is_refused(stage, pad_id, mask, message):
    batch = batch_of([[5, 6, 2], [7, 2, pad_id]], index=torch.tensor([30, 40]))
    batch.input["input_ids"][1, 1:] = 0
    del batch.input["attention_mask"]
    batch.input |= {} if mask is None else {"attention_mask": torch.tensor(mask)}
    with pytest.raises(InputError, match=message) as error:
        run(stage, module_of(pad_id=pad_id), Data(batches=[batch], pad_id=None))
    assert "\n" not in str(error.value)


def test_a_mask_may_hide_words():
    batch = batch_of([[5, 6, 2], [7, 2, 0]])
    batch.input["input_ids"][1, 2] = 0
    batch.input["attention_mask"] = torch.tensor([[1, 0, 1], [1, 1, 0]])
    run("validate", module_of(beam=NoSearch()), Data(batches=[batch]))


def test_a_student_that_takes_no_mask_and_sources_without_padding_need_none():
    whole = batch_of([[5, 6, 2], [7, 2, 0]])
    del whole.input["attention_mask"]
    run("validate", module_of(beam=NoSearch()), Data(batches=[whole]))
    whole.input["input_ids"][1, 1:] = 0
    student = network()
    student.forward = lambda input_ids, decoder_input_ids, own=student.forward: own(
        input_ids=input_ids, attention_mask=input_ids != 0, decoder_input_ids=decoder_input_ids
    )
    run("validate", module_of(student, beam=NoSearch()), Data(batches=[whole]))


def test_a_sentence_that_is_too_long_is_refused_before_training():
    data = Data(longest=lambda: (17, "train.en:4"))
    with pytest.raises(InputError, match=r"train\.en:4 has 17 tokens, .* positions for 16: .*max_length=17"):
        run("fit", module_of(), data)
    run("fit", module_of(beam=NoSearch()), Data(longest=lambda: (16, "train.en:4")))


def test_another_tokenizer_than_that_of_the_training_is_refused(tmp_path):
    """As where ``val_size`` is another one than in the training, and so the text that the tokenizer is trained on."""
    ours, theirs = (Data(tokenizer=SimpleNamespace(digest=digest)) for digest in ("ours", "theirs"))
    module = module_of(beam=NoSearch())
    trainer = tiny_trainer(max_epochs=1)
    trainer.fit(module, datamodule=ours)
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    loaded = TranslationModule.load_from_checkpoint(tmp_path / "module.ckpt", student=network(), decode=str)
    message = "the tokenizer of Data is not that of the training, .* give the text, languages, vocab_size, val_size"
    for one in (module, loaded):
        for stage in ("validate", "test"):
            run(stage, one, ours)
            run(stage, one, Data())
        for stage in ("validate", "test", "predict"):
            with pytest.raises(InputError, match=message):
                run(stage, one, theirs)
    with pytest.raises(InputError, match=message):
        tiny_trainer(max_epochs=2).fit(module_of(), datamodule=theirs, ckpt_path=str(tmp_path / "module.ckpt"))
    # A training from the beginning may have another.
    run("fit", loaded, theirs)
    run("test", loaded, theirs)


# What counts


@pytest.mark.parametrize(
    ("pad", "target", "counted"),
    [
        (0, [5, 2, 0, 0], [1, 1, 0, 0]),
        (0, [5, 2, -100, -100], [1, 1, 0, 0]),
        (2, [5, 6, 2, -100], [1, 1, 1, 0]),
        (2, [5, 2, 2, 2], [1, 1, 0, 0]),
        (2, [5, 6, 7, 8], [1, 1, 1, 1]),
    ],
)
def test_the_first_padding_is_the_end_where_both_have_one_id(pad, target, counted):
    student = network()
    batch = module_of(student, pad_id=pad).read_batch(batch_of([target]))
    assert batch.counted.tolist() == [[bool(one) for one in counted]]


@pytest.mark.parametrize("kind", [TranslationModule, SelfKDTranslationModule])
@pytest.mark.parametrize("value", [torch.inf, torch.nan, -torch.inf])
def test_not_finite_logits_of_padding_leave_gradients_alone(kind, value):
    found = []
    for fill in (0.0, value):
        module = module_of(kind=kind, label_smoothing=0.1)
        tiny_trainer().strategy.connect(module)
        module.trainer = tiny_trainer()
        if kind is SelfKDTranslationModule:
            module.alpha.at = lambda _trainer: 0.0
        batch = module.prepared(batch_of([[5, 6, 2], [7, 2, 0]]))
        logits = torch.randn(2, 3, IDS, generator=torch.Generator().manual_seed(1))
        logits[1, 2, 4] = fill
        leaf = logits.requires_grad_()
        module.student.forward = lambda leaf=leaf, **inputs: leaf * 1
        module._observed = {}
        ((_, loss),) = module.terms(batch).items()
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


# How translations begin and end


class Says:
    """A student's ``generate``, which notes how it is called and says a sentence."""

    def __init__(self, student, ids):
        self.ids, self.told = torch.tensor(ids), {}
        student.generate = self

    def __call__(self, input_ids, **told):
        self.told = told
        return self.ids.expand(len(input_ids), -1)


@pytest.mark.parametrize("own", [{"decoder_start_token_id": 0, "eos_token_id": 1}, {"decoder_start_token_id": None}])
def test_translations_begin_and_end_as_the_data_do(own):
    student = t5(**own)
    says = Says(student, [1, 7, 1, 8, 2, 9])
    module = module_of(student, decode=lambda ids: " ".join(map(str, ids)))
    batches = [batch_of([[5, 6, 2]]), Batch({"input_ids": torch.tensor([[5, 2]])})]
    trainer = tiny_trainer()
    trainer.test(module, datamodule=Data(batches=batches[:1]), verbose=False)
    expected = {"pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2}
    assert says.told.items() >= expected.items()
    trainer.predict(module, datamodule=Data(batches=batches[1:]))
    assert says.told.items() >= expected.items()
    assert module.texts(torch.tensor([[7, 1, 8, 2, 9]])) == ["7 1 8"]


def test_a_t5_writes_what_it_has_learnt():
    """Its own end is a word here."""
    module = module_of(
        t5(decoder_start_token_id=0, eos_token_id=7, dropout_rate=0.0, d_model=32, d_ff=64),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        beam=BeamSearch(size=2, max_length=6),
    )
    data = Data(batches=[batch_of([[5, 7, 6, 2]])] * 60)
    trainer = tiny_trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    ids = tiny_trainer().predict(module, datamodule=Data(batches=[Batch({"input_ids": torch.full((1, 3), 5)})]))
    assert ids[0].tolist() == [[5, 7, 6, 2]]


def test_where_nobody_knows_how_to_begin_it_is_said():
    batch = Batch({"input_ids": torch.tensor([[5, 2]])})
    with pytest.raises(InputError, match="nobody knows what the decoder begins with"):
        module_of(t5(decoder_start_token_id=None)).translate(batch)
    with pytest.raises(InputError, match=r"neither targets nor decoder_input_ids, .*translate\(batch\)"):
        module_of()(batch)
    module = module_of(decode=None)
    with pytest.raises(InputError, match="nobody knows how to make texts") as error:
        module.translate(batch)
    assert "NoSearch" not in str(error.value)


def test_a_decode_that_a_checkpoint_could_not_keep_is_missed(tmp_path):
    module = module_of()
    trainer = tiny_trainer(limit_train_batches=1)
    trainer.fit(module, datamodule=Data())
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    loaded = TranslationModule.load_from_checkpoint(tmp_path / "module.ckpt")
    with pytest.raises(InputError, match="the checkpoint could not keep the decode that was given: give decode"):
        loaded.translate(batch_of([[5, 2]]))


@pytest.mark.parametrize("size", [2.0, True, 0])
def test_a_beam_is_a_number_of_sentences(size):
    with pytest.raises(InputError, match=re.escape(f"size must be an integer of at least 1, got {size!r}")):
        BeamSearch(size=size)


# Predictions


def test_each_sentence_has_a_line_whatever_its_target(tmp_path):
    """As transformers collates them, with the samples' index."""
    foreign = {
        "input_ids": torch.full((3, 4), 5),
        "attention_mask": torch.ones(3, 4, dtype=torch.long),
        "labels": torch.tensor([[5, 2, -100], [-100, -100, -100], [6, 2, -100]]),
        "index": torch.tensor([2, 0, 1]),
    }
    student = network()
    Says(student, [1, 7, 2])
    writer = TranslationWriter(path=tmp_path / "out.txt")
    tiny_trainer(callbacks=[writer]).predict(module_of(student), datamodule=Data(batches=[foreign]))
    assert (tmp_path / "out.txt").read_text() == "[7]\n" * 3


def test_the_last_epoch_translates_too():
    seen, module = [], module_of(bleu_every=2)
    module.log = lambda name, value, **_: seen.append((module.current_epoch, name)) if "bleu" in name else None
    tiny_trainer(max_epochs=3, num_sanity_val_steps=0).fit(module, datamodule=Data())
    assert [epoch for epoch, _ in seen] == [1, 2]
