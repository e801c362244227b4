"""Ways to choose the codes, scales and zeros of quantized weights."""
