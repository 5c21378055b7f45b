"""Making networks smaller, in plain PyTorch, and measuring what that saves."""
