"""Program transformations: one file, one pass."""
