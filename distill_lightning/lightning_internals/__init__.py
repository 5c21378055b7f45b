"""Everything that depends on Lightning's insides, in one room.

What is public in Lightning stands where it is used; what it may change without notice stands here.
"""

from distill_lightning.lightning_internals.batches import (
    TrainersBatches,
    convert_early,
    drawing_parts,
    repeated_rows,
    scales_gradients,
    spawns,
    step_precision,
    suffix_of_loader,
    training_loaders,
    trains,
    undrawn,
    validation_loaders,
    watch_first_loader,
)
from distill_lightning.lightning_internals.changes import (
    AVERAGING,
    forget_best,
    keep_patience,
    new_optimizer,
    refuse_reshaping,
    stand_last,
)
from distill_lightning.lightning_internals.place import (
    begins_anew,
    circumstances,
    data_module_of,
    epochs_in,
    has_trainer,
    is_last_batch,
    place_of,
    planned_epochs,
    planned_steps,
    steps_left,
    total_steps,
    validation_interval,
)
from distill_lightning.lightning_internals.portable import PortableModule
from distill_lightning.lightning_internals.resuming import go_on, noted_place, settle_progress
from distill_lightning.lightning_internals.summary import (
    expect_eval_modes,
    forget_eval_modes,
    forget_known_metrics,
    summarise_frozen,
    summarise_without_metrics,
)
from distill_lightning.lightning_internals.versions import refuse_mid_epoch

__all__ = [
    "AVERAGING",
    "PortableModule",
    "TrainersBatches",
    "begins_anew",
    "circumstances",
    "convert_early",
    "data_module_of",
    "drawing_parts",
    "epochs_in",
    "expect_eval_modes",
    "forget_best",
    "forget_eval_modes",
    "forget_known_metrics",
    "go_on",
    "has_trainer",
    "is_last_batch",
    "keep_patience",
    "new_optimizer",
    "noted_place",
    "place_of",
    "planned_epochs",
    "planned_steps",
    "refuse_mid_epoch",
    "refuse_reshaping",
    "repeated_rows",
    "scales_gradients",
    "settle_progress",
    "spawns",
    "stand_last",
    "step_precision",
    "steps_left",
    "suffix_of_loader",
    "summarise_frozen",
    "summarise_without_metrics",
    "total_steps",
    "training_loaders",
    "trains",
    "undrawn",
    "validation_interval",
    "validation_loaders",
    "watch_first_loader",
]
