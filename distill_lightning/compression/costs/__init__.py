"""What a network costs before it runs anywhere: parameters and multiply-accumulates."""
