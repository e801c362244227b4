"""Raise norms: spelled-out norms become `accelc::rms_norm` and `aten.layer_norm`."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from accelc.ir import Program
from accelc.passes.base import Pass, PassResult
from accelc.passes.match import Builder, argument, aten, before_casts, is_call, is_cast, is_last, number, same, shape
from accelc.passes.registry import register_pass


@register_pass
@dataclass(frozen=True)
class RaiseNorms(Pass):
    """Norms over the last dim become one operation, however they are spelled.

    * RMS norm: x * rsqrt(mean(x^2) + eps), x / sqrt(...), pow(..., -0.5), `aten.rms_norm`; the square as pow or
      product; then, where they follow, a conversion of dtype and one weight [D], plain or as (weight + number).
    * layer norm: the same around x - mean(x), the variance as mean of squares or `var` without correction; then a
      weight [D] and a bias [D].

    What else is multiplied afterwards (a gate, a weight for each head) stays. Matches are the norms raised.

    Exact up to rounding: the result is computed in fp32 and rounded once, where a 16-bit model may have rounded before
    it multiplied the weight (as Llama does), or computed in 16 bits throughout.
    """

    name = "raise_norms"
    after = ("normalise",)
    before = ("derive_step",)
    requires = ("normalised",)
    expected_matches = (0, None)

    def run(self, program: Program) -> PassResult:
        program = program.clone()
        builder = Builder()
        counts = {"rms norm": 0, "layer norm": 0}
        for node in list(program.graph.nodes):
            if is_call(node, aten.rms_norm):
                counts["rms norm"] += _raise_fused(builder, node)
            elif (found := _normalised(node)) is not None:
                source, eps = found
                centred = _centred(source)
                if centred is None:
                    _raise_rms(builder, node, source, eps)
                else:
                    _raise_layer(builder, node, centred, eps)
                counts["rms norm" if centred is None else "layer norm"] += 1
        program.graph.eliminate_dead_code()
        program.module.recompile()
        notes = tuple(f"{count} {kind}" for kind, count in counts.items() if count)
        return PassResult(program, sum(counts.values()), notes)


# -- recognising -----------------------------------------------------------------------------------------------------


def _normalised(node: fx.Node) -> tuple[fx.Node, float] | None:
    """x and eps when `node` is x / sqrt(mean(x^2) + eps) over the last dim (also with the variance of x + c for it)."""
    if is_call(node, aten.mul):
        pairs = [(node.args[0], node.args[1]), (node.args[1], node.args[0])]
        candidates = [(x, _inverse_root(factor)) for x, factor in pairs]
    elif node.target in (aten.div.Tensor,):
        divisor = before_casts(node.args[1])
        candidates = [(node.args[0], _root(divisor))]
    else:
        return None
    for x, inside in candidates:
        found = _mean_square(inside)
        if found is None or not isinstance(x, fx.Node):
            continue
        squared, eps = found
        if _variance(squared) is squared:
            if _is_centring_of(x, squared):
                return x, eps
        elif before_casts(squared) is before_casts(x) or _same_centring(x, squared):
            return x, eps
    return None


def _inverse_root(node: Any) -> Any:
    """y when `node` is 1 / sqrt(y)."""
    node = before_casts(node)
    if is_call(node, aten.rsqrt):
        return node.args[0]
    if is_call(node, aten.pow) and number(node.args[1]) == -0.5:
        return node.args[0]
    if is_call(node, aten.reciprocal):
        return _root(before_casts(node.args[0]))
    if is_call(node, aten.div) and number(node.args[0]) == 1:
        return _root(before_casts(node.args[1]))
    return None


def _root(node: Any) -> Any:
    """y when `node` is sqrt(y)."""
    if is_call(node, aten.sqrt) or (is_call(node, aten.pow) and number(node.args[1]) == 0.5):
        return node.args[0]
    return None


def _mean_square(node: Any) -> tuple[fx.Node, float] | None:
    """(x, eps) when `node` is mean(x^2) + eps over the last dim, kept; (v, eps) for a variance v instead."""
    node = before_casts(node)
    if not is_call(node, aten.add):
        return None
    for mean, eps in ((node.args[0], number(node.args[1])), (node.args[1], number(node.args[0]))):
        mean = before_casts(mean)
        if eps is None or eps < 0 or number(argument(node, "alpha")) != 1:
            continue
        variance = _variance(mean)
        if variance is not None:
            return variance, eps
        if is_call(mean, aten.mean) and _over_last(mean):
            x = _square_of(before_casts(mean.args[0]))
            if x is not None:
                return x, eps
    return None


def _over_last(node: fx.Node) -> bool:
    source = node.args[0]
    keeps = argument(node, "keepdim") is True
    return keeps and isinstance(source, fx.Node) and is_last(source, argument(node, "dim"))


def _square_of(node: Any) -> fx.Node | None:
    if is_call(node, aten.pow) and number(node.args[1]) == 2:
        return node.args[0]  # type: ignore[return-value]
    if is_call(node, aten.mul) and node.args[0] is node.args[1]:
        return node.args[0]  # type: ignore[return-value]
    return node.args[0] if is_call(node, aten.square) else None  # type: ignore[return-value]


def _variance(node: Any) -> fx.Node | None:
    """`node` itself (before `getitem`) when it is the variance over the last dim without correction."""
    if isinstance(node, fx.Node) and node.target is operator.getitem:
        return node if node.args[1] == 0 and is_call(node.args[0], aten.var_mean) and _is_biased(node.args[0]) else None
    return node if is_call(node, aten.var) and _is_biased(node) else None


def _is_biased(node: fx.Node) -> bool:
    names = {a.name for a in node.target._schema.arguments}  # type: ignore[union-attr]
    if "correction" in names:
        return "dim" in names and argument(node, "correction") == 0 and _over_last(node)
    return "dim" in names and argument(node, "unbiased") is False and _over_last(node)


def _is_centring_of(x: fx.Node, variance: fx.Node) -> bool:
    """Whether x = y - mean(y) and `variance` is that of y."""
    call = variance if is_call(variance, aten.var) else variance.args[0]
    centred = _centred(x)
    return centred is not None and before_casts(centred) is before_casts(call.args[0])  # type: ignore[union-attr]


def _same_centring(x: fx.Node, squared: fx.Node) -> bool:
    """Whether both are y - mean(y) of the same y, each computed for itself."""
    first, second = _centred(x), _centred(squared)
    return first is not None and second is not None and before_casts(first) is before_casts(second)


def _centred(node: fx.Node) -> fx.Node | None:
    """y when `node` is y - mean(y) over the last dim."""
    node = before_casts(node)  # type: ignore[assignment]
    if not is_call(node, aten.sub) or number(argument(node, "alpha")) != 1:
        return None
    source, mean = node.args[0], before_casts(node.args[1])
    if isinstance(mean, fx.Node) and mean.target is operator.getitem and mean.args[1] == 1:
        mean = mean.args[0] if is_call(mean.args[0], aten.var_mean) else None
    if not (is_call(mean, aten.mean, aten.var_mean) and _over_last(mean)):
        return None
    return source if before_casts(mean.args[0]) is before_casts(source) else None  # type: ignore[return-value]


# -- what follows ----------------------------------------------------------------------------------------------------


def _only_user(node: fx.Node) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _absorb(node: fx.Node, packet: object) -> tuple[fx.Node, fx.Node | None]:
    """What follows `node`: conversions, then one `packet` with a vector [D], and that vector; None without one."""
    while is_cast(user := _only_user(node)):
        node = user
    if is_call(user, packet) and number(argument(user, "alpha") if packet is aten.add else 1) == 1:
        left, right = user.args[:2]
        vector = right if left is node else left
        if vector is not node and isinstance(vector, fx.Node) and same(shape(vector), shape(node)[-1:]):
            return user, vector
    return node, None


def _after_casts(node: fx.Node) -> fx.Node:
    while is_cast(user := _only_user(node)):
        node = user
    return node


def _offset(weight: fx.Node) -> tuple[fx.Node, float]:
    """(w, c) when the weight is w + c, with conversions left out."""
    inner = before_casts(weight)
    if is_call(inner, aten.add) and number(argument(inner, "alpha")) == 1:
        for w, c in ((inner.args[0], number(inner.args[1])), (inner.args[1], number(inner.args[0]))):
            if c is not None and isinstance(w, fx.Node):
                return before_casts(w), c  # type: ignore[return-value]
    return inner, 0.0  # type: ignore[return-value]


# -- writing ---------------------------------------------------------------------------------------------------------


def _of_dtype(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """`node`, or what it was converted from where that has `dtype`."""
    while node.meta["val"].dtype != dtype and is_cast(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _replace(builder: Builder, old: fx.Node, new: fx.Node) -> None:
    new = builder.cast(old, new, old.meta["val"].dtype)
    old.replace_all_uses_with(new)


def _raise_rms(builder: Builder, node: fx.Node, source: fx.Node, eps: float) -> None:
    end, weight = _absorb(node, aten.mul)
    end = _after_casts(end)
    inner, offset = _offset(weight) if weight is not None else (None, 0.0)
    x = _of_dtype(source, end.meta["val"].dtype)
    _replace(builder, end, builder.emit(end, torch.ops.accelc.rms_norm.default, x, inner, eps, offset))


def _raise_layer(builder: Builder, node: fx.Node, source: fx.Node, eps: float) -> None:
    end, weight = _absorb(node, aten.mul)
    end, bias = _absorb(end, aten.add)
    end = _after_casts(end)
    x = _of_dtype(source, end.meta["val"].dtype)
    dtype = x.meta["val"].dtype
    # The operator wants one dtype throughout.
    vectors = [builder.cast(end, _of_dtype(v, dtype), dtype) if v is not None else None for v in (weight, bias)]
    size = [shape(x)[-1]]
    _replace(builder, end, builder.emit(end, aten.layer_norm.default, x, size, *vectors, eps))


def _raise_fused(builder: Builder, node: fx.Node) -> int:
    x, size, weight, eps = (argument(node, name) for name in ("input", "normalized_shape", "weight", "eps"))
    if len(size) != 1:  # type: ignore[arg-type]
        return 0
    if eps is None:
        eps = torch.finfo(node.meta["val"].dtype).eps
    _replace(builder, node, builder.emit(node, torch.ops.accelc.rms_norm.default, x, weight, eps, 0.0))
    return 1
