"""accelc: turns the plain forward of a causal language model into a fast autoregressive decoder."""
