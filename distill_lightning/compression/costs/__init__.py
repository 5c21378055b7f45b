"""What a network costs: parameters, multiply-accumulates and time."""
