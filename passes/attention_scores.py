"""Reading a score chain: from the argument of a softmax down to the product of queries and keys.

Every rule below is an identity of softmax(softcap(scale * q k^T) + bias): what is not covered by one raises
`NotAttention` with the reason, and the operations stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from accelc.passes.match import argument, aten, before_casts, is_call, is_cast, is_last, number, same, shape, tensor

HIDDEN = -1e4
"""A score filled with at most this is hidden: its probability underflows unless the whole row is filled so."""


class NotAttention(Exception):
    """Something that looks like attention cannot be proved to be it; the message is the reason."""


@dataclass(frozen=True)
class Term:
    """Something added to the scores (float, times `factor`), or a mask: True is visible, or hidden if `hides`."""

    node: fx.Node
    level: fx.Node
    """The scores it was combined with: their leading dims tell which of batch and heads the term's dims are."""
    factor: float = 1.0
    hides: bool = False

    @property
    def is_mask(self) -> bool:
        return bool(self.node.meta["val"].dtype == torch.bool)


@dataclass(frozen=True)
class Scores:
    """softcap * tanh(scale * query @ key / softcap) + terms, or scale * query @ key + terms when softcap is 0."""

    query: fx.Node  # [..., T, D]
    key: fx.Node  # [..., D, T], or [..., T, D] when key_rows
    scale: float
    key_rows: bool = False
    softcap: float = 0.0
    terms: tuple[Term, ...] = ()
    sinks: fx.Node | None = None  # [..., T, 1]
    levels: tuple[fx.Node, ...] = ()
    """Every node of the chain, innermost first."""

    def scaled(self, factor: float) -> Scores:
        """These scores times a positive number."""
        if not factor > 0:
            raise NotAttention(f"scores are multiplied by {factor}")
        if self.sinks is not None:
            raise NotAttention("scores are scaled after the sinks were appended")
        terms = tuple(t if t.is_mask else replace(t, factor=t.factor * factor) for t in self.terms)
        return replace(self, scale=self.scale * factor, softcap=self.softcap * factor, terms=terms)

    def with_term(self, term: Term) -> Scores:
        """These scores with one more bias or mask."""
        if self.sinks is not None:
            raise NotAttention("a bias is added after the sinks were appended")
        return replace(self, terms=(*self.terms, term))


def read_scores(node: Any, is_base: Callable[[fx.Node], bool]) -> Scores:
    """The scores that `node` computes; `is_base` says which matrix products relate tokens to tokens.

    Raises `NotAttention` with the reason when an operation on the way has no rule.
    """
    if is_call(node, aten.matmul, aten.bmm, aten.baddbmm) and is_base(node):
        return _product(node)
    for targets, rule in _RULES:
        if is_call(node, *targets):
            scores = rule(node, lambda n: read_scores(n, is_base))
            return replace(scores, levels=(*scores.levels, node))
    if is_cast(node):
        return read_scores(node.args[0], is_base)
    raise NotAttention(f"{getattr(node, 'target', node)} is not known to belong to attention scores")


Read = Callable[[Any], Scores]


def _product(node: fx.Node) -> Scores:
    if not is_call(node, aten.baddbmm):
        query, key = _scaled_operand(node.args[0]), _scaled_operand(node.args[1])
        return Scores(query[0], key[0], query[1] * key[1], levels=(node,))
    bias, query_node, key_node = node.args
    assert isinstance(bias, fx.Node)
    alpha, beta = number(argument(node, "alpha")), number(argument(node, "beta"))
    if alpha is None or beta is None:
        raise NotAttention("baddbmm with a scale that is not a number")
    scores = Scores(query_node, key_node, 1.0, levels=(node,)).scaled(alpha)  # type: ignore[arg-type]
    return scores.with_term(Term(bias, node, beta)) if beta else scores


def _scaled_operand(node: Any) -> tuple[fx.Node, float]:
    """An operand without the positive number that multiplies it, and that number."""
    assert isinstance(node, fx.Node)
    if is_call(node, aten.mul, aten.div) and isinstance(node.args[0], fx.Node):
        factor = number(node.args[1])
        if factor is not None and factor > 0 and len(node.args) == 2 and not node.kwargs:
            return node.args[0], factor if is_call(node, aten.mul) else 1 / factor
    return node, 1.0


def _view(node: fx.Node, read: Read) -> Scores:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if not same(shape(node)[-2:], shape(source)[-2:]):
        raise NotAttention(f"scores are reshaped from {shape(source)} to {shape(node)}")
    return read(source)


def _scale(node: fx.Node, read: Read) -> Scores:
    left, right = node.args[:2]
    if node.target in (aten.div.Tensor_mode, aten.div.Scalar_mode):
        raise NotAttention("scores are divided with rounding")
    is_product = is_call(node, aten.mul)
    for scores, factor in ((left, right), (right, left)) if is_product else ((left, right),):
        value = number(factor)
        if value is not None and value != 0:
            return read(scores).scaled(value if is_product else 1 / value)
    raise NotAttention(f"scores are scaled by {right}, which is not a number")


def _tanh(node: fx.Node, read: Read) -> Scores:
    scores = read(node.args[0])
    if scores.terms or scores.softcap or scores.sinks is not None:
        raise NotAttention("tanh of scores that were masked, biased or capped before")
    return replace(scores, softcap=1.0)


def _add(node: fx.Node, read: Read) -> Scores:
    left, right = node.args[:2]
    alpha = number(argument(node, "alpha"))
    if alpha is None:
        raise NotAttention("scores are added with a factor that is not a number")
    try:
        scores, other, factor = read(left), right, alpha
    except NotAttention:
        scores, other, factor = read(right).scaled(alpha), left, 1.0
    if number(other) is not None:
        return scores  # one number for all of a row: softmax does not see it
    return scores.with_term(_term(other, node, factor))


def _term(bias: Any, level: fx.Node, factor: float) -> Term:
    if tensor(bias) is None:
        raise NotAttention(f"{bias} is added to the scores, which is no tensor")
    return Term(bias, level, factor)  # type: ignore[arg-type]


def _subtract(node: fx.Node, read: Read) -> Scores:
    scores, other = node.args[:2]
    if _is_row_maximum(before_casts(other), scores):
        return read(scores)  # softmax does not see what is the same for a whole row
    alpha = number(argument(node, "alpha"))
    if alpha is None:
        raise NotAttention("scores are subtracted with a factor that is not a number")
    return read(scores).with_term(_term(other, node, -alpha))


def _is_row_maximum(node: Any, scores: Any) -> bool:
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]
        if not is_call(node, aten.max):
            return False
    elif not is_call(node, aten.amax):
        return False
    assert isinstance(node, fx.Node)
    source = node.args[0]
    return source is scores and is_last(scores, argument(node, "dim")) and argument(node, "keepdim") is True  # type: ignore[arg-type]


def _masked_fill(node: fx.Node, read: Read) -> Scores:
    scores, mask, value = node.args
    return _hide(read(scores), node, mask, value, hides=True)


def _where(node: fx.Node, read: Read) -> Scores:
    condition, left, right = node.args
    if number(right) is not None:
        return _hide(read(left), node, condition, right, hides=False)
    return _hide(read(right), node, condition, left, hides=True)


def _hide(scores: Scores, node: fx.Node, mask: Any, value: Any, *, hides: bool) -> Scores:
    filled = number(value)
    if filled is None or filled > HIDDEN:
        raise NotAttention(f"scores are replaced by {value}, which does not hide them")
    if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
        raise NotAttention(f"scores are masked by {mask}, which is not boolean")
    return scores.with_term(Term(mask, node, hides=hides))


def _append_sinks(node: fx.Node, read: Read) -> Scores:
    parts = node.args[0]
    if not is_last(node, argument(node, "dim")) or len(parts) != 2:  # type: ignore[arg-type]
        raise NotAttention("scores are concatenated otherwise than with one column")
    scores, column = parts  # type: ignore[misc]
    if not same(shape(column)[-1], 1):
        raise NotAttention(f"scores are concatenated with {column}, which is not one column")
    found = read(scores)
    if found.sinks is not None:
        raise NotAttention("two columns are appended to the scores")
    return replace(found, sinks=column)


_RULES: tuple[tuple[tuple[object, ...], Callable[[fx.Node, Read], Scores]], ...] = (
    ((aten.reshape, aten.view, aten._unsafe_view, aten.unsqueeze, aten.squeeze), _view),
    ((aten.mul, aten.div), _scale),
    ((aten.tanh,), _tanh),
    ((aten.add,), _add),
    ((aten.sub,), _subtract),
    ((aten.masked_fill,), _masked_fill),
    ((aten.where,), _where),
    ((aten.cat,), _append_sinks),
)
