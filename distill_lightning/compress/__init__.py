"""``distill-lightning compress``: compress a network as a configuration says, with controls, and report what was saved."""
