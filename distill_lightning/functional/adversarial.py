"""The loss of a discriminator, and the reversal of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill_lightning.errors import InputError
from distill_lightning.functional.common import same_shape, wide
from distill_lightning.functional.mean import counted_mean


def discriminator_loss(student_scores: Tensor, teacher_scores: Tensor, counted: Tensor | None = None) -> Tensor:
    r"""Binary cross entropy of a discriminator with two outputs, "student" and "teacher".

    .. math:: -\frac{1}{4N} \sum_i \left[ \log \sigma(a_{i0}) + \log \sigma(-a_{i1})
        + \log \sigma(-b_{i0}) + \log \sigma(b_{i1}) \right]

    with the scores :math:`a` of the student's rows, whose target is ``(1, 0)``, and :math:`b` of the teachers', whose
    target is ``(0, 1)``. Scores of zero cost ``ln 2 = 0.693``; scores that cannot be negative, such as those of
    MEAL V2's official discriminator, cost at least ``ln(2) / 2 = 0.347``.

    Args:
        student_scores: ``(N, 2)``, before the sigmoid.
        teacher_scores: ``(N, 2)``, before the sigmoid.
        counted: which of the ``N`` samples count, bool ``(N,)``; ``None``: all.

    Returns:
        A scalar in nats: mean over the ``2 N`` rows, or those of samples that count, and both outputs.

    Raises:
        InputError: the scores do not have this shape.

    Example:
        >>> import torch
        >>> from distill_lightning.functional import discriminator_loss
        >>> undecided = torch.zeros(4, 2)
        >>> discriminator_loss(undecided, undecided)
        tensor(0.6931)
        >>> student, teacher = torch.tensor([[4.0, -4.0]]), torch.tensor([[-4.0, 4.0]])
        >>> discriminator_loss(student, teacher)
        tensor(0.0181)

    Shen, Savvides: *MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks*,
    https://arxiv.org/abs/2009.08453
    """
    same_shape("discriminator_loss", student_scores, teacher_scores)
    if student_scores.ndim != 2 or student_scores.shape[1] != 2:
        raise InputError(f"discriminator_loss needs scores of shape (N, 2), got {tuple(student_scores.shape)}")
    student, teacher = wide(student_scores), wide(teacher_scores)
    # Columns and signs instead of a tensor of targets: nothing has to travel to the device.
    right = torch.stack([student[:, 0], -student[:, 1], -teacher[:, 0], teacher[:, 1]])
    losses = -F.logsigmoid(right)
    return losses.mean() if counted is None else counted_mean(losses.mean(dim=0), counted)


def reverse_gradient(tensor: Tensor, scale: float = 1.0) -> Tensor:
    r"""The identity in the forward pass, which multiplies the gradient with ``-scale`` in the backward pass.

    A loss that is computed from the result is minimised by the layers after this function and maximised by the layers
    before it, in one backward pass and with one optimiser.

    Args:
        tensor: a tensor of any shape.
        scale: :math:`\lambda`, the factor without its sign.

    Returns:
        ``tensor``, of the same shape.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import reverse_gradient
        >>> weight = tensor([1.0, 2.0], requires_grad=True)
        >>> reverse_gradient(weight, scale=0.5).sum().backward()
        >>> weight.grad
        tensor([-0.5000, -0.5000])

    Ganin, Lempitsky: *Unsupervised Domain Adaptation by Backpropagation*, https://arxiv.org/abs/1409.7495
    """
    reversed_: Tensor = _ReverseGradient.apply(tensor, scale)
    return reversed_


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return -ctx.scale * gradients[0], None
