"""Which row of a report each moment of a compression has."""

import pytest

from distill_lightning.callbacks.stage_log import row_at
from distill_lightning.compression import PruneWeights, ShareWeights
from distill_lightning.compression.run.phases import Phase

FIRST = Phase(1, PruneWeights(amount=0.5, finetune_epochs=2), 1, 3)
AT_ONCE = Phase(2, ShareWeights(k=4), 3, 3)
LAST = Phase(3, ShareWeights(k=2, finetune_epochs=1), 3, 4)


@pytest.mark.parametrize(
    ("moment", "phase", "row"),
    [
        ("dense", None, ("dense", "dense", None)),
        # Fine-tuning changes no structure, so that one of the two rows is timed; of the last step it is the final one.
        ("before", FIRST, (f"{FIRST.name}, before fine-tuning", "before", FIRST.name)),
        ("after", FIRST, (FIRST.name, "after", None)),
        ("before", AT_ONCE, None),
        ("after", AT_ONCE, (AT_ONCE.name, "after", None)),
        ("before", LAST, (f"{LAST.name}, before fine-tuning", "before", "final")),
        ("after", LAST, (LAST.name, "after", "final")),
    ],
)
def test_no_network_is_timed_twice(moment, phase, row):
    assert row_at(moment, phase, last=LAST) == row
