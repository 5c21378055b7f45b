"""Directions of gaze and rotations of the head as pitch and yaw, against matrices and arc sines."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from distill_lightning import InputError
from distill_lightning.functional import gaze_angle, gaze_to_angles, pose_to_angles


def draw(count, seed=0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_gaze(vector):
    x, y, z = (value / math.sqrt(sum(v * v for v in vector)) for value in vector)
    return [math.asin(-y), math.atan2(-x, -z)]


def naive_pose(vector):
    x, y, z = Rotation.from_rotvec(vector).as_matrix()[:, 2].tolist()
    return [math.asin(max(-1.0, min(1.0, y))), math.atan2(x, z)]


@pytest.mark.parametrize(("ours", "naive"), [(gaze_to_angles, naive_gaze), (pose_to_angles, naive_pose)])
def test_angles_are_those_of_the_loop(ours, naive):
    vectors = torch.cat([draw(200), 0.1 * draw(50, seed=1), 3 * draw(50, seed=2)])
    expected = torch.tensor([naive(vector) for vector in vectors.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ours(vectors), expected, rtol=1e-7, atol=1e-7)


def test_small_and_whole_rotations_have_their_angles():
    vectors = torch.tensor([[0, 0, 0], [1e-9, 0, 0], [0, 1e-9, 0], [0, math.pi, 0], [0, 0, 2.0], [0, 2 * math.pi, 0]])
    angles = pose_to_angles(vectors.double())
    expected = [[0, 0], [-1e-9, 0], [0, 1e-9], [0, math.pi], [0, 0], [0, 0]]
    # The angle of a turn by pi has no sign.
    angles[3, 1] = angles[3, 1].abs()
    assert (angles - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-6
    assert float(angles[1, 0]) == pytest.approx(-1e-9, rel=1e-6)


def test_angles_give_the_direction_back():
    """The metric makes vectors of them by the same convention."""
    gaze = torch.nn.functional.normalize(draw(100), dim=1)
    pitch, yaw = gaze_to_angles(gaze).T
    again = torch.stack([-pitch.cos() * yaw.sin(), -pitch.sin(), -pitch.cos() * yaw.cos()], dim=1)
    torch.testing.assert_close(again, gaze, rtol=1e-9, atol=1e-9)
    other = draw(100, seed=1)
    cosine = torch.nn.functional.cosine_similarity(gaze, other)
    torch.testing.assert_close(gaze_angle(gaze_to_angles(gaze), gaze_to_angles(other)).cos(), cosine)


def test_a_mirrored_face_has_the_opposite_yaws():
    vectors = draw(50)
    turned = torch.tensor([1.0, -1.0])
    torch.testing.assert_close(gaze_to_angles(vectors * torch.tensor([-1, 1, 1])), gaze_to_angles(vectors) * turned)
    # Of a rotation, the axis is mirrored as a pseudovector: what turns to the left turns to the right.
    torch.testing.assert_close(pose_to_angles(vectors * torch.tensor([1, -1, -1])), pose_to_angles(vectors) * turned)


@pytest.mark.parametrize("function", [gaze_to_angles, pose_to_angles])
def test_half_precision_is_kept_wide_and_other_shapes_are_refused(function):
    vectors = draw(5)
    assert function(vectors.half()).dtype == torch.float32
    for wrong in (vectors[0], vectors[:, :2], vectors[None]):
        with pytest.raises(InputError, match=r"are \(N, 3\), got"):
            function(wrong)
