"""Batches, augmented views, mixtures, samplers, and the data modules that make them."""
