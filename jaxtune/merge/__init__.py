"""Many models become one: every method is one function over views of a leaf."""
