"""Means over an epoch, without what a `log` in every step costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill_lightning.lightning_internals import begins_anew, has_trainer, is_last_batch
from distill_lightning.part import Part
from distill_lightning.processes import gathered

_NOTHING = 1e-9
"""What a process weighs in which nothing counts: too little to change a sum, but a mean over nothing is 0, not NaN."""


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The loss, its terms and, where there are several, the weighted terms' shares in it, by the names in logs.

    Raises:
        KeyError: the weights are of other terms.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.modules.parts.means import weighted_sum
        >>> weighted_sum({"ce": tensor(2.0), "kd": tensor(3.0)}, {"ce": 1.0, "kd": 2.0})
        {'loss': tensor(8.), 'ce': tensor(2.), 'kd': tensor(3.), 'ce_share': tensor(0.2500), 'kd_share': tensor(0.7500)}
    """
    if terms.keys() != weights.keys() or "loss" in terms:
        raise KeyError(
            f"terms() gave {sorted(terms)}, weights() gave {sorted(weights)}: they must name the same, not 'loss'"
        )
    weighted = {name: weights[name] * term for name, term in terms.items()}
    loss = torch.stack(list(weighted.values())).sum()
    shares = {f"{name}_share": weighted[name] / loss for name in terms if weights[name] != 0} if len(terms) > 1 else {}
    return {"loss": loss, **terms, **shares}


def weight_of(count: int | Tensor, mean: Tensor) -> Any:
    """What a mean over so many samples or positions weighs for `LightningModule.log`, as its ``batch_size``.

    Processes add up what they log: all need numbers of one type, whichever of them has anything that does not count.

    Example:
        >>> import torch
        >>> from distill_lightning.modules.parts.means import weight_of
        >>> weight_of(8, torch.tensor(0.5)), weight_of(torch.tensor(3), torch.tensor(0.5))
        (tensor(8.), tensor(3.))
    """
    weight = count if isinstance(count, Tensor) else torch.full((), count, device=mean.device)
    return weight.float().clamp_min(_NOTHING)


def balanced(module: Any, loss: Tensor, count: int | Tensor) -> Tensor:
    r"""A process's mean loss, for a strategy that averages the processes' gradients; as it is where there is one.

    .. math:: \frac{c_p}{\frac{1}{P} \sum_r c_r} L_p

    of process ``p`` of ``P``, in which :math:`c_p` samples or positions count: so a token weighs the same wherever it
    is, and the gradient is that of the mean over all of them.

    Args:
        module: that is trained.
        loss: the mean over what counts in this process's batch.
        count: how many do, see `Batch.count`.
    """
    if not has_trainer(module) or module.trainer.world_size == 1:
        return loss
    own = count if isinstance(count, Tensor) else torch.full((), count, device=loss.device)
    own, processes = own.to(torch.float32), int(module.trainer.world_size)
    every: Tensor = module.trainer.strategy.reduce(own.clone(), reduce_op="sum")
    # Where nothing counts in any of them, all losses are 0.
    return loss * (own * processes / every.clamp_min(1))


class _Sums(NamedTuple):
    values: Tensor
    weight: int | Tensor


class RunningMeans(Part):
    """Means of scalars over an epoch's batches, each weighing as much as counts in it; logged under ``train/``.

    The sums stay on the device, in one tensor that a step adds to: `LightningModule.log` takes a tenth of a millisecond
    for each scalar and step, which for a small network is more than the scalar itself.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.modules.parts.means import RunningMeans
        >>> means = RunningMeans()
        >>> means.add({"ce": tensor(1.0)}, count=3)
        tensor([1.])
        >>> means.add({"ce": tensor(5.0)}, count=1)
        tensor([5.])
        >>> list(means.means())
        [('ce', tensor(2.), 4)]
    """

    def __init__(self) -> None:
        # By the names that came together; there is more than one such set only where a term comes or goes.
        self._sums: dict[tuple[str, ...], _Sums] = {}
        self._is_logged = False
        self._kept: list[Any] = []

    def add(self, values: Mapping[str, Tensor], count: int | Tensor) -> Tensor:
        """Add the scalars of a batch; no graph is kept.

        Args:
            values: means over the batch, by name.
            count: how many samples or positions they are means of, see `Batch.count`.

        Returns:
            The scalars, ``(S,)``.
        """
        names = tuple(values)
        new = torch.stack([value.detach().float() for value in values.values()])
        before = self._sums.get(names)
        if isinstance(count, Tensor):
            # Where nothing counts, the share of a term is 0 / 0.
            weighted = torch.where(count > 0, new * count, 0)
            self._sums[names] = (
                _Sums(weighted, count) if before is None else _Sums(before.values + weighted, before.weight + count)
            )
        elif before is None:
            self._sums[names] = _Sums(new * count, count)
        else:
            before.values.add_(new, alpha=count)
            self._sums[names] = _Sums(before.values, before.weight + count)
        return new

    def means(self) -> Iterator[tuple[str, Tensor, int | Tensor]]:
        """Name and mean of each scalar over the batches that had it, and what it is a mean of."""
        totals: dict[str, tuple[Tensor, int | Tensor]] = {}
        for names, (values, count) in self._sums.items():
            for name, value in zip(names, values.unbind(), strict=True):
                total, before = totals.get(name, (torch.zeros_like(value), 0))
                totals[name] = (total + value, before + count)
        for name, (total, count) in totals.items():
            yield name, total / weight_of(count, total), count

    def forget(self) -> None:
        """Drop the sums."""
        self._sums, self._is_logged = {}, False

    def fit_starts(self, module: Any) -> None:
        """An interrupted ``fit`` may have left some."""
        self.forget()

    def epoch_starts(self, module: Any) -> None:
        """Each epoch has means of its own."""
        self.forget()

    def batch_ends(self, module: Any) -> None:
        """Log with the last batch, because callbacks read the means at the end of the epoch, before the module."""
        trainer = module.trainer
        if is_last_batch(trainer) or trainer.should_stop or trainer.global_step == trainer.max_steps:
            self._log(module)

    def epoch_ends(self, module: Any) -> None:
        """Log those of an epoch that has ended in another way than with its last batch."""
        self._log(module)

    def _log(self, module: Any) -> None:
        if self._is_logged:
            return
        for name, mean, count in self.means():
            module.log(
                f"train/{name}", mean, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight_of(count, mean)
            )
        # What was logged is in no checkpoint: the sums stay until the next epoch.
        self._is_logged = True

    def state_dict(self) -> dict[str, Any] | None:
        """The sums so far, of all processes, which all call it."""
        own = [(list(names), values.tolist(), int(count)) for names, (values, count) in self._sums.items()]
        return {"sums": [sums for of_one_process in gathered(own) for sums in of_one_process]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep them until the training starts, which begins by dropping those of the training before."""
        self._kept = state["sums"]

    def training_starts(self, module: Any) -> None:
        """Go on with a share of what all processes had summed up."""
        kept, self._kept = self._kept, []
        if begins_anew(module.trainer):
            return
        for names, values, count in kept:
            # Whole samples, in such numbers that they are all samples together.
            own = (count + module.trainer.global_rank) // module.trainer.world_size
            before = self._sums.get(tuple(names), _Sums(torch.zeros(len(names), device=module.device), 0))
            share = torch.tensor(values, device=module.device) * (own / max(count, 1))
            self._sums[tuple(names)] = _Sums(before.values + share, before.weight + own)
