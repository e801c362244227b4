"""RecogniseMasks: attention biases of the step that are a known family are computed by the kernel, not read from
memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from accelc.ir import Exactness, Program
from accelc.ir.errors import NotCausalError, PassError, describe
from accelc.ir.program import fetch, store
from accelc.passes.base import Pass, PassResult
from accelc.passes.registry import register_pass

accelc = torch.ops.accelc
aten = torch.ops.aten

HIDDEN = -1e4
"""A float bias at or below this hides a slot: models use -inf, the least number of a dtype, or -1e4 (early GPT code).
"""

EVERY = 2048
"""Longest sequence whose masks are read at every position: the work grows with the square."""

ARGUMENTS = {"tree": 5, "bias": 6, "slopes": 8, "mask": 9, "window": 10}
"""Places of the arguments of `accelc::attention`."""


@dataclass(frozen=True)
class Family:
    """A recognised bias: mask family with its window, ALiBi slopes [H] or None."""

    mask: str
    window: int = 0
    slopes: Tensor | None = None

    def __str__(self) -> str:
        window = f" {self.window}" if self.window else ""
        return f"{self.mask}{window}" + (" with ALiBi slopes" if self.slopes is not None else "")


@register_pass
@dataclass(frozen=True)
class RecogniseMasks(Pass):
    """Replace biases that follow from positions alone by a mask family: causal, window, chunk, ALiBi.

    A bias is evaluated at query positions across the longest sequence against every key position and compared with
    what the family would give; only a full agreement replaces it. Others stay as tensors and are noted. Whether a mask
    shows a query a later key is read at every position of sequences of up to 2048.
    """

    name = "recognise_masks"
    after = ("derive_step",)
    exactness = Exactness.EXACT
    expected_matches = (0, None)

    rows: int = 128
    """Query positions at which a bias is evaluated, spread over the sequence."""

    def run(self, program: Program) -> PassResult:
        program = program.clone()
        longest = int(program.facts["capture"]["max_length"])  # type: ignore[index]
        positions = probe_positions(longest, self.rows)
        matches, notes = 0, []
        known: dict[fx.Node, Family | None] = {}
        for node in program.graph.nodes:
            if node.target is not accelc.attention.default or node.args[ARGUMENTS["bias"]] is None:
                continue
            bias = node.args[ARGUMENTS["bias"]]
            if bias not in known:
                value = evaluate(program, bias, positions, longest)
                if value is not None and node.meta.get("forward") in program.facts.get("mask_decides", ()):  # type: ignore[operator]
                    refuse_later_keys(value, positions, longest, node)
                    for block in self._others(positions, longest):
                        if (more := evaluate(program, bias, block, longest)) is not None:
                            refuse_later_keys(more, block, longest, node)
                known[bias] = recognise(value, positions, longest) if value is not None else None
                notes.append(
                    f"{bias.meta.get('forward', bias.name)}: {known[bias] or 'no known family, stays a tensor'}"
                )
            family = known[bias]
            if family is None:
                continue
            arguments = list(node.args)
            arguments[ARGUMENTS["bias"]] = None
            arguments[ARGUMENTS["mask"]], arguments[ARGUMENTS["window"]] = family.mask, family.window
            if family.slopes is not None:
                arguments[ARGUMENTS["slopes"]] = _slopes(program, node, bias, family.slopes)
            node.args = tuple(arguments)
            matches += 1
        program.graph.eliminate_dead_code()
        program.module.recompile()
        return PassResult(program, matches, tuple(notes))

    def _others(self, positions: Tensor, longest: int) -> tuple[Tensor, ...]:
        """The query positions that are left of a sequence that is not too long for all, in blocks."""
        left = torch.ones(longest, dtype=torch.bool).index_fill(0, positions, False).nonzero().flatten()
        return left.split(self.rows) if longest <= EVERY and len(left) else ()


def refuse_later_keys(bias: Tensor, positions: Tensor, longest: int, node: fx.Node) -> None:
    """Raise NotCausalError when a mask that alone decides what is seen shows a query a later key."""
    allowed = (bias if bias.dtype == torch.bool else bias > HIDDEN).cpu()
    later = torch.arange(longest)[None, :] > positions[:, None]
    leaks = torch.nonzero((allowed & later).reshape(-1, len(positions), longest).any(0))
    if len(leaks):
        query, key = int(positions[leaks[0, 0]]), int(leaks[0, 1])
        raise NotCausalError(f"the mask lets position {query} see position {key}", where=describe(node))


def probe_positions(longest: int, rows: int) -> Tensor:
    """Query positions [R]: all when they fit, else the first, the last and evenly spread ones."""
    if longest <= rows:
        return torch.arange(longest)
    spread = torch.linspace(0, longest - 1, rows - 8, dtype=torch.float64).long()
    return torch.unique(torch.cat([torch.arange(4), spread, torch.arange(longest - 4, longest)]))


def evaluate(program: Program, bias: fx.Node, positions: Tensor, longest: int) -> Tensor | None:
    """The bias for one row whose `longest` committed tokens are seen from query `positions`: broadcastable to [1, H,
    R, L].

    None when it depends on tokens or states.
    """
    wanted: set[fx.Node] = set()
    stack = [bias]
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            if node.target is not aten.sym_size.int:
                stack.extend(node.all_input_nodes)
    device = program.device
    slots = longest + len(positions)
    inputs = {"positions": positions[None].to(device), "lengths": torch.tensor([longest], device=device)}
    sizes = {"B": 1, "N": len(positions), "S": slots}
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node not in wanted:
            continue
        if node.op == "placeholder":
            if node.target not in inputs:
                return None
            values[node] = inputs[str(node.target)]
        elif node.op == "get_attr":
            values[node] = fetch(program.module, str(node.target))
        elif node.target is aten.sym_size.int:
            values[node] = sizes[_symbol(program, node)]
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    value: Tensor = values[bias]
    return value[..., :longest] if value.shape[-1] == slots else value


def _symbol(program: Program, node: fx.Node) -> str:
    """Which of batch, new tokens and slots a `sym_size` reads."""
    source, dim = node.args
    if source.op != "placeholder":
        raise PassError(f"{node.name} reads a size of {source}, which is no input", where="recognise_masks")
    states = {s.name: s for s in program.states}
    if source.target in states:
        return str(states[source.target].shape[dim])
    return "B" if dim == 0 else "N"


def recognise(bias: Tensor, positions: Tensor, longest: int) -> Family | None:
    """The family whose visibility and slopes equal `bias` at every probed query and every earlier key, or None."""
    bias = bias.expand(1, bias.shape[1] if bias.dim() == 4 else 1, len(positions), longest)[0]  # [H or 1, R, L]
    query, key = positions[:, None], torch.arange(longest)[None, :]
    earlier = key <= query
    allowed = bias if bias.dtype == torch.bool else bias > HIDDEN
    allowed = allowed.cpu()
    if not bool((allowed == allowed[:1]).all()):
        return None
    mask, window = _mask(allowed[0] & earlier, positions, longest)
    if mask is None:
        return None
    if bias.dtype == torch.bool:
        return Family(mask, window)
    seen = allowed & earlier
    values = bias.cpu().double()
    if bool((values.masked_fill(~seen, 0.0) == 0).all()):
        return Family(mask, window)
    slopes = _alibi(values, seen, query, key)
    return None if slopes is None else Family(mask, window, slopes)


def _mask(allowed: Tensor, positions: Tensor, longest: int) -> tuple[str | None, int]:
    """The family of visibility [R, L] among earlier keys."""
    query, key = positions[:, None], torch.arange(longest)[None, :]
    earlier = key <= query
    if bool((allowed == earlier).all()):
        return "causal", 0
    last = allowed[-1]
    span = int(last.sum())
    if bool((allowed == (earlier & (query - key < span))).all()):
        return "window", span
    first = int(last.int().argmax())  # the last query's chunk starts here
    for chunk in range(span, longest + 1):
        if first % chunk == 0 and bool((allowed == (earlier & (query // chunk == key // chunk))).all()):
            return "chunk", chunk
    return None, 0


def _alibi(values: Tensor, seen: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """Slopes [H] when values [H, R, L] are slope * (key - query) up to a constant a row, which softmax removes."""
    if len(values) == 1:  # one bias for an unknown number of heads: not what ALiBi is
        return None
    distance = (key - query).double()[None]
    row = int(seen[0].sum(-1).argmax())
    visible = torch.nonzero(seen[0, row]).flatten()
    if len(visible) < 2:
        return None
    low, high = int(visible[0]), int(visible[-1])
    slopes = (values[:, row, high] - values[:, row, low]) / (high - low)
    rest = (values - slopes[:, None, None] * distance).masked_fill(~seen, float("nan"))
    centre = rest.nanmedian(dim=-1, keepdim=True).values
    scale = values.masked_fill(~seen, 0.0).abs().amax().clamp(min=1.0)
    if float((rest - centre).nan_to_num(0.0).abs().max()) > 1e-5 * float(scale):
        return None
    return slopes.float()


def _slopes(program: Program, node: fx.Node, bias: fx.Node, slopes: Tensor) -> fx.Node:
    path = f"accelc_tables.slopes_{bias.name}"
    device = program.device
    store(program.module, path, slopes.to(device))
    with program.graph.inserting_before(node):
        return program.graph.get_attr(path)
