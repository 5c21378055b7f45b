"""Objects that a module calls at certain moments of a training."""

from __future__ import annotations

from typing import Any


class Part:
    """An attribute of a `DistillationModule` which the module calls at certain moments of a training.

    Every moment does nothing here; a part defines those that it needs. Parts are called in the order in which they
    became attributes, from the module's own hooks, so after the Trainer's callbacks.

    Example:
        >>> from distill_lightning import SmallCNN, SupervisedModule
        >>> from distill_lightning.part import Part
        >>> class StepCount(Part):
        ...     def joined(self, module):
        ...         self.steps = 0
        ...
        ...     def step_ends(self, module):
        ...         self.steps += 1
        >>> module = SupervisedModule(SmallCNN(num_classes=10), num_classes=10)
        >>> module.count = StepCount()
        >>> module.count.steps
        0
    """

    def joined(self, module: Any) -> None:
        """The part became an attribute of ``module``."""

    def fit_starts(self, module: Any) -> None:
        """``fit`` starts; nothing is loaded yet of what a checkpoint holds of the Trainer."""

    def training_starts(self, module: Any) -> None:
        """Training starts; data, optimiser and checkpoint are there."""

    def epoch_starts(self, module: Any) -> None:
        """A training epoch starts."""

    def batch_starts(self, module: Any) -> None:
        """A training batch has arrived."""

    def step_ends(self, module: Any) -> None:
        """The optimiser has made a step."""

    def batch_ends(self, module: Any) -> None:
        """A training batch is done."""

    def validation_starts(self, module: Any) -> None:
        """A validation starts, in ``fit`` or alone."""

    def test_starts(self, module: Any) -> None:
        """A test starts."""

    def epoch_ends(self, module: Any) -> None:
        """A training epoch ends."""

    def fit_ends(self, module: Any) -> None:
        """``fit`` ends."""

    def state_dict(self) -> dict[str, Any] | None:
        """Tensors and plain values from which a resumed training goes on; ``None``: there is nothing to keep."""
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
