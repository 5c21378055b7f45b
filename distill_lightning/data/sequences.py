"""Sequences of tokens, padded to one length."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_lightning.data.batch import IGNORED


def shifted_right(target: Tensor, *, begin: int, pad_id: int) -> Tensor:
    r"""What a decoder reads to write a target: the tokens before each one.

    .. math:: x_1 = b, \quad x_t = y_{t-1} \quad (t > 1)

    Args:
        target: ``y``, ids, int64 ``(N, T)``; -100 where there is no token to write.
        begin: ``b``, which stands before the first token.
        pad_id: is read where the target before it is -100.

    Returns:
        ``x``, int64 ``(N, T)``.

    Example:
        >>> import torch
        >>> from distill_lightning.data.sequences import shifted_right
        >>> shifted_right(torch.tensor([[5, 6, 2, 0], [7, 2, -100, -100]]), begin=1, pad_id=0)
        tensor([[1, 5, 6, 2],
                [1, 7, 2, 0]])
    """
    before = target[:, :-1]
    first = torch.full_like(target[:, :1], begin)
    return torch.cat([first, before.masked_fill(before == IGNORED, pad_id)], dim=1)
