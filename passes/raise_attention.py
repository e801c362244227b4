"""Raise attention: fused and spelled-out attention of a sequence to itself becomes `accelc::full_attention`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from accelc.ir import Program
from accelc.passes.attention_einsum import einsums_to_products
from accelc.passes.attention_layout import (
    Layout,
    combined_bias,
    count_heads,
    key_value_rows,
    query_rows,
    sink_per_head,
)
from accelc.passes.attention_scores import NotAttention, Scores, Term, read_scores
from accelc.passes.base import Pass, PassResult
from accelc.passes.match import (
    Builder,
    argument,
    aten,
    dependents,
    is_call,
    is_cast,
    is_last,
    number,
    same,
    shape,
    tensor,
)
from accelc.passes.registry import register_pass


@register_pass
@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Attention of the tokens to each other becomes one `accelc::full_attention`, however it is spelled.

    * `aten.scaled_dot_product_attention`, with its mask, scale, causality and grouped heads;
    * matmul, softmax, matmul: scale on the queries, the keys or the scores, by product or quotient; soft-capping;
      biases and masks by add, sub, masked_fill, where or baddbmm; conversions of dtype; subtraction of the row maximum;
      attention sinks as a column that is appended and sliced off; batch and heads merged, apart, or as [B, Hk, G];
      einsum.

    Queries, keys and values are picked up as they were before the model transposed, merged or repeated them, so the
    result reads keys [B, Hk, T, D] with the heads that are different (also where a norm or rotary embedding came after
    repeating). Masks alone stay bool; beside float biases they become -inf.

    Matches are the attentions raised. Attention over another dim of the scores, over other keys than the tokens, or
    with an operation on the scores that is not covered stays as it is, and a note says why.

    Exact up to rounding: the arithmetic is fp32 throughout. A row that sees nothing gives zeros where its mask is bool
    or -inf (as fused kernels do), where softmax over scores filled with the least finite number would be uniform: that
    happens to rows of padding only, in a causal model each token sees itself.
    """

    name = "raise_attention"
    after = ("normalise", "raise_norms", "raise_rotary")
    before = ("derive_step",)
    requires = ("normalised",)
    expected_matches = (0, None)

    def run(self, program: Program) -> PassResult:
        program = program.clone()
        tokens = program.placeholders()[0]
        value = tensor(tokens)
        if value is None or value.dim() != 2 or not all(isinstance(s, torch.SymInt) for s in value.shape):
            return PassResult(program, 0, (f"nothing looked for: {tokens.name} is not [B, T] with dynamic sizes",))
        einsums_to_products(program.graph, value.shape[1])
        rewriter = _Rewriter(program.graph, tokens)
        matches, notes = 0, []
        for node in list(program.graph.nodes):
            try:
                matches += rewriter.raise_from(node)
            except NotAttention as reason:
                notes.append(f"{node.name} left: {reason}")
        program.graph.eliminate_dead_code()
        program.module.recompile()
        return PassResult(program, matches, tuple(notes))


class _Rewriter:
    """What every match of one run shares: the sizes B and T, what depends on the tokens, and emitted nodes."""

    def __init__(self, graph: fx.Graph, tokens: fx.Node) -> None:
        self.batch, self.length = shape(tokens)
        self.dependent = dependents(tokens)
        self.builder = Builder()
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        # Sizes as nodes, standing before every place where they may be needed; unused ones are dead code.
        self.size_nodes = [self.builder.emit(last.next, aten.sym_size.int, tokens, dim) for dim in (0, 1)]

    def raise_from(self, node: fx.Node) -> int:
        """Raise the attention whose softmax or fused operation is `node`; the number of replaced results."""
        if is_call(node, aten.scaled_dot_product_attention):
            return self._raise_fused(node)
        if not is_call(node, aten.softmax, aten._softmax, aten._safe_softmax) or not self._is_square(node):
            return 0
        if not is_last(node, node.args[1]):
            raise NotAttention(f"softmax over dim {node.args[1]} of {shape(node)}, keys are expected last")
        scores = read_scores(node.args[0], self._relates_tokens)
        found = list(_contractions(node, sliced=scores.sinks is None))
        if not found:
            raise NotAttention("the probabilities are not multiplied with values")
        for product in found:
            self._replace(product, scores, product.args[1], is_causal=False)  # type: ignore[arg-type]
        return len(found)

    def _is_square(self, softmax: fx.Node) -> bool:
        """Whether the last two dims are [T, T], or [T, T + 1] with a sink."""
        sizes = shape(softmax)
        if len(sizes) < 3 or not same(sizes[-2], self.length):
            return False
        return any(same(sizes[-1], self.length + extra) for extra in (0, 1))

    def _relates_tokens(self, product: fx.Node) -> bool:
        operands = product.args[-2:]
        return same(shape(product)[-2:], (self.length, self.length)) and all(n in self.dependent for n in operands)

    def _raise_fused(self, node: fx.Node) -> int:
        query, key, value, mask = (argument(node, n) for n in ("query", "key", "value", "attn_mask"))
        assert isinstance(query, fx.Node)
        assert isinstance(key, fx.Node)
        assert isinstance(value, fx.Node)
        if number(argument(node, "dropout_p")) != 0:
            raise NotAttention("it drops out probabilities")
        if not same(shape(query)[-2], self.length) or not self.dependent.issuperset((query, key)):
            raise NotAttention(f"the queries {shape(query)} are not the tokens")
        scale = number(argument(node, "scale"))
        if scale is None:
            width = shape(query)[-1]
            if argument(node, "scale") is not None or not isinstance(width, int):
                raise NotAttention("the scale is not a number")
            scale = 1 / math.sqrt(width)
        # Its scores have the leading dims of its result.
        terms = (Term(mask, node),) if isinstance(mask, fx.Node) else ()
        scores = Scores(query, key, scale, key_rows=True, terms=terms, levels=(node,))
        self._replace(node, scores, value, is_causal=argument(node, "is_causal") is True)
        return 1

    def _replace(self, result: fx.Node, scores: Scores, value: fx.Node, is_causal: bool) -> None:
        """Put a `full_attention` in place of `result`, which contracts the probabilities of `scores` with `value`."""
        layout = Layout(self.builder, result, self.batch, self.length, *self.size_nodes)  # type: ignore[arg-type]
        layout = replace(layout, heads=count_heads(layout, scores.query, (*scores.levels, result)))
        attention = layout.emit(
            torch.ops.accelc.full_attention.default,
            query_rows(layout, scores.query),
            *key_value_rows(layout, scores.key, value, scores.key_rows),
            combined_bias(layout, scores.terms),
            sink_per_head(layout, scores.sinks) if scores.sinks is not None else None,
            is_causal,
            scores.scale,
            scores.softcap,
        )
        attention = self.builder.cast(result, attention, result.meta["val"].dtype)
        for user in list(result.users):
            if is_call(user, aten.reshape) and same(shape(user), shape(attention)):
                user.replace_all_uses_with(attention)
                result.graph.erase_node(user)
        result.replace_all_uses_with(layout.reshape(attention, shape(result)))
        result.graph.erase_node(result)  # fused attention is not dead code: it may draw random numbers


def _contractions(node: fx.Node, sliced: bool) -> Iterator[fx.Node]:
    """The products of the probabilities `node` with values; `sliced`: no sink is left to be sliced off."""
    for user in list(node.users):
        if is_call(user, aten.matmul, aten.bmm) and user.args[0] is node:
            if sliced and user.args[1] is not node:
                yield user
        elif is_cast(user) or _is_neutral(user, node):
            yield from _contractions(user, sliced)
        elif not sliced and _drops_last_column(user, node):
            yield from _contractions(user, True)


def _is_neutral(user: fx.Node, node: fx.Node) -> bool:
    """Views that keep [T, T] last, and the replacement of NaN by zero in rows that see nothing."""
    if is_call(user, aten.nan_to_num):
        return number(argument(user, "nan")) in (None, 0.0)
    views = is_call(user, aten.reshape, aten.unsqueeze, aten.squeeze)
    return views and same(shape(user)[-2:], shape(node)[-2:])


def _drops_last_column(user: fx.Node, node: fx.Node) -> bool:
    if not is_call(user, aten.slice) or not is_last(node, argument(user, "dim")):
        return False
    begins = argument(user, "start") in (None, 0) and argument(user, "step") == 1
    return begins and same(shape(user)[-1], shape(node)[-1] - 1)
