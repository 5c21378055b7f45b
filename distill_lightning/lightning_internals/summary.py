"""What Lightning knows and says of a module before it trains it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from torchmetrics import Metric


def forget_known_metrics(module: Any) -> None:
    """Have a module look again for the metrics among its attributes, of which it logs no others."""
    module._metric_attributes = None


def summarise_frozen(module: Any, lines: Iterable[str]) -> None:
    """Tell of networks beside the module where Lightning has printed its model summary."""
    if any(isinstance(callback, pl.callbacks.ModelSummary) for callback in module.trainer.callbacks):
        for line in lines:
            rank_zero_info(line)


def summarise_without_metrics(module: Any) -> None:
    """Have the Trainer's model summary leave out metrics, which have neither parameters nor an input.

    Args:
        module: that is about to be summarised.
    """
    summaries: list[Any] = [one for one in module.trainer.callbacks if isinstance(one, pl.callbacks.ModelSummary)]
    for callback in summaries:
        callback._summary = partial(_summary_without_metrics, callback)


def _summary_without_metrics(callback: Any, trainer: Any, module: Any) -> Any:
    summary = type(callback)._summary(callback, trainer, module)
    for name, child in module.named_modules():
        if _is_of_metrics(child):
            summary._layer_summary.pop(name, None)
    return summary


def _is_of_metrics(module: Any) -> bool:
    return any(isinstance(child, Metric) for child in module.modules()) and next(module.parameters(), None) is None


_EVAL_REMARK = re.compile(r"Found .* module.* in eval mode at the start of training", re.IGNORECASE)


def expect_eval_modes() -> None:
    """Until `forget_eval_modes`, do not warn of parts in eval mode: these are frozen, and meant to be in it."""
    warnings.filterwarnings("ignore", message=_EVAL_REMARK.pattern)


def forget_eval_modes() -> None:
    """Warn of others' parts in eval mode again."""
    ours = [one for one in warnings.filters if one[0] == "ignore" and one[1] is not None and one[1] == _EVAL_REMARK]
    for one in ours[:1]:
        cast("list[Any]", warnings.filters).remove(one)
