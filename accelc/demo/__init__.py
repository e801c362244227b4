"""The demo: train a small model on the standard library's source, decode with it, compare with transformers."""
