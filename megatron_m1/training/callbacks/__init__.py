"""Small parts around the training loop, one a file."""
