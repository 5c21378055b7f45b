"""``distill-lightning compare``: teachers, then every method with every seed, one table and its figures."""
