"""The parts and choices that methods are made of."""
