"""Weights that are zero: criteria, selection, masks, and masks that are learned."""
