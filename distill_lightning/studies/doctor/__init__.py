"""``distill-lightning doctor``: a look at a configuration before hours are spent on it."""
