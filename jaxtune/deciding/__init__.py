"""What examples decide of a recipe: an ordinary recipe comes out, and perhaps models or files that it takes."""
