"""Directions of gaze and poses of the head as angles, in the camera's coordinates.

There ``x`` points to the image's right, ``y`` down and ``z`` away from the camera, which a face looks against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_lightning.errors import InputError
from distill_lightning.functional.common import wide


def gaze_to_angles(gaze: Tensor) -> Tensor:
    r"""Pitch and yaw of directions of gaze, the inverse of what `gaze_angle` makes vectors by.

    .. math:: p = \mathrm{atan2}\left(-g_y, \sqrt{g_x^2 + g_z^2}\right), \qquad y = \mathrm{atan2}(-g_x, -g_z)

    For a unit vector :math:`p = \arcsin(-g_y)`, as MPIIGaze is usually read; the length does not matter here. A gaze
    into the camera is 0, upwards positive in pitch, to the image's left positive in yaw.

    Args:
        gaze: vectors :math:`(g_x, g_y, g_z)` from the eye to what is looked at, ``(N, 3)``.

    Returns:
        Radians ``(N, 2)``, pitch and yaw, in float32 or wider.

    Raises:
        InputError: they are not ``(N, 3)``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import gaze_to_angles
        >>> gaze_to_angles(tensor([[-0.36, -0.48, -0.8]]))
        tensor([[0.5007, 0.4229]])
    """
    x, y, z = _three("directions of gaze", gaze)
    return torch.stack([torch.atan2(-y, torch.hypot(x, z)), torch.atan2(-x, -z)], dim=1)


def pose_to_angles(rotation: Tensor) -> Tensor:
    r"""Pitch and yaw of heads whose rotation is given as a rotation vector (axis times angle, Rodrigues).

    .. math:: z = \exp([r]_\times) \, e_3 = \cos\theta \, e_3 + \frac{\sin\theta}{\theta} \, r \times e_3
        + \frac{1 - \cos\theta}{\theta^2} \, r_3 \, r, \qquad \theta = \lVert r \rVert

    .. math:: p = \mathrm{atan2}\left(z_y, \sqrt{z_x^2 + z_z^2}\right) = \arcsin z_y, \qquad
        y = \mathrm{atan2}(z_x, z_z)

    ``z`` is the third column of the rotation matrix: where the head's own ``z`` axis points, out of the back of it.

    Args:
        rotation: ``r`` in radians, ``(N, 3)``.

    Returns:
        Radians ``(N, 2)``, pitch and yaw, in float32 or wider.

    Raises:
        InputError: they are not ``(N, 3)``.

    Example:
        >>> from torch import tensor
        >>> from distill_lightning.functional import pose_to_angles
        >>> pose_to_angles(tensor([[0.0, 0.5, 0.0], [-0.25, 0.0, 0.0]]))
        tensor([[0.0000, 0.5000],
                [0.2500, 0.0000]])
    """
    x, y, z = _three("rotations of the head", rotation)
    angle = torch.sqrt(x.square() + y.square() + z.square())
    # sinc(t) is sin(pi t) / (pi t), and 1 at 0.
    sine = torch.sinc(angle / torch.pi)
    versine = torch.sinc(angle / (2 * torch.pi)).square() / 2
    out_x, out_y, out_z = sine * y + versine * x * z, versine * y * z - sine * x, angle.cos() + versine * z.square()
    return torch.stack([torch.atan2(out_y, torch.hypot(out_x, out_z)), torch.atan2(out_x, out_z)], dim=1)


def _three(what: str, vectors: Tensor) -> tuple[Tensor, ...]:
    if vectors.ndim != 2 or vectors.shape[1] != 3:
        raise InputError(f"{what} are (N, 3), got {tuple(vectors.shape)}: reshape them")
    return wide(vectors).unbind(dim=1)
