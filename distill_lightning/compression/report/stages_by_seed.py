"""The stages of a compression run, over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill_lightning.compression.report.claims import claim_of
from distill_lightning.compression.report.stage import (
    CONTROL_RANDOM,
    CONTROL_SCRATCH,
    DENSE,
    DENSE_INT8,
    FINAL,
    FINAL_INT8,
    Stage,
)
from distill_lightning.errors import InputError

NOT_RUN = "not run"


class StagesBySeed:
    """The stages of a compression run, over its seeds, and what is asked of them.

    Args:
        stages_by_seed: by seed, the stages in their order, one of which is called "dense".
        metric: the score that the stages are compared by.
        higher_is_better: whether a higher score is better.

    Raises:
        InputError: there is no seed, a seed has no dense stage or two stages of one name, or a stage lacks the metric.
    """

    def __init__(
        self,
        stages_by_seed: Mapping[int, Sequence[Stage]],
        *,
        metric: str = "accuracy",
        higher_is_better: bool = True,
    ) -> None:
        if not stages_by_seed:
            raise InputError("a report needs the stages of at least one seed")
        self.metric, self.higher_is_better = metric, higher_is_better
        self.seeds: dict[int, dict[str, Stage]] = {}
        for seed, stages in stages_by_seed.items():
            names = [stage.name for stage in stages]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"seed {seed} has two stages {twice!r}: number the steps")
            if DENSE not in names:
                raise InputError(f"seed {seed} has no stage {DENSE!r}: measure the network before its compression")
            without = next((stage.name for stage in stages if metric not in stage.scores), None)
            if without is not None:
                raise InputError(f"stage {without!r} of seed {seed} has no score {metric!r}")
            self.seeds[seed] = {stage.name: stage for stage in stages}
        self.names = self._ordered()

    def _ordered(self) -> list[str]:
        """Dense first, then the steps in their order, the final network and the controls."""
        places = {DENSE: 0, DENSE_INT8: 1, FINAL: 3, FINAL_INT8: 4, CONTROL_SCRATCH: 5, CONTROL_RANDOM: 5}
        kinds = {stage.name: stage.kind for stages in self.seeds.values() for stage in stages.values()}
        names = dict.fromkeys([*kinds, DENSE, FINAL, CONTROL_SCRATCH, CONTROL_RANDOM])
        # The sort is stable.
        return sorted(names, key=lambda name: places.get(name, 5 if kinds.get(name) == "control" else 2))

    def first(self, name: str) -> Stage | None:
        """The stage whose sizes and times are shown: that of the first seed that has it."""
        return next((stages[name] for stages in self.seeds.values() if name in stages), None)

    @property
    def dense(self) -> Stage:
        """The first seed's dense stage."""
        return next(iter(self.seeds.values()))[DENSE]

    def baseline(self, name: str) -> Stage:
        """The dense stage of the same seed as in `first`."""
        return next((stages[DENSE] for stages in self.seeds.values() if name in stages), self.dense)

    def claim(self, name: str) -> str:
        """What may be said about a stage; see `claim_of`."""
        stage = self.first(name)
        return NOT_RUN if stage is None else claim_of(self.baseline(name), stage)

    def scores(self, name: str, metric: str | None = None) -> list[float]:
        """A stage's scores, one for each seed that has it."""
        metric = metric or self.metric
        stages = (stages[name] for stages in self.seeds.values() if name in stages)
        return [stage.scores[metric] for stage in stages if metric in stage.scores]

    def differences(self, name: str) -> list[float]:
        """A stage's scores minus those of the dense network of the same seed."""
        pairs = ((stages[name], stages[DENSE]) for stages in self.seeds.values() if name in stages)
        return [stage.scores[self.metric] - dense.scores[self.metric] for stage, dense in pairs]

    def batch_sizes(self) -> list[int]:
        """The batch sizes at which time was measured, ascending."""
        stages = (stage for stages in self.seeds.values() for stage in stages.values())
        return sorted({row.batch for stage in stages for row in stage.latency})

    @property
    def tells_epochs(self) -> bool:
        """Whether any stage says for how long it was trained; reports of earlier versions do not."""
        return any(stage.epochs is not None for stages in self.seeds.values() for stage in stages.values())
