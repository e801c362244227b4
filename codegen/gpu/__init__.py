"""Triton kernels for GPUs. Importing this imports no Triton; its modules `kernels`, `quantized_gemm`, `tuning`, `cross`
and `sass` do.
"""

from .layout import TiledWeight, tile_weight, untile_weight
from .tiles import Tile

__all__ = ["Tile", "TiledWeight", "tile_weight", "untile_weight"]
