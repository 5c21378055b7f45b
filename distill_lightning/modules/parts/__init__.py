"""What a module is made of besides its networks and its loss."""
