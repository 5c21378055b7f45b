"""The encoder-decoder Transformer: its parts, its recipe, its tied weights in files, and what it generates."""

import copy
import math

import pytest
import torch

from distill_lightning import (
    InputError,
    PastModel,
    SelfKDTranslationModule,
    TranslationModule,
    translation_transformer,
)
from distill_lightning.libraries import package
from distill_lightning.modules.parts.search import BeamSearch
from distill_lightning.networks import build_from, recipe_of
from distill_lightning.networks.weights import load_strictly, read_weights

SIZES = {"width": 16, "encoder_depth": 2, "decoder_depth": 1, "heads": 2, "feedforward": 32, "max_length": 12}
SOURCE = {
    "input_ids": torch.tensor([[5, 6, 7, 2], [8, 2, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
}
INPUT = SOURCE | {"decoder_input_ids": torch.tensor([[1, 7, 6], [1, 8, 0]])}


def network(seed=0, **options):
    torch.manual_seed(seed)
    return translation_transformer(30, **(SIZES | options))


@torch.no_grad()
def logits_of(network):
    return network.eval()(**INPUT).logits


def test_a_recipe_builds_it_again():
    built = build_from(recipe_of(network(dropout=0.3)))
    assert recipe_of(built) == {
        "factory": "translation_transformer",
        "arguments": {"num_classes": 30, **SIZES, "dropout": 0.3},
    }
    assert recipe_of(copy.deepcopy(built)) == recipe_of(built)
    assert (len(built.model.encoder.layers), len(built.model.decoder.layers)) == (2, 1)
    assert built.config.dropout == 0.3


def test_it_has_sinusoidal_positions_and_one_matrix_of_embeddings():
    built = network()
    positions = built.model.encoder.embed_positions
    assert not positions.weight.requires_grad
    angle = 3 / 10000 ** (2 * 2 / 16)
    assert positions.weight[3, [2, 8 + 2]].tolist() == pytest.approx([math.sin(angle), math.cos(angle)], rel=1e-5)
    shared = {built.lm_head.weight, built.model.encoder.embed_tokens.weight, built.model.decoder.embed_tokens.weight}
    assert len(shared) == 1
    copied = copy.deepcopy(built)
    assert copied.lm_head.weight is copied.model.decoder.embed_tokens.weight
    assert sum(one.numel() for one in built.parameters() if one.requires_grad) == sum(
        one.numel() for one in copied.parameters() if one.requires_grad
    )
    assert torch.equal(logits_of(copied), logits_of(built))


def test_a_source_is_read_without_its_padding_and_a_target_without_its_future():
    built = network()
    first = logits_of(built)
    longer = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in SOURCE.items()}
    with torch.no_grad():
        torch.testing.assert_close(built(**longer, decoder_input_ids=INPUT["decoder_input_ids"]).logits, first)
        other = INPUT["decoder_input_ids"].clone()
        other[:, 2] = 9
        changed = built(**SOURCE, decoder_input_ids=other).logits
    torch.testing.assert_close(changed[:, :2], first[:, :2])
    assert not torch.allclose(changed[:, 2], first[:, 2])


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("kind", [TranslationModule, SelfKDTranslationModule])
def test_an_exported_student_fits_a_fresh_network(tmp_path, suffix, kind):
    module = kind(network(), num_classes=30, pad_id=0)
    fresh = network(seed=1)
    path = module.export_student(tmp_path / f"student.{suffix}")
    load_strictly(fresh, read_weights(path), source=str(path))
    assert torch.equal(logits_of(fresh), logits_of(module.student))
    # Still one matrix.
    assert fresh.lm_head.weight is fresh.model.shared.weight


def test_the_past_of_one_is_a_frozen_copy():
    module = SelfKDTranslationModule(network(dropout=0.5), num_classes=30, pad_id=0, past=PastModel())
    past = module.past.network
    past.after_epochs(0, 1, module.student.train())
    expected = logits_of(copy.deepcopy(module.student)).softmax(-1)
    assert torch.equal(past.predict(INPUT), expected)
    assert not any(one.requires_grad for one in past.model.parameters())
    with torch.no_grad():
        module.student.lm_head.weight.zero_()
    assert torch.equal(past.predict(INPUT), expected)
    other = SelfKDTranslationModule(network(seed=4), num_classes=30, pad_id=0).past.network
    other.load_state_dict(past.state_dict(), network(seed=4))
    assert torch.equal(other.predict(INPUT), expected)


def naive_greedy(network, length):
    rows = []
    for ids, mask in zip(*SOURCE.values(), strict=True):
        row = [1]
        while len(row) <= length:
            logits = network(ids[None], mask[None], decoder_input_ids=torch.tensor([row])).logits[0, -1]
            logits[[0, 1]] = -math.inf
            row.append(int(logits.argmax()))
            if row[-1] == 2:
                break
        rows.append(row[1:])
    return rows


@torch.no_grad()
def test_a_beam_of_one_is_the_most_probable_token_each_time():
    built = network().eval()
    # So that sentences end, and what is never to be named would be.
    built.final_logits_bias[0, :3] = torch.tensor([5.0, 5.0, 1.0])
    found = BeamSearch(size=1, max_length=9)(built, SOURCE).tolist()
    expected = naive_greedy(built, 9)
    assert [row[: len(one)] for row, one in zip(found, expected, strict=True)] == expected
    assert all(token == 0 for row, one in zip(found, expected, strict=True) for token in row[len(one) :])


def score(network, row, ids, mask, length_penalty):
    tokens = row[: row.index(2) + 1] if 2 in row else row
    given = torch.tensor([[1, *tokens[:-1]]])
    logs = network(ids[None], mask[None], decoder_input_ids=given).logits[0].log_softmax(-1)
    return sum(float(log[token]) for log, token in zip(logs, tokens, strict=True)) / len(tokens) ** length_penalty


@torch.no_grad()
def test_a_wide_beam_finds_the_best_of_all_short_sentences():
    torch.manual_seed(0)
    built = translation_transformer(6, **(SIZES | {"heads": 1, "width": 4})).eval()
    ids, mask = torch.tensor([[4, 5, 2]]), torch.ones(1, 3, dtype=torch.int64)
    # Of two tokens at the most: 2, or one of three others and any of the four.
    every = [[2], *([first, second] for first in (3, 4, 5) for second in (2, 3, 4, 5))]
    best = max(every, key=lambda row: score(built, row, ids[0], mask[0], 1.0))
    found = BeamSearch(size=12, max_length=2)(built, {"input_ids": ids, "attention_mask": mask}).tolist()[0]
    assert [token for token in found if token != 0] == best


def test_a_translation_has_no_more_tokens_than_positions():
    built = network().eval()
    built.final_logits_bias[0, 2] = -100.0
    assert BeamSearch(size=2, max_length=500)(built, SOURCE).shape == (2, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "width=16 must be even and a multiple of heads=3"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"decoder_depth": 0}, "decoder_depth must be at least 1, got 0"),
        ({"bos_id": 0}, "pad_id=0, bos_id=0, eos_id=2 must be three different ids from 0 to 29"),
        ({"eos_id": 30}, "eos_id=30 must be three different ids from 0 to 29"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=f"translation_transformer: .*{message}"):
        network(**options)


def test_a_library_that_is_not_installed_is_named_with_its_extra():
    with pytest.raises(
        InputError, match=r"^no_such_library is not installed: pip install 'distill-lightning\[translation\]'$"
    ):
        package("no_such_library.inside", extra="translation")
