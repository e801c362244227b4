"""Calibration: tokens that a program runs on so that a method sees the inputs of every weight.

The program is run once, node by node, with all tokens as one batch. When a product is reached, the weight's method gets
the rows that enter it, and the quantized weight it returns is what the run goes on with: a weight is thus calibrated on
inputs that the quantized weights before it make, as in GPTQ, and no more than one weight's statistics are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from accelc.ir import Program
from accelc.ir.errors import InputError
from accelc.ir.quantized import QuantizedWeight
from accelc.passes.quantize.products import Matrix, Product

LEAST = 2
"""Fewest tokens of a row."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token ids [R, T] of R pieces of text of T tokens. Raises InputError for another rank or type, or too few."""

    tokens: Tensor

    def __post_init__(self) -> None:
        tokens = self.tokens
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype != torch.int64:
            found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise InputError(f"calibration tokens are {found}", remedy="Give int64 token ids [rows, tokens].")
        if tokens.shape[0] < 1 or tokens.shape[1] < LEAST:
            raise InputError(
                f"calibration tokens of shape {list(tokens.shape)}", remedy="Give a longer text: 16 x 256 tokens do."
            )

    @classmethod
    def of_text(cls, ids: Tensor | list[int], rows: int = 32, length: int = 256) -> Calibration:
        """Pieces spread evenly over one long sequence of ids [T]; shorter and fewer where it does not reach."""
        ids = torch.as_tensor(ids, dtype=torch.int64).flatten()
        if len(ids) < LEAST:
            raise InputError(f"a calibration text of {len(ids)} tokens", remedy="Give a longer text.")
        length = min(length, len(ids))
        rows = min(rows, len(ids) // length)
        starts = torch.linspace(0, len(ids) - length, rows).long()
        return cls(torch.stack([ids[s : s + length] for s in starts]))

    def __repr__(self) -> str:
        rows, length = self.tokens.shape
        return f"Calibration({rows} x {length} tokens)"


Made = Callable[[Matrix, Product, Tensor, Tensor | None], QuantizedWeight | None]
"""made(matrix, product, x, ends): x are the rows [M, K] that enter the product, ends [E] those of a grouped one.
Returns the quantized weight, or None to leave it as it is. Called at the first product of each matrix."""


def run_calibrated(program: Program, matrices: Mapping[str, Matrix], calibration: Calibration, made: Made) -> None:
    """Run a step or forward program on the tokens until the last of `matrices` has been seen."""
    facts: dict[str, Any] = program.facts.get("capture", {})  # type: ignore[assignment]
    lowest, highest = (int(extreme) for extreme in calibration.tokens.aminmax())
    if lowest < 0 or highest >= int(facts.get("input_vocab_size", highest + 1)):
        wrong = lowest if lowest < 0 else highest
        raise InputError(
            f"calibration token {wrong} lies outside the vocabulary of {facts.get('input_vocab_size', '?')}",
            remedy="Encode the text with the model's own tokenizer.",
        )
    longest = int(facts.get("max_length", calibration.tokens.shape[1]))
    tokens = calibration.tokens[:, :longest].to(program.device)
    run = _Calibrated(program, matrices, made)
    with torch.no_grad():
        try:
            run.run(*step_inputs(program, tokens))
        except _Done:
            return


def step_inputs(program: Program, tokens: Tensor) -> list[Tensor]:
    """Inputs and fresh states of a program that is given all tokens [R, T] at once."""
    if "lengths" not in program.inputs:
        return [tokens]
    batch, length = tokens.shape
    device = program.device
    given = {
        "tokens": tokens,
        "positions": torch.arange(length, device=device).expand(batch, length).contiguous(),
        "lengths": torch.zeros(batch, dtype=torch.int64, device=device),
        "last": torch.full((batch,), length - 1, device=device),
    }
    return [*(given[name] for name in program.inputs), *(s.allocate(batch, length, device) for s in program.states)]


class _Done(Exception):
    """Every matrix has been seen; what is left of the graph need not run."""


class _Calibrated(fx.Interpreter):
    def __init__(self, program: Program, matrices: Mapping[str, Matrix], made: Made) -> None:
        super().__init__(program.module)
        self._program, self._made = program, made
        self._owners = {product.node: (matrix, product) for matrix in matrices.values() for product in matrix.products}
        self._left = {path for path, matrix in matrices.items() if matrix.products}
        self._weights: dict[str, Tensor | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._owners:
            return super().run_node(n)
        matrix, product = self._owners[n]
        x = self.env[product.x]
        if matrix.path in self._left:
            ends = None if product.ends is None else self.env[product.ends]
            if product.kind == "batched":
                experts, each = x.shape[:2]
                ends = torch.arange(each, experts * each + 1, each, device=x.device)
            quantized = self._made(matrix, product, x.reshape(-1, x.shape[-1]), ends)
            weight = None if quantized is None else quantized.dequantize(x.dtype)
            if weight is not None and matrix.turned:
                weight = weight.transpose(-1, -2)
            self._weights[matrix.path] = weight if len(matrix.products) > 1 else None
            self._left.discard(matrix.path)
            if not self._left:
                raise _Done
        else:
            weight = self._weights[matrix.path]
        return super().run_node(n) if weight is None else self._product(product, x, weight, matrix.turned)

    def _product(self, product: Product, x: Tensor, weight: Tensor, turned: bool) -> Tensor:
        """The product with another weight, stored as the original is."""
        own = weight if turned else weight.transpose(-1, -2)  # [..., K, N]
        if product.kind != "grouped":
            y = x @ own
            return y if product.bias is None else y + self.env[product.bias]
        y = x.new_zeros((len(x), own.shape[-1]))
        begin = 0
        for expert, end in enumerate(self.env[product.ends].tolist()):  # type: ignore[index]
            y[begin:end] = x[begin:end] @ own[expert]
            begin = max(begin, end)
        return y
