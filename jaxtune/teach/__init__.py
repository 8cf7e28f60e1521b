"""A network learns from a few examples: from their labels, or from another network's word."""
