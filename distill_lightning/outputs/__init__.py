"""What an output of a network means, and the metrics that judge it."""

from distill_lightning.errors import InputError
from distill_lightning.outputs.boxes import Boxes
from distill_lightning.outputs.categorical import Categorical
from distill_lightning.outputs.gaussian import Gaussian
from distill_lightning.outputs.output import Output
from distill_lightning.outputs.tokens import Tokens

__all__ = ["Boxes", "Categorical", "Gaussian", "Output", "Tokens", "output_of"]


def output_of(who: str, num_classes: int | None, num_targets: int | None) -> Output:
    """`Categorical` of a number of classes, or `Gaussian` of a number of targets.

    Args:
        who: what the message begins with.
        num_classes: ``K``, or ``None``.
        num_targets: ``d``, or ``None``.

    Raises:
        InputError: a number that cannot be used, or none or both of them are given.

    Example:
        >>> from distill_lightning.outputs import output_of
        >>> output_of("KDModule", 10, None).num_classes
        10
        >>> output_of("KDModule", None, 3).num_targets
        3
    """
    if (num_classes is None) == (num_targets is None):
        raise InputError(
            f"{who} needs either num_classes (a classifier) or num_targets (a regression): set "
            "model.init_args.num_classes, or give the data module the attributes num_classes and input_shape"
        )
    return Categorical(num_classes) if num_classes is not None else Gaussian(num_targets or 0)
