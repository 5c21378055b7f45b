"""The verbs of the command line that make many runs and report on them."""
