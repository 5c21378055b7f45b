"""Weights with few values: shared, hashed and quantized ones, and quantized activations."""
