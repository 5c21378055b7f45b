"""Low-rank factors in place of weights: smaller files and fewer multiply-accumulates."""
