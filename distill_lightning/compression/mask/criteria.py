"""Pruning criteria: scores of parameters, of which the lowest are pruned.

Each function takes a network and the paths of some parameters, leaves the network as it was, and returns for each path
a detached tensor of the parameter's shape. Those with calibration data run the network in eval mode, unless they say
otherwise. `second_order` has the criteria of single layers, `learned` the masks that are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from distill_lightning.compression.access.calibration import Batches, Loss, gradients
from distill_lightning.compression.access.parameters import parameters_of
from distill_lightning.errors import InputError

Scores = dict[str, Tensor]


def magnitude(network: nn.Module, paths: Iterable[str]) -> Scores:
    """The absolute values of the weights."""
    return {path: parameter.detach().abs() for path, parameter in parameters_of(network, paths).items()}


def random(network: nn.Module, paths: Iterable[str], *, seed: int) -> Scores:
    """Random scores, uniform on ``[0, 1)``: the control that every criterion has to beat.

    A parameter's scores depend on those before it. The generator is separate, so the global random state stays as it
    is.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        # Drawn on the CPU, so that every device gets the same scores.
        path: torch.rand(parameter.shape, generator=generator, dtype=torch.float64).to(
            parameter.device, parameter.dtype
        )
        for path, parameter in parameters_of(network, paths).items()
    }


def gradient(network: nn.Module, paths: Iterable[str], batches: Batches, loss: Loss) -> Scores:
    r"""The absolute gradient of each batch, averaged over the batches: :math:`|g|`."""
    return _mean(gradients(network, paths, batches, loss), lambda _, grad: grad.abs())


def taylor(network: nn.Module, paths: Iterable[str], batches: Batches, loss: Loss) -> Scores:
    r"""The first-order change of each batch's loss without the weight, averaged over the batches: :math:`|g w|`.

    The absolute value is taken for each batch, because the gradient of a trained network vanishes over all of them.

    Molchanov, Tyree, Karras, Aila, Kautz: *Pruning Convolutional Neural Networks for Resource Efficient Inference*,
    https://arxiv.org/abs/1611.06440
    """
    weights = parameters_of(network, paths)
    return _mean(gradients(network, weights, batches, loss), lambda path, grad: (grad * weights[path].detach()).abs())


def obd(network: nn.Module, paths: Iterable[str], batches: Batches, loss: Loss) -> Scores:
    r"""Optimal Brain Damage: the second-order rise of the loss without the weight, :math:`\tfrac12 h w^2`.

    The curvature :math:`h` is the diagonal of the empirical Fisher matrix: the mean of the squared gradients of the
    samples. Every sample has a backward pass of its own, so use a few hundred samples. The loss is a mean over the
    samples, and so the loss of one sample if it is given one.

    LeCun, Denker, Solla: *Optimal Brain Damage*, NIPS 1989
    """
    weights = parameters_of(network, paths)
    fisher = _mean(gradients(network, weights, batches, loss, each=True), lambda _, grad: grad.square())
    return {path: weight.detach().square() * fisher[path] / 2 for path, weight in weights.items()}


def snip(network: nn.Module, paths: Iterable[str], batches: Batches, loss: Loss) -> Scores:
    r"""Connection sensitivity before training: :math:`|g w|` over all the data, as a share of the sum over all paths.

    The network runs in train mode, because BatchNorm has no statistics yet; it is left as it was. The paper takes one
    batch of about ten samples a class.

    Lee, Ajanthan, Torr: *SNIP: Single-shot Network Pruning based on Connection Sensitivity*,
    https://arxiv.org/abs/1810.02340
    """
    weights = parameters_of(network, paths)
    mean = _mean(gradients(network, weights, batches, loss, training=True), lambda _, grad: grad)
    scores = {path: (grad * weights[path].detach()).abs() for path, grad in mean.items()}
    total = torch.stack([score.sum() for score in scores.values()]).sum()
    if total == 0:
        raise InputError(f"snip: the loss depends on none of {', '.join(scores)}: is the network detached somewhere?")
    return {path: score / total for path, score in scores.items()}


def _mean(found: Iterable[tuple[Scores, int]], value: Callable[[str, Tensor], Tensor]) -> Scores:
    """The mean of a function of path and gradient over the batches, weighted by their numbers of samples."""
    totals: Scores = {}
    count = 0
    for grads, samples in found:
        for path, grad in grads.items():
            term = value(path, grad) * samples
            totals[path] = totals[path] + term if path in totals else term
        count += samples
    return {path: total / count for path, total in totals.items()}
