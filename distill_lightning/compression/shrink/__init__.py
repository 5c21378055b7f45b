"""Removing channels, hidden units, heads, neurons and layers from the tensors, and tying layers."""
