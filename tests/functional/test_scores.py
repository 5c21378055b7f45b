"""Gap reduction, the angle of gaze, and agreement by chance."""

import math

import numpy as np
import pytest
import torch

from distill_lightning import InputError
from distill_lightning.functional import chance_agreement, gap_reduction, gaze_angle

# chance_agreement


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_chance_agreement_is_the_mean_over_all_pairs_of_samples(classes):
    first, second = torch.randint(classes, (23,)), torch.randint(classes, (23,))
    pairs = [float(a == b) for a in first for b in second]
    assert chance_agreement(first, second).item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-6)


def test_chance_agreement_depends_on_no_order_and_not_on_which_is_first():
    first, second = torch.tensor([0, 0, 3, 1]), torch.tensor([3, 0, 3, 2])
    expected = chance_agreement(first, second)
    assert chance_agreement(second, first) == expected
    assert chance_agreement(first.flip(0), second) == expected


def test_chance_agreement_of_nothing_is_no_number_and_of_other_shapes_refused():
    assert chance_agreement(torch.zeros(0).long(), torch.zeros(0).long()).isnan()
    with pytest.raises(InputError, match="labellings"):
        chance_agreement(torch.zeros(2).long(), torch.zeros(3).long())


# gap_reduction


def test_the_accuracy_form_and_the_error_form_agree():
    # The specification's two forms, for accuracies and for the errors that belong to them.
    for kd, teacher, student in ((0.72, 0.80, 0.76), (0.5, 0.9, 0.45), (0.9, 0.7, 0.8), (0.60, 0.61, 0.63)):
        accuracy_form = (student - kd) / (teacher - kd)
        error_form = ((1 - kd) - (1 - student)) / ((1 - kd) - (1 - teacher))
        assert error_form == pytest.approx(accuracy_form, rel=1e-9)
        assert gap_reduction(student, kd, teacher).item() == pytest.approx(accuracy_form, rel=1e-6)
        assert gap_reduction(1 - student, 1 - kd, 1 - teacher).item() == pytest.approx(error_form, rel=1e-6)


def test_the_gap_is_measured_from_the_baseline_to_the_teacher_and_never_clipped():
    assert gap_reduction(0.7, 0.7, 0.8).item() == 0
    assert gap_reduction(0.8, 0.7, 0.8).item() == 1
    assert gap_reduction(0.6, 0.7, 0.8).item() == pytest.approx(-1)
    assert gap_reduction(1.0, 0.7, 0.8).item() == pytest.approx(3)
    assert gap_reduction(3, 1, 5).item() == 0.5


@pytest.mark.parametrize("score", [0.5, 0.6, 0.4, float("inf")])
def test_without_a_gap_there_is_no_number(score):
    assert gap_reduction(score, 0.5, 0.5).isnan()
    assert gap_reduction(torch.tensor(score), torch.tensor(0.5), torch.tensor(0.5)).isnan()


def test_a_small_gap_of_numbers_keeps_its_digits():
    # In float32 the two would be the same number.
    assert gap_reduction(0.9 + 1e-9, 0.9, 0.9 + 2e-9).item() == pytest.approx(0.5, rel=1e-5)


def test_tensors_of_scores_are_compared_one_by_one():
    scores = torch.tensor([0.6, 0.7, 0.9], dtype=torch.float64)
    result = gap_reduction(scores, torch.tensor([0.5, 0.7, 0.7], dtype=torch.float64), 0.7)
    assert result.tolist() == pytest.approx([0.5, math.nan, math.nan], nan_ok=True)
    assert gap_reduction(scores, 0.5, 0.7).tolist() == pytest.approx([0.5, 1.0, 2.0])
    half = gap_reduction(torch.tensor(0.6, dtype=torch.float16), 0.5, 0.7)
    assert half.dtype == torch.float32


# gaze_angle


def direction(pitch, yaw):
    return np.array([-np.cos(pitch) * np.sin(yaw), -np.sin(pitch), -np.cos(pitch) * np.cos(yaw)])


def gazes(samples, seed=0):
    return (torch.rand(samples, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5) * math.pi


def test_the_angle_is_numpys_arc_cosine():
    first, second = gazes(200), gazes(200, seed=1)
    expected = [
        float(np.arccos(direction(*one) @ direction(*other)))
        for one, other in zip(first.tolist(), second.tolist(), strict=True)
    ]
    assert gaze_angle(first, second).tolist() == pytest.approx(expected, rel=1e-9)


def test_angles_by_hand():
    ahead, up, left, behind = [0.0, 0.0], [math.pi / 2, 0.0], [0.0, math.pi / 2], [0.0, math.pi]
    pairs = [(ahead, up), (ahead, left), (up, left), (ahead, behind), (up, [math.pi / 2, 1.0]), (ahead, [0.3, 0.0])]
    angles = gaze_angle(*(torch.tensor(part) for part in zip(*pairs, strict=True)))
    assert angles.tolist() == pytest.approx([math.pi / 2] * 3 + [math.pi, 0.0, 0.3], abs=1e-6)


def test_equal_directions_have_no_angle_and_no_nan():
    gaze = gazes(200_000).float()
    angles = gaze_angle(gaze, gaze)
    assert torch.isfinite(angles).all()
    assert angles.max().item() < 1e-6


def test_small_angles_are_exact_in_float32():
    # The arc cosine, clamped, is off by up to 7e-4 radians here.
    gaze = gazes(1000).float()
    angles = gaze_angle(gaze, gaze + torch.tensor([1e-4, 0.0]))
    assert angles.tolist() == pytest.approx([1e-4] * 1000, abs=1e-6)


def test_the_angle_is_symmetric_and_keeps_half_precision_wide():
    first, second = gazes(50), gazes(50, seed=1)
    assert torch.allclose(gaze_angle(first, second), gaze_angle(second, first), rtol=1e-12)
    assert gaze_angle(first.half(), second.half()).dtype == torch.float32


@pytest.mark.parametrize(("first", "second"), [((3, 2), (4, 2)), ((3, 3), (3, 3)), ((2,), (2,)), ((1, 2), (3, 2))])
def test_other_shapes_are_refused(first, second):
    with pytest.raises(InputError, match="pitch and yaw in radians; got"):
        gaze_angle(torch.zeros(first), torch.zeros(second))
