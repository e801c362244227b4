"""Checkpoints: float ones, loading those with quantized weights of others, quantizing while loading, and our own."""

from accelc.checkpoints.floats import load_floats as load_floats
from accelc.checkpoints.formats import quantization_of as quantization_of
from accelc.checkpoints.loading import load_checkpoint as load_checkpoint
from accelc.checkpoints.quantizing import load_quantized as load_quantized
from accelc.checkpoints.saving import save_quantized as save_quantized
