"""Calibration: tokens that a program runs on so that a method sees the inputs of every weight.

The program is run once, node by node, for one piece of the text after the other up to a product. There the weight's
method gets the rows that enter it, of all pieces, and the quantized weight it returns is what the run goes on with: a
weight is thus calibrated on inputs that the quantized weights before it make, as in GPTQ. In memory are what is alive
at one product for all of the text, what lies between two products for one piece, and one weight's statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from accelc.ir import Program
from accelc.ir.errors import InputError
from accelc.ir.quantized import QuantizedWeight
from accelc.ir.token_ids import one_sequence
from accelc.passes.quantize.products import Matrix, Product

LEAST = 2
"""Fewest tokens of a row."""
PIECE = 2048
"""Most tokens that are computed at once, where a row has no more."""


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
    def of_text(cls, ids: Tensor | Sequence[int], rows: int = 32, length: int = 256) -> Calibration:
        """Pieces spread evenly over one long sequence of ids [T]; shorter and fewer where it does not reach.

        Raises InputError for what is no sequence of integers, or too short, and for sizes that make no pieces.
        """
        for name, size, least in (("rows", rows, 1), ("length", length, LEAST)):
            if isinstance(size, bool) or not isinstance(size, int) or size < least:
                raise InputError(f"{name} is {size!r}", remedy=f"Give an integer of at least {least}.")
        ids = one_sequence(ids, "the calibration text")
        if len(ids) < LEAST:
            raise InputError(f"a calibration text of {len(ids)} tokens", remedy="Give a longer text.")
        length = min(length, len(ids))
        rows = min(rows, len(ids) // length)
        starts = torch.linspace(0, len(ids) - length, rows, dtype=torch.float64).long()
        return cls(torch.stack([ids[s : s + length] for s in starts]))

    def pieces(self, program: Program) -> list[Tensor]:
        """Tokens [r, t] for a program, a few rows each, no longer than it takes. Raises InputError for tokens that it
        does not read.
        """
        facts: dict[str, Any] = program.facts.get("capture", {})  # type: ignore[assignment]
        lowest, highest = (int(extreme) for extreme in self.tokens.aminmax())
        if lowest < 0 or highest >= int(facts.get("input_vocab_size", highest + 1)):
            wrong = lowest if lowest < 0 else highest
            raise InputError(
                f"calibration token {wrong} lies outside the vocabulary of {facts.get('input_vocab_size', '?')}",
                remedy="Encode the text with the model's own tokenizer.",
            )
        longest = int(facts.get("max_length", self.tokens.shape[1]))
        tokens = self.tokens[:, :longest].to(program.device)
        return list(tokens.split(max(1, PIECE // tokens.shape[1])))

    def __repr__(self) -> str:
        rows, length = self.tokens.shape
        return f"Calibration({rows} x {length} tokens)"


def check_calibration(given: object) -> Calibration:
    """`given` itself. Raises InputError unless it is a `Calibration`."""
    if not isinstance(given, Calibration):
        raise InputError(f"calibration is a {type(given).__name__}", remedy="Give Calibration.of_text(ids).")
    return given


@dataclass(frozen=True)
class Rows:
    """What enters a product in one piece of the text."""

    x: Tensor
    """[M, K]"""
    ends: Tensor | None = None
    """[E] where rows are sorted by expert: where those of each end."""

    def of_expert(self, expert: int) -> Tensor:
        """The rows [m, K] of one expert."""
        assert self.ends is not None
        begin = int(self.ends[:expert].amax()) if expert else 0
        return self.x[begin : max(begin, int(self.ends[expert]))]


Made = Callable[[Matrix, Product, Sequence[Rows]], QuantizedWeight | None]
"""made(matrix, product, pieces): called at the first product of each matrix. Returns the quantized weight, or None to
leave it as it is."""


def run_calibrated(program: Program, matrices: Mapping[str, Matrix], calibration: Calibration, made: Made) -> None:
    """Run a step or forward program on the tokens until the last of `matrices` has been seen."""
    pieces = [_Piece(program, tokens) for tokens in calibration.pieces(program)]
    owners = {product.node: (matrix, product) for matrix in matrices.values() for product in matrix.products}
    nodes = list(program.graph.nodes)
    firsts: dict[str, int] = {}
    for place, node in enumerate(nodes):
        if node in owners:
            firsts.setdefault(owners[node][0].path, place)
    weights: dict[str, Tensor | None] = {}
    with torch.no_grad():
        for begin, stop in pairwise([0, *firsts.values()]):
            for piece in pieces:
                for node in nodes[begin:stop]:
                    piece.advance(node, owners.get(node), weights)
            matrix, product = owners[nodes[stop]]
            quantized = made(matrix, product, [piece.rows(product) for piece in pieces])
            weight = None if quantized is None else quantized.dequantize(pieces[0].value(product.x).dtype)
            weights[matrix.path] = weight.transpose(-1, -2) if weight is not None and matrix.turned else weight


def step_inputs(program: Program, tokens: Tensor) -> list[Tensor]:
    """Inputs and fresh states of a program that is given all tokens [R, T] at once."""
    batch, length = tokens.shape
    states = [s.allocate(batch, length, program.device) for s in program.states] if _is_step(program) else []
    return [*_given(program, tokens), *states]


def _is_step(program: Program) -> bool:
    return "lengths" in program.inputs


def _given(program: Program, tokens: Tensor) -> list[Tensor]:
    """The inputs of a program that is given all tokens [R, T] at once."""
    if not _is_step(program):
        return [tokens]
    batch, length = tokens.shape
    device = program.device
    given = {
        "tokens": tokens,
        "positions": torch.arange(length, device=device).expand(batch, length).contiguous(),
        "lengths": torch.zeros(batch, dtype=torch.int64, device=device),
        "last": torch.full((batch,), length - 1, device=device),
    }
    return [given[name] for name in program.inputs]


class _Piece(fx.Interpreter):
    """One piece of the text on its way through the program; states are there while they are used."""

    def __init__(self, program: Program, tokens: Tensor) -> None:
        super().__init__(program.module)
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        inputs = _given(program, tokens)
        self.env.update(zip(placeholders, inputs))
        self._specs = dict(zip(placeholders[len(inputs) :], program.states))
        self._program, self._shape = program, tokens.shape

    def value(self, node: fx.Node) -> Tensor:
        """What a node gave that is still wanted."""
        return self.env[node]  # type: ignore[no-any-return]

    def rows(self, product: Product) -> Rows:
        """What enters a product that comes next."""
        x, ends = self.value(product.x), None if product.ends is None else self.value(product.ends)
        if product.kind == "batched":
            experts, each = x.shape[:2]
            ends = torch.arange(each, experts * each + 1, each, device=x.device)
        return Rows(x.reshape(-1, x.shape[-1]), ends)

    def advance(
        self, node: fx.Node, owner: tuple[Matrix, Product] | None, weights: Mapping[str, Tensor | None]
    ) -> None:
        """Run the next node, a product with its new weight where it has one."""
        if node.op == "placeholder":
            return
        for state in self._specs.keys() & set(node.all_input_nodes) - self.env.keys():
            self.env[state] = self._specs[state].allocate(*self._shape, self._program.device)
        weight = None if owner is None else weights[owner[0].path]
        if owner is None or weight is None:
            self.env[node] = self.run_node(node)
        else:
            self.env[node] = self._product(owner[1], weight, owner[0].turned)
        for used in self.user_to_last_uses.get(node, []):
            del self.env[used]

    def _product(self, product: Product, weight: Tensor, turned: bool) -> Tensor:
        """The product with another weight, stored as the original is."""
        x = self.value(product.x)
        own = weight if turned else weight.transpose(-1, -2)  # [..., K, N]
        if product.kind != "grouped":
            y = x @ own
            return y if product.bias is None else y + self.value(product.bias)
        y = x.new_zeros((len(x), own.shape[-1]))
        begin = 0
        for expert, end in enumerate(self.value(product.ends).tolist()):  # type: ignore[arg-type]
            y[begin:end] = x[begin:end] @ own[expert]
            begin = max(begin, end)
        return y
