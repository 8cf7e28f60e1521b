"""One command a file; `jaxtune.cli` says what arguments each takes."""
