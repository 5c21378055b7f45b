"""``distill-lightning compress``: compress a network as a configuration says, and report what it saved."""
