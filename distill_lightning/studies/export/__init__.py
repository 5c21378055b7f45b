"""``distill-lightning export``: the student of a checkpoint alone, in files that were run, with a model card."""
