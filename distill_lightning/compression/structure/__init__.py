"""The changes of a network's structure in plain values, for checkpoints and files."""
