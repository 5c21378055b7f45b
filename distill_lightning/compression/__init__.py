"""Make a network smaller: the transformations of layers that the steps of a compression are built from."""
