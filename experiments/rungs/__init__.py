"""What the ladder of base pairs is made of."""
