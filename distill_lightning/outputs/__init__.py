"""What an output of a network means, and the metrics that judge it."""

from distill_lightning.errors import InputError
from distill_lightning.outputs.categorical import Categorical
from distill_lightning.outputs.gaussian import Gaussian
from distill_lightning.outputs.output import Output

__all__ = ["Categorical", "Gaussian", "Output", "output_of"]


def output_of(num_classes: int | None, num_targets: int | None) -> Output:
    """`Categorical` of a number of classes, or `Gaussian` of a number of targets.

    Raises:
        InputError: a number that cannot be used, or not one of both is given.
    """
    if (num_classes is None) == (num_targets is None):
        raise InputError("needs either num_classes (a classifier) or num_targets (a regression)")
    return Categorical(num_classes) if num_classes is not None else Gaussian(num_targets or 0)
