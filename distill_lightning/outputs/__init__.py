"""What an output of a network means, and the metrics that judge it."""
