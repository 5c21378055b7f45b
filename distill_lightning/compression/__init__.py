"""Making a network smaller, in plain torch."""
