"""Access to a network: its parameters by path, its layers by pattern, its outputs on calibration data."""
