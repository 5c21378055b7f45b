"""One small file with a whole compressed network."""
