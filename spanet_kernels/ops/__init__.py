"""Public operators: one file each, read top to bottom."""
