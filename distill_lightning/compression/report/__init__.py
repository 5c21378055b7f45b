"""Measured time, bytes and scores of every stage, controls, and the report on them."""
