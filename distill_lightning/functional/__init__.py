"""Every formula of the package, as a pure function of tensors.

Shapes use the letters of `distill_lightning.data.batch`. Every function says how it reduces; none keeps state.
Probabilities and norms are computed in float32 or wider, whatever the dtype of the inputs and under any autocast.
"""

from distill_lightning.functional.adversarial import discriminator_loss, reverse_gradient
from distill_lightning.functional.calibration import (
    area_under_risk_coverage,
    binned_calibration_error,
    brier_score,
    calibration_bins,
    excess_area_under_risk_coverage,
    expected_calibration_error,
    interval_calibration,
    interval_error,
    interval_hits,
    risk_coverage,
)
from distill_lightning.functional.detection import (
    eleven_point_precision,
    intersection_over_union,
    match_detections,
    soft_binary_cross_entropy_rows,
)
from distill_lightning.functional.features import (
    Normalize,
    Reduction,
    attention_distance,
    factor_distance,
    hint_distance,
    unit_feature,
)
from distill_lightning.functional.gaussian import (
    LOG_VAR_BOUNDS,
    collapse_mixture,
    gaussian_kl,
    gaussian_kl_rows,
    gaussian_nll,
    gaussian_nll_rows,
    join_gaussian,
    split_gaussian,
)
from distill_lightning.functional.gaze import gaze_to_angles, pose_to_angles
from distill_lightning.functional.mean import counted_mean, zero_uncounted
from distill_lightning.functional.predictions import (
    Direction,
    by_position,
    mean_probabilities,
    member_shares,
    soft_cross_entropy,
    soft_cross_entropy_rows,
    softened_kl,
    softened_kl_rows,
    weighted_mean,
)
from distill_lightning.functional.scores import chance_agreement, gap_reduction, gaze_angle
from distill_lightning.functional.self_distillation import hard_targets, progressive_targets, soften

__all__ = [
    "LOG_VAR_BOUNDS",
    "Direction",
    "Normalize",
    "Reduction",
    "area_under_risk_coverage",
    "attention_distance",
    "binned_calibration_error",
    "brier_score",
    "by_position",
    "calibration_bins",
    "chance_agreement",
    "collapse_mixture",
    "counted_mean",
    "discriminator_loss",
    "eleven_point_precision",
    "excess_area_under_risk_coverage",
    "expected_calibration_error",
    "factor_distance",
    "gap_reduction",
    "gaussian_kl",
    "gaussian_kl_rows",
    "gaussian_nll",
    "gaussian_nll_rows",
    "gaze_angle",
    "gaze_to_angles",
    "hard_targets",
    "hint_distance",
    "intersection_over_union",
    "interval_calibration",
    "interval_error",
    "interval_hits",
    "join_gaussian",
    "match_detections",
    "mean_probabilities",
    "member_shares",
    "pose_to_angles",
    "progressive_targets",
    "reverse_gradient",
    "risk_coverage",
    "soft_binary_cross_entropy_rows",
    "soft_cross_entropy",
    "soft_cross_entropy_rows",
    "soften",
    "softened_kl",
    "softened_kl_rows",
    "split_gaussian",
    "unit_feature",
    "weighted_mean",
    "zero_uncounted",
]
