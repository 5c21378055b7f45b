"""The run of a list of steps: phases of the training, one after the other."""
