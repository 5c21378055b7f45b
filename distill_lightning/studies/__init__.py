"""The verbs of the command line that run whole studies."""
