"""Quantizers for training, as functions: LSQ, PACT, DoReFa, binary and ternary weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distill_lightning.compression.values.ranges import RangeRule, weight_grid
from distill_lightning.compression.values.scheme import (
    Codes,
    Scheme,
    as_codes,
    cut_groups,
    from_rows,
    over_entries,
    quantize,
    to_rows,
)
from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide


def round_straight_through(values: Tensor) -> Tensor:
    """The nearest integers, with the gradient of the identity."""
    # Exact: an integer and the value that was rounded to it are so close that their difference is a float.
    return values + (values.round() - values).detach()


class _SignStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values.abs() <= 1)
        return _sign(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        inside: Tensor = ctx.saved_tensors[0]
        return gradients[0] * inside


def _sign(values: Tensor) -> Tensor:
    """The sign, with 1 for zero, so that there are only two values."""
    return torch.where(values >= 0, torch.ones_like(values), -1)


# LSQ


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        scale: Tensor
        values, scale, low, high, factor = given
        steps = values / scale
        rounded: Tensor = steps.clamp(low, high).round()
        inside = (steps > low) & (steps < high)
        ctx.save_for_backward(inside, torch.where(inside, rounded - steps, rounded))
        ctx.factor, ctx.shape = factor, scale.shape
        return (rounded + 0.0) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        inside, slope = ctx.saved_tensors
        of_scale = (gradients[0] * slope).sum_to_size(ctx.shape) * ctx.factor
        return gradients[0] * inside, of_scale, None, None, None


def lsq(
    tensor: Tensor, scale: Tensor, scheme: Scheme, *, zero_point: Tensor | None = None, factor: float | None = None
) -> Tensor:
    r"""Learned step size quantization.

    .. math:: \hat v = s \lfloor \mathrm{clip}(v / s, -Q_N, Q_P) \rceil, \qquad
        \frac{\partial \hat v}{\partial s} = \begin{cases} \lfloor v / s \rceil - v / s & -Q_N < v / s < Q_P \\
        -Q_N & v / s \le -Q_N \\ Q_P & v / s \ge Q_P \end{cases}

    As in the paper, the tensor is clipped before it is rounded, so values up to half a step beyond the last level count
    as clipped; PyTorch's learnable fake quantization counts them as inside. A symmetric scheme has
    :math:`Q_N = Q_P`, one level less than the paper.

    Args:
        tensor: a tensor of any shape.
        scale: the positive scales, ``(R, G)``.
        scheme: a uniform scheme.
        zero_point: integers ``(R, G)`` that shift :math:`Q_N` and :math:`Q_P`; ``None`` for zeros.
        factor: the factor of the scale's gradient; ``None`` for the paper's ``1 / sqrt(N * Q_P)``, with ``N`` entries
            per scale.

    Esser, McKinstry, Bablani, Appuswamy, Modha: *Learned Step Size Quantization*, https://arxiv.org/abs/1902.08153
    """
    rows = to_rows(wide(tensor), scheme)
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    factor = 1 / math.sqrt(rows.numel() / scale.numel() * scheme.highest) if factor is None else factor
    of_entries, shift = (over_entries(part, rows.shape[1], scheme) for part in (scale, zero_point))
    levels: Tensor = _LSQ.apply(rows, of_entries, scheme.lowest - shift, scheme.highest - shift, factor)
    return from_rows(levels, tensor.shape, scheme).to(tensor.dtype)


def lsq_start(weight: Tensor, scheme: Scheme) -> Tensor:
    r"""The paper's initial scale, :math:`2 \langle |v| \rangle / \sqrt{Q_P}`, ``(R, G)``."""
    start = 2 * _group_means(to_rows(wide(weight.detach()), scheme).abs(), scheme) / math.sqrt(scheme.highest)
    return torch.where(start > 0, start, 1)


# PACT and DoReFa


class _Pact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, alpha: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward((values > 0) & (values < alpha), values >= alpha)
        ctx.shape = alpha.shape
        scale = alpha / levels
        return (torch.minimum(values.clamp_min(0), alpha) / scale).round() * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        inside, above = ctx.saved_tensors
        return gradients[0] * inside, (gradients[0] * above).sum_to_size(ctx.shape), None


def pact(activations: Tensor, alpha: Tensor, *, bits: int) -> Tensor:
    r"""PACT: activations clipped at a learned threshold and quantized below it.

    .. math:: y = \mathrm{clip}(x, 0, \alpha), \qquad y_q = \lfloor y (2^k - 1) / \alpha \rceil \alpha / (2^k - 1)

    The gradient of :math:`\alpha` is 1 where :math:`x \ge \alpha` and 0 elsewhere; that of :math:`x` is 1 in between.
    The paper's L2 penalty on :math:`\alpha` is weight decay of this parameter.

    Args:
        activations: a tensor of any shape.
        alpha: the threshold, a positive scalar.
        bits: bits of an activation.

    Choi, Wang, Venkataramani, Chuang, Srinivasan, Gopalakrishnan: *PACT*, https://arxiv.org/abs/1805.06085
    """
    result: Tensor = _Pact.apply(wide(activations), alpha, 2**bits - 1)
    return result.to(activations.dtype)


def dorefa_activation(activations: Tensor, *, bits: int) -> Tensor:
    """DoReFa: activations clipped to [0, 1], and rounded to ``2 ** bits`` levels; straight-through inside.

    Zhou, Wu, Ni, Zhou, Wen, Zou: *DoReFa-Net*, https://arxiv.org/abs/1606.06160
    """
    values, levels = wide(activations), 2**bits - 1
    steps = round_straight_through(values.clamp(0, 1) * levels)
    return (steps * values.new_full((), 1 / levels)).to(activations.dtype)


def dorefa_weight(weight: Tensor, *, bits: int) -> Tensor:
    r"""DoReFa: weights squashed by tanh, and rounded to ``2 ** bits`` levels from -1 to 1, none of which is zero.

    .. math:: 2\, \mathrm{quantize}_k \Big( \frac{\tanh w}{2 \max |\tanh w|} + \frac{1}{2} \Big) - 1

    Only the rounding is straight-through; the rest has its true gradient.
    """
    steps, scale, zero_point = _dorefa_steps(weight, bits)
    return ((round_straight_through(steps) - zero_point) * scale).to(weight.dtype)


def _dorefa_steps(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    levels = 2**bits - 1
    squeezed = wide(weight).tanh()
    reach = squeezed.abs().max().clamp_min(torch.finfo(squeezed.dtype).tiny)
    one = squeezed.new_ones(1, 1)
    # Divided twice: half of the smallest float would be zero.
    return (squeezed / reach / 2 + 0.5) * levels, one * 2 / levels, one * levels / 2


# Binary and ternary


def binary(weight: Tensor, scheme: Scheme) -> Tensor:
    r"""Binary-Weight-Networks: :math:`\alpha\, \mathrm{sign}(w)`, with :math:`\alpha = \langle |w| \rangle` by row.

    This :math:`\alpha` has the least squared error. It keeps its own gradient; the gradient of the sign is 1 where
    :math:`|w| \le 1`.

    Rastegari, Ordonez, Redmon, Farhadi: *XNOR-Net*, https://arxiv.org/abs/1603.05279
    """
    rows = to_rows(wide(weight), scheme)
    alpha = over_entries(_group_means(rows.abs(), scheme), rows.shape[1], scheme)
    signs: Tensor = _SignStraightThrough.apply(rows)
    return from_rows(signs * alpha, weight.shape, scheme).to(weight.dtype)


def binary_connect(weight: Tensor) -> Tensor:
    r"""BinaryConnect: the weight's sign, with a straight-through gradient where :math:`|w| \le 1`.

    The paper clips the weights to this range after every step.

    Courbariaux, Bengio, David: *BinaryConnect*, https://arxiv.org/abs/1511.00363
    """
    signs: Tensor = _SignStraightThrough.apply(weight)
    return signs


class _Ternary(torch.autograd.Function):
    """Values for the positive and the negative code; the gradients are those of TTQ."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, up: Tensor, down: Tensor, threshold: Tensor) -> Tensor:
        above, below = values > threshold, values < -threshold
        ctx.save_for_backward(above, below, up, down)
        return torch.where(above, up, torch.where(below, -down, torch.zeros_like(values)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        above, below, up, down = ctx.saved_tensors
        gradient = gradients[0]
        of_values = torch.where(above, up * gradient, torch.where(below, down * gradient, gradient))
        return (
            of_values,
            (gradient * above).sum_to_size(up.shape),
            -(gradient * below).sum_to_size(down.shape),
            None,
        )


def ternary(weight: Tensor, scheme: Scheme) -> Tensor:
    r"""Ternary weight networks: :math:`-\alpha, 0, \alpha`.

    The threshold is :math:`0.7 \langle |w| \rangle` of each row; :math:`\alpha` is the mean absolute value of the
    weights beyond it, which is optimal for them. The weights get the gradient of their quantized values, as in the
    paper.

    Li, Zhang, Liu: *Ternary Weight Networks*, https://arxiv.org/abs/1605.04711
    """
    rows = to_rows(wide(weight), scheme)
    steps, alpha = _ternary_steps(rows.detach(), scheme)
    levels = steps * over_entries(alpha, rows.shape[1], scheme)
    result = from_rows(levels, weight.shape, scheme).to(weight.dtype)
    return _replaced(weight, result)


def _replaced(values: Tensor, other: Tensor) -> Tensor:
    """Other values, exactly, with the gradient of the identity."""
    # A zero that carries the gradient; adding it does not change the values.
    return other.detach() + (values - values.detach())


def _ternary_steps(rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    magnitudes = rows.abs()
    threshold = 0.7 * over_entries(_group_means(magnitudes, scheme), rows.shape[1], scheme)
    beyond = magnitudes > threshold
    survives = beyond.to(rows.dtype)
    kept = _group_means(survives, scheme)
    alpha = _group_means(magnitudes * survives, scheme) / torch.where(kept > 0, kept, 1)
    return torch.where(beyond, rows.sign(), 0), torch.where(alpha > 0, alpha, 1)


def ttq(weight: Tensor, positive: Tensor, negative: Tensor, *, threshold: float = 0.05) -> Tensor:
    r"""Trained ternary quantization: :math:`-W_n, 0, W_p`, both learned.

    The threshold is this fraction of the largest absolute weight. :math:`W_p` gets the sum of the gradients of the
    weights above it, :math:`W_n` minus the sum for those below; a weight gets its gradient times :math:`W_p`, 1 or
    :math:`W_n`.

    Args:
        weight: any shape.
        positive: :math:`W_p`, a scalar.
        negative: :math:`W_n`, a scalar.
        threshold: the fraction.

    Zhu, Han, Mao, Dally: *Trained Ternary Quantization*, https://arxiv.org/abs/1612.01064
    """
    values = wide(weight)
    result: Tensor = _Ternary.apply(values, positive, negative, threshold * values.detach().abs().max())
    return result.to(weight.dtype)


def ttq_start(weight: Tensor, *, threshold: float = 0.05) -> tuple[Tensor, Tensor]:
    """The initial scales: the mean absolute value of the weights above the threshold, and of those below."""
    values = wide(weight.detach())
    limit = threshold * values.abs().max()
    means = []
    for chosen in (values > limit, values < -limit):
        mean = (values.abs() * chosen).sum() / chosen.sum().clamp_min(1)
        means.append(torch.where(mean > 0, mean, 1))
    return means[0], means[1]


# Codes


def codes(weight: Tensor, scheme: Scheme, *, rule: RangeRule = "minmax") -> Codes:
    """The codes of a weight; `dequantize` of them equals the function of the scheme's kind, bit for bit.

    Args:
        weight: any shape.
        scheme: a scheme of any kind but ``"ttq"``, whose scales are learned (see `ttq_codes`). For a learned or fixed
            grid of the uniform kinds, use `quantize`.
        rule: for the uniform kinds, see `find_range`.

    Raises:
        InputError: the kind is ``"ttq"``; or the weight has no range.
    """
    if scheme.kind == "ttq":
        raise InputError("the scales of kind='ttq' are learned: use ttq_codes(weight, positive, negative)")
    if scheme.kind in ("symmetric", "affine", "pow2"):
        return quantize(weight, *weight_grid(weight, scheme, rule=rule), scheme)
    weight = weight.detach()
    if scheme.kind == "dorefa":
        steps, scale, zero_point = _dorefa_steps(weight, scheme.bits)
        return Codes(as_codes(steps.round(), scheme), scale, zero_point)
    rows = to_rows(wide(weight), scheme)
    if scheme.kind == "ternary":
        steps, alpha = _ternary_steps(rows, scheme)
        return Codes(as_codes(from_rows(steps, weight.shape, scheme), scheme), alpha, torch.zeros_like(alpha))
    alpha = _group_means(rows.abs(), scheme) if scheme.kind == "binary" else rows.new_ones(1, 1)
    return Codes(as_codes(weight >= 0, scheme), 2 * alpha, torch.full_like(alpha, 0.5))


def ttq_codes(weight: Tensor, positive: Tensor, negative: Tensor, *, threshold: float = 0.05) -> Codes:
    """The codes -1, 0 and 1 of what `ttq` makes of a weight."""
    values = wide(weight.detach())
    limit = threshold * values.abs().max()
    steps = (values > limit).to(torch.int8) - (values < -limit).to(torch.int8)
    scales = torch.stack([positive.detach(), negative.detach()]).reshape(2, 1).to(values.dtype)
    return Codes(steps, scales, torch.zeros_like(scales))


def _group_means(rows: Tensor, scheme: Scheme) -> Tensor:
    """The mean of every group, ``(R, G)``."""
    return torch.cat([part.mean(dim=1).reshape(len(rows), -1) for part in cut_groups(rows, scheme)], dim=1)
