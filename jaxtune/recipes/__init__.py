"""Merge recipes: read, checked and resolved to what happens to every tensor."""
