"""Rows that several processes have written, brought to all of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from distill_lightning.processes import all_reduce, is_alone
from distill_lightning.storage.rows import in_pieces


def exchange_rows(columns: Mapping[str, Tensor], written: Tensor) -> tuple[Tensor, bool]:
    """Give every process the rows that were written last, whoever wrote them; called by all processes.

    Each sample's row comes from one process, the others contribute zero bytes: a sum of bytes is exact for every type,
    and needs no equal numbers of rows.

    Args:
        columns: rows ``(N, k)`` by field, changed in place.
        written: int64 ``(N,)``: when this process last wrote a row, counted from 1; 0 if before the last exchange; -1
            if never.

    Returns:
        ``written`` after the exchange, 0 or -1, and whether any process has written since the last one.
    """
    world, rank = (1, 0) if is_alone() else (dist.get_world_size(), dist.get_rank())
    # The order in which one process would have read the samples that several have taken in turns.
    claim = torch.where(written >= 0, written * world + rank, -1)
    if not is_alone():
        all_reduce(claim, dist.ReduceOp.MAX)
    # What has been exchanged before has order 0 in every process.
    fresh = bool((claim >= world).any())
    if fresh and not is_alone():
        others = (claim < 0) | (claim % world != rank)
        for rows in columns.values():
            nbytes = rows[0].nbytes
            for piece, not_ours in zip(in_pieces(rows, nbytes), in_pieces(others, nbytes), strict=True):
                piece.masked_fill_(not_ours[:, None], 0)
                all_reduce(piece.view(torch.uint8), dist.ReduceOp.SUM)
    return torch.where(claim >= 0, 0, -1), fresh
