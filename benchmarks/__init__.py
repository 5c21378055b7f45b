"""What things cost, measured; nothing here is part of the package."""
