"""What the ladder with a little data is made of."""
