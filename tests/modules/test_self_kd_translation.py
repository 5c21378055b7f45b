"""Translation: Self-KD of every token against a plain loop, padding, the past network, and scores of whole corpora."""

import copy
import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import sacrebleu
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from distill_lightning import (
    Batch,
    BeamSearch,
    InputError,
    MovingAverage,
    NoSearch,
    PastModel,
    SelfKDModule,
    SelfKDTranslationModule,
    StoredPast,
    TranslationModule,
    translation_transformer,
)
from distill_lightning.modules.parts.alpha import Alpha
from distill_lightning.testing import tiny_trainer
from distill_lightning.testing.processes import LeaveTheGroup, process_strategy
from distill_lightning.testing.waits import Waits

VOCABULARY, PAD, BOS, EOS = 12, 0, 1, 2
WORDS = ["-", "-", "-", "-", "Haus", "Hund", "Katze", "lief", "schnell", "über", "das", "Gras."]


def padded(rows):
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def sentence(number):
    """Words that are to be named backwards; even numbers have short sentences, odd ones long sentences."""
    generator = torch.Generator().manual_seed(number)
    length = 1 + number % 2 * 4 + int(torch.randint(2, (1,), generator=generator))
    return torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()


def batch_of(numbers):
    """A batch as a data module makes it."""
    words = [sentence(number) for number in numbers]
    source, target = padded([[*row, EOS] for row in words]), padded([[*row[::-1], EOS] for row in words])
    read = torch.cat([torch.full((len(words), 1), BOS), target[:, :-1]], dim=1)
    inputs = {"input_ids": source, "attention_mask": (source != PAD).long(), "decoder_input_ids": read}
    return Batch(inputs, target, torch.tensor(numbers))


class Loader(DataLoader):
    """Goes on in the middle of an epoch."""

    given = skip = 0

    def __iter__(self):
        skip, self.skip = self.skip, 0
        self.given = skip
        for number, batch in enumerate(super().__iter__()):
            if number >= skip:
                self.given += 1
                yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.skip = state["given"] % len(self)


class Pairs(pl.LightningDataModule):
    """Sentences by their numbers."""

    num_classes = VOCABULARY

    def __init__(self, samples=24, batch_size=8, evaluated=11):
        super().__init__()
        self.samples, self.batch_size, self.evaluated = samples, batch_size, evaluated

    def decode(self, ids):
        return " ".join(WORDS[token] for token in ids if token > 3)

    def loader(self, numbers):
        return Loader(numbers, batch_size=self.batch_size, collate_fn=batch_of)

    def train_dataloader(self):
        numbers = list(range(self.samples))
        if self.trainer.world_size == 1:
            return self.loader(numbers)
        # A Trainer's own would shuffle them.
        sampler = DistributedSampler(numbers, shuffle=False)
        return DataLoader(numbers, batch_size=self.batch_size, collate_fn=batch_of, sampler=sampler)

    def val_dataloader(self):
        return self.loader(list(range(1000, 1000 + self.evaluated)))

    test_dataloader = predict_dataloader = val_dataloader


def network(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "heads": 2, "feedforward": 16, "max_length": 16}
    return translation_transformer(VOCABULARY, **(sizes | options))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def plain(student=None, **options):
    options = {"optimizer": sgd, "bleu_every": 0, "beam": BeamSearch(size=2, max_length=8)} | options
    return TranslationModule(student or network(), num_classes=VOCABULARY, pad_id=PAD, **options)


def self_kd(student=None, **options):
    options = {"optimizer": sgd, "bleu_every": 0, "beam": BeamSearch(size=2, max_length=8)} | options
    return SelfKDTranslationModule(student or network(), num_classes=VOCABULARY, pad_id=PAD, **options)


def fitted(module, data=None, *, ckpt_path=None, **options):
    trainer = tiny_trainer(**options)
    trainer.fit(module, datamodule=data or Pairs(), ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return trainer


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


class Said(nn.Module):
    """A student whose logits ``(N, T, K)`` are its only parameter."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        return self.logits


def with_past(module, past=None, alpha=0.6):
    """The module with a past network, and without a training; alpha stays as it is."""
    module.alpha = SimpleNamespace(at=lambda _trainer: alpha)
    module._trainer = SimpleNamespace(world_size=1, current_epoch=1, global_rank=0)
    if past is not None:
        module.past.network.model, module.past.network.ready = past.eval(), True
    return module


def terms_of(module, batch):
    module._observed = {}
    terms = module.terms(module.prepared(batch))
    return terms["self_kd"], {name: float(value) for name, value in module._observed.items()}


# One token after another


def softmax(row, temperature=1.0):
    exps = [math.exp(value / temperature) for value in row]
    return [value / sum(exps) for value in exps]


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_token_that_counts_has_a_target_of_its_own(epsilon, temperature):
    batch, alpha = batch_of([0, 1, 3]), 0.6
    module = with_past(self_kd(label_smoothing=epsilon, past_temperature=temperature), network(seed=1), alpha)
    with torch.no_grad():
        logits = module.student.eval()(**batch.input).logits.tolist()
        past = module.past.network.model(**batch.input).logits.tolist()
    loss = at_label = entropy = agree = tokens = 0
    for row, targets in enumerate(batch.target.tolist()):
        for place, label in enumerate(targets):
            if label == PAD:
                continue
            own, before = softmax(logits[row][place]), softmax(past[row][place], temperature)
            hard = [(1 - epsilon) * (k == label) + epsilon / VOCABULARY for k in range(VOCABULARY)]
            q = [(1 - alpha) * y + alpha * s for y, s in zip(hard, before, strict=True)]
            loss -= sum(a * math.log(b) for a, b in zip(q, own, strict=True))
            at_label += q[label]
            entropy -= sum(value * math.log(value) for value in q)
            agree += own.index(max(own)) == before.index(max(before))
            tokens += 1
    assert tokens == int((batch.target != PAD).sum()) < batch.target.numel()
    found, observed = terms_of(module, batch)
    expected = {"target_gt_prob": at_label, "target_entropy": entropy, "agree_past": agree, "known_fraction": tokens}
    assert found.item() == pytest.approx(loss / tokens, rel=1e-5)
    assert observed == pytest.approx({name: value / tokens for name, value in expected.items()} | {"alpha": alpha})


@pytest.mark.parametrize("build", [plain, self_kd])
def test_logits_at_padding_change_nothing(build):
    batch, past = batch_of([0, 1, 2]), Said(torch.randn(3, 7, VOCABULARY))
    padding = batch.target == PAD
    assert padding.any()
    past.logits.data = past.logits.data[:, : batch.target.shape[1]]
    logits, found = torch.randn(*batch.target.shape, VOCABULARY), []
    for fill in (0.0, 1e4, -30.0):
        module = build(Said(logits.masked_fill(padding[..., None], fill)), label_smoothing=0.1)
        if build is self_kd:
            with_past(module, past)
        module._observed = {}
        ((_, term),) = module.terms(module.prepared(batch)).items()
        term.backward()
        gradient = module.student.logits.grad
        assert (gradient[padding] == 0).all()
        assert (gradient[~padding].abs().sum(dim=1) > 0).all()
        found.append((term.detach(), gradient, {name: float(value) for name, value in module._observed.items()}))
    for term, gradient, observed in found[1:]:
        assert torch.equal(term, found[0][0])
        assert torch.equal(gradient, found[0][1])
        assert observed == found[0][2]


def test_sentences_of_one_token_are_samples_of_a_classification():
    target = torch.tensor([5, 7, 4])
    inputs = {name: torch.full((3, 1), 4) for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    logits, past = torch.randn(2, 3, VOCABULARY).unbind()
    tokens = with_past(self_kd(Said(logits[:, None])), Said(past[:, None]))
    loss, observed = terms_of(tokens, Batch(inputs, target[:, None]))
    samples = with_past(SelfKDModule(Said(logits), num_classes=VOCABULARY, past=PastModel()), Said(past))
    expected, others = terms_of(samples, Batch(inputs, target))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert observed == pytest.approx(others)


def test_another_order_of_the_vocabulary_changes_nothing():
    batch = batch_of([0, 1, 2])
    logits, past = torch.randn(2, *batch.target.shape, VOCABULARY).unbind()
    loss, observed = terms_of(with_past(self_kd(Said(logits)), Said(past)), batch)
    order = torch.randperm(VOCABULARY)
    place = order.argsort()
    moved = SelfKDTranslationModule(
        Said(logits[..., order]), num_classes=VOCABULARY, pad_id=int(place[PAD]), bleu_every=0
    )
    again, others = terms_of(with_past(moved, Said(past[..., order])), batch.replace(target=place[batch.target]))
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    assert others == pytest.approx(observed)


def test_sentences_that_do_not_count_change_nothing():
    batch, counted = batch_of([0, 1, 2]), torch.tensor([True, False, True])
    logits, past = torch.randn(2, *batch.target.shape, VOCABULARY).unbind()
    given = terms_of(with_past(self_kd(Said(logits)), Said(past)), batch.replace(counted=counted))
    rows = Batch({name: value[counted] for name, value in batch.input.items()}, batch.target[counted])
    alone = terms_of(with_past(self_kd(Said(logits[counted])), Said(past[counted])), rows)
    assert given[0].item() == pytest.approx(alone[0].item(), rel=1e-6)
    assert given[1] == pytest.approx(alone[1])


# Its limits are plain training


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize(("options", "epochs"), [({}, 1), ({"alpha_T": 0.0}, 3)], ids=["first epoch", "alpha 0"])
def test_its_limits_are_plain_training_bit_for_bit(options, epochs, epsilon):
    trained, expected = self_kd(label_smoothing=epsilon, **options), plain(label_smoothing=epsilon)
    for module in (trained, expected):
        torch.manual_seed(3)
        trainer = fitted(module, max_epochs=epochs)
        assert trainer.callback_metrics.get("train/known_fraction", 0) == (epochs > 1 and module is trained)
    assert same(trained.state_dict(), expected.state_dict())
    assert not same(trained.state_dict(), plain().state_dict())


# The past network


class Watch(pl.Callback):
    """Keeps the student of every epoch's end, and what it and its past are given."""

    def __init__(self):
        self.ends, self.seen = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        past = pl_module.past.network.model
        if past is not None:
            assert same(past.state_dict(), self.ends[-1])
            assert not any(part.training for part in past.modules())
            past.register_forward_hook(self.look, with_kwargs=True)

    def look(self, past, args, inputs, outputs):
        self.seen.append(inputs)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.student.train()
        self.seen.clear()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for inputs in self.seen:
            assert inputs.keys() == batch.input.keys()
            assert all(inputs[name] is value for name, value in batch.input.items())
        assert len(self.seen) == (trainer.current_epoch > 0)

    def on_train_epoch_end(self, trainer, pl_module):
        self.ends.append(copy.deepcopy(pl_module.student.state_dict()))


def test_the_past_is_the_student_of_the_last_epochs_end_and_sees_the_very_batch():
    module, watch = self_kd(), Watch()
    module.student.register_buffer("steps", torch.zeros(()))
    module.student.register_forward_hook(lambda student, *_: student.steps.add_(student.training) is None or None)
    fitted(module, max_epochs=3, callbacks=[watch])
    assert [float(end["steps"]) for end in watch.ends] == [3, 6, 9]


@pytest.mark.slow
@pytest.mark.parametrize("past", [PastModel(), MovingAverage(decay=0.9)], ids=["past_model", "average"])
@pytest.mark.parametrize("when", ["epoch", pytest.param("batch", marks=pytest.mark.lightning(since=(2, 5)))])
def test_a_resumed_training_is_the_undisturbed_one(tmp_path, past, when):
    class Stop(pl.callbacks.Checkpoint):
        def stop(self, trainer):
            trainer.save_checkpoint(tmp_path / "module.ckpt")
            trainer.should_stop = True

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if when == "batch" and trainer.global_step == 5:
                self.stop(trainer)

        def on_train_epoch_end(self, trainer, pl_module):
            if when == "epoch" and trainer.current_epoch == 1:
                self.stop(trainer)

    whole = self_kd(network(dropout=0.0), past=past)
    trainer = fitted(whole, max_epochs=4)
    fitted(self_kd(network(dropout=0.0), past=past), max_epochs=4, callbacks=[Stop()], enable_checkpointing=True)
    resumed = self_kd(network(seed=5, dropout=0.0), past=past)
    again = fitted(resumed, max_epochs=4, ckpt_path=tmp_path / "module.ckpt")
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(resumed.past.network.model.state_dict(), whole.past.network.model.state_dict())
    assert {k: float(v) for k, v in again.callback_metrics.items()} == pytest.approx(
        {k: float(v) for k, v in trainer.callback_metrics.items()}, rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("build", [plain, self_kd])
def test_two_processes_with_unlike_numbers_of_tokens_are_one(build):
    """The second has every long sentence, and the first one sentence of the evaluation twice."""
    alone, together = (build(network(dropout=0.0), bleu_every=1, label_smoothing=0.1) for _ in range(2))
    single = fitted(alone, Pairs(batch_size=8), max_epochs=3)
    double = fitted(
        together, Pairs(batch_size=4), max_epochs=3, devices=2, strategy=process_strategy(),
        callbacks=[LeaveTheGroup()],
    )  # fmt: skip
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert {"val/bleu", "val/chrf", "train/loss"} <= single.callback_metrics.keys()
    assert {name: float(value) for name, value in double.callback_metrics.items()} == pytest.approx(
        {name: float(value) for name, value in single.callback_metrics.items()}, rel=1e-3, abs=1e-4
    )


def test_a_step_does_not_wait_for_the_device():
    module, waits = self_kd(label_smoothing=0.1), Waits()
    step = module.optimizer_step

    def watched(*args, **kwargs):
        with waits:
            step(*args, **kwargs)

    module.optimizer_step = watched
    fitted(module, max_epochs=2)
    assert not [wait for wait in waits.found if "distill_lightning" in wait.stack], waits.found


# Evaluation


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A module, and the checkpoint of its training."""
    torch.manual_seed(0)
    module = plain(
        network(width=32, dropout=0.0), optimizer=lambda p: torch.optim.Adam(p, lr=0.01), bleu_every=3,
        beam=BeamSearch(size=3, max_length=10),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("trained") / "module.ckpt"
    fitted(module, Pairs(samples=96), max_epochs=6).save_checkpoint(path)
    return module, path


def test_metrics_are_those_of_the_tokens_that_count(trained):
    module, _ = trained
    result = tiny_trainer().test(module, datamodule=Pairs(), verbose=False)[0]
    nll, hits, tokens = 0.0, 0, 0
    bins = [[0, 0.0, 0.0] for _ in range(15)]
    module.eval()
    for batch in Pairs().test_dataloader():
        with torch.no_grad():
            logits = module.student(**batch.input).logits.tolist()
        for row, targets in enumerate(batch.target.tolist()):
            for place, label in enumerate(targets):
                if label == PAD:
                    continue
                probs = softmax(logits[row][place])
                confidence, right = max(probs), probs.index(max(probs)) == label
                nll, hits, tokens = nll - math.log(probs[label]), hits + right, tokens + 1
                found = bins[min(math.ceil(confidence * 15) - 1, 14)]
                found[0], found[1], found[2] = found[0] + 1, found[1] + confidence, found[2] + right
    ece = sum(abs(sure - right) for _, sure, right in bins) / tokens
    expected = {"nll": nll / tokens, "perplexity": math.exp(nll / tokens), "accuracy": hits / tokens, "ece": ece}
    assert {name: result[f"test/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert result.keys() == {f"test/{name}" for name in (*expected, "bleu", "chrf")}


def test_bleu_is_that_of_the_whole_corpus(trained, caplog):
    module, _ = trained
    with caplog.at_level("INFO"):
        result = tiny_trainer().test(module, datamodule=Pairs(batch_size=3), verbose=False)[0]
    data = Pairs(evaluated=11)
    references = [data.decode(sentence(1000 + number)[::-1]) for number in range(11)]
    found = tiny_trainer().predict(module, datamodule=data)
    translations = [data.decode(row) for ids in found for row in ids.tolist()]
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    assert result["test/bleu"] == pytest.approx(bleu.corpus_score(translations, [references]).score, rel=1e-5)
    assert result["test/chrf"] == pytest.approx(chrf.corpus_score(translations, [references]).score, rel=1e-5)
    assert 1 < result["test/bleu"] < 100
    assert module.signatures == {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())}
    assert caplog.text.count(module.signatures["bleu"]) == 1


def test_repeated_sentences_are_left_out(trained):
    module, _ = trained

    class Repeated(Pairs):
        def test_dataloader(self):
            numbers = [*range(1000, 1011), 1000, 1000]
            batches = [batch_of(numbers[:7]), batch_of(numbers[7:])]
            batches[1] = batches[1].replace(counted=torch.tensor([True] * 4 + [False] * 2))
            return DataLoader(batches, batch_size=None)

    first, second = (tiny_trainer().test(module, datamodule=data, verbose=False)[0] for data in (Pairs(), Repeated()))
    assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.lightning(since=(2, 6))
def test_several_loaders_are_a_corpus_each(trained):
    module, _ = trained

    class Two(Pairs):
        def test_dataloader(self):
            return [self.loader([1000, 1002]), self.loader(list(range(1000, 1011)))]

    trainer = tiny_trainer()
    trainer.test(module, datamodule=Two(), verbose=False)
    alone = tiny_trainer().test(module, datamodule=Pairs(), verbose=False)[0]
    found = trainer.callback_metrics
    for name, value in alone.items():
        assert float(found[f"{name}/dataloader_idx_1"]) == pytest.approx(value, rel=1e-5)
    assert float(found["test/chrf/dataloader_idx_0"]) != pytest.approx(alone["test/chrf"])
    assert len(found) == 2 * len(alone)


def test_validations_translate_every_so_many_epochs(trained):
    module, _ = trained
    seen = []

    class Look(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            seen.append((trainer.current_epoch, len(outputs.get("translations", []))))

    again = plain(copy.deepcopy(module.student), bleu_every=2)
    fitted(again, Pairs(evaluated=4), max_epochs=4, callbacks=[Look()], num_sanity_val_steps=0)
    assert seen == [(0, 0), (1, 4), (2, 0), (3, 4)]


def test_predictions_are_ids_and_translate_gives_texts(trained):
    module, _ = trained
    data, batch = Pairs(), batch_of([1, 2, 3])
    own = plain(module.student, decode=data.decode)
    before = module.student.training
    ids = own.predict_step(batch)
    assert own.translate(batch) == own.texts(ids) == [data.decode(row) for row in ids.tolist()]
    assert own.translate(Batch(batch.input)) == own.translate(batch)
    batch.counted = torch.tensor([True, False, True])
    assert own.translate(batch) == [own.texts(ids)[row] for row in (0, 2)]
    assert module.student.training == before


def test_what_a_collator_of_transformers_makes_is_understood():
    batch = batch_of([0, 1, 2])
    foreign = {name: batch.input[name] for name in ("input_ids", "attention_mask")}
    foreign["labels"] = batch.target.masked_fill(batch.target == PAD, -100)
    module = plain(label_smoothing=0.1).eval()
    ours, theirs = (module.prepared(one) for one in (batch, foreign))
    assert torch.equal(ours.counted, theirs.counted)
    assert torch.equal(ours.input["decoder_input_ids"][ours.counted], theirs.input["decoder_input_ids"][ours.counted])
    assert module.terms(ours)["ce"].item() == pytest.approx(module.terms(theirs)["ce"].item(), rel=1e-6)


# Checkpoints


def test_a_checkpoint_builds_the_module_again_and_an_export_the_student(tmp_path, trained):
    module, path = trained
    loaded = TranslationModule.load_from_checkpoint(path)
    assert loaded.translating.search == BeamSearch(size=3, max_length=10)
    batch = batch_of([1, 2, 3])
    assert torch.equal(loaded.predict_step(batch), module.predict_step(batch))


# What cannot be used


class Dumb(nn.Module):
    """No generate."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, **inputs):
        return self.inner(**inputs)


class Mute(Pairs):
    decode = None


@pytest.mark.parametrize(
    ("build", "data", "message"),
    [
        (lambda: plain(Dumb(), bleu_every=1), Pairs, r"the student \(Dumb\) has no generate\(\)"),
        (lambda: plain(bleu_every=1), Mute, "nobody knows how to make texts of token ids"),
        (
            lambda: plain(network(max_length=4)),
            Pairs,
            r"the source of sample 1001 has 7 tokens .* positions for 4: leave",
        ),
        (lambda: plain(translation_transformer(20, width=8, heads=2)), Pairs, r"\(3, 7, 20\).* num_classes=12 is need"),
    ],
    ids=["no generate", "no decode", "too long", "other vocabulary"],
)
def test_what_does_not_fit_is_refused_in_one_line(build, data, message):
    with pytest.raises(InputError, match=message) as error:
        fitted(build(), data(samples=8, batch_size=3))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"past": StoredPast()}, r"StoredPast keeps one row for each sample.*past=PastModel\(\)"),
        ({"bleu_every": -1}, "bleu_every cannot be negative, got -1"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        self_kd(**options)
    for wrong in ({"size": 0}, {"max_length": 0}, {"length_penalty": math.inf}):
        with pytest.raises(InputError, match=f"BeamSearch: {next(iter(wrong))} must be"):
            BeamSearch(**wrong)
    for wrong in (12, -100, None):
        with pytest.raises(InputError, match=f"pad_id must be an id below num_classes=12, got {wrong}"):
            TranslationModule(network(), num_classes=VOCABULARY, pad_id=wrong)


def test_a_student_without_generate_trains_and_tests_without_translations():
    module = plain(Dumb(), beam=NoSearch())
    fitted(module)
    result = tiny_trainer().test(module, datamodule=Mute(), verbose=False)[0]
    assert result.keys() == {f"test/{name}" for name in ("nll", "perplexity", "accuracy", "ece")}
    with pytest.raises(InputError, match="nothing is translated"):
        module.translate(batch_of([0]))


def test_alpha_grows_as_it_does_in_classification():
    assert isinstance(self_kd().alpha, Alpha)
    assert self_kd(alpha_T=0.3).alpha.final == 0.3
