"""Checkpoints with quantized weights: loading those of others, quantizing while loading, and accelc's own."""

from accelc.checkpoints.formats import quantization_of as quantization_of
from accelc.checkpoints.loading import load_checkpoint as load_checkpoint
from accelc.checkpoints.quantizing import load_quantized as load_quantized
from accelc.checkpoints.saving import save_quantized as save_quantized
