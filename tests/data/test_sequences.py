"""What a decoder reads."""

import torch

from distill_lightning.data.sequences import shifted_right


def test_a_decoder_reads_the_tokens_before():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(3, 9, (5, 7), generator=generator)
    # Behind the sentence, and within it.
    target[torch.rand(5, 7, generator=generator) < 0.3] = -100
    given = target.clone()
    found = shifted_right(target, begin=1, pad_id=0)
    for row, expected in zip(found.tolist(), given.tolist(), strict=True):
        assert row == [1, *(0 if token == -100 else token for token in expected[:-1])]
    assert torch.equal(target, given)
    assert shifted_right(target[:, :1], begin=1, pad_id=0).tolist() == [[1]] * 5
