"""From files to files in a fixed amount of memory: read, compute and write side by side."""
