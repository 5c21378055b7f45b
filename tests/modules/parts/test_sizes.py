"""How features of different sizes are brought together."""

import pytest
import torch
from torch.nn import functional as F

from distill_lightning import EqualSizes, InputError, PooledSize, StudentSize, TeacherSize
from distill_lightning.modules.parts.sizes import channels_of, grid_of, resized

SMALL, LARGE = torch.rand(2, 3, 2, 2), torch.rand(2, 5, 4, 4)


@pytest.mark.parametrize(
    ("shape", "grid", "channels"), [((2, 3, 4, 5), (4, 5), 3), ((2, 7, 3), (7,), 3), ((2, 3), (), 3)]
)
def test_grid_and_channels_of_maps_tokens_and_vectors(shape, grid, channels):
    assert (grid_of(shape), channels_of(shape)) == (grid, channels)


def test_a_map_is_averaged_down_and_interpolated_up():
    means = LARGE.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean(dim=(3, 5))
    assert torch.allclose(resized(LARGE, (2, 2)), means)
    assert torch.equal(resized(SMALL, (4, 4)), F.interpolate(SMALL, (4, 4), mode="bilinear", align_corners=False))
    assert resized(LARGE, (2, 6)).shape == (2, 5, 2, 6)


def test_equal_sizes_stay_and_others_are_refused():
    one, other = EqualSizes()(SMALL, LARGE[:, :, :2, :2])
    assert one is SMALL
    assert other.shape == (2, 5, 2, 2)
    with pytest.raises(InputError, match="tap layers of the same spatial size, or set sizes: TeacherSize or StudentSi"):
        EqualSizes()(SMALL, LARGE)


@pytest.mark.parametrize(("student", "teacher"), [(SMALL, LARGE), (LARGE, SMALL)])
def test_one_side_comes_to_the_others_size(student, teacher):
    one, other = TeacherSize()(student, teacher)
    assert torch.equal(one, resized(student, teacher.shape[2:]))
    assert other is teacher
    one, other = StudentSize()(student, teacher)
    assert one is student
    assert torch.equal(other, resized(teacher, student.shape[2:]))


@pytest.mark.parametrize("sizes", [TeacherSize(), StudentSize()])
def test_what_has_one_size_stays_and_tokens_of_two_are_refused(sizes):
    tokens = torch.rand(2, 7, 3)
    assert sizes(tokens, tokens) == (tokens, tokens)
    sizes.check((2, 3, 2, 2), (2, 5, 4, 4), "here")
    with pytest.raises(InputError, match="here: tap layers"):
        sizes.check((2, 7, 3), (2, 8, 3), "here")


def test_a_pooled_size_pools_the_student_and_leaves_the_pooled_teacher():
    one, other = PooledSize(2)(LARGE, SMALL)
    assert torch.equal(one, F.adaptive_avg_pool2d(LARGE, 2))
    assert other is SMALL
    with pytest.raises(InputError, match=r"here: PooledSize\(3\) needs .* the teacher's is \(3, 2, 2\): lower it"):
        PooledSize(3).check(LARGE.shape, SMALL.shape, "here")
