"""Where a program's logits come from: the linear layer that makes them, and what it reads."""

from __future__ import annotations

import torch
import torch.fx as fx

aten = torch.ops.aten

TOKENWISE = {
    aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.tanh.default, aten._to_copy.default,
    aten.to.dtype, aten.add.Tensor, aten.clone.default,
}  # fmt: skip
"""What may stand between the output projection and the logits."""
PROJECTIONS = {aten.linear.default, torch.ops.accelc.quantized_linear.default}


def projection(logits: fx.Node) -> fx.Node | None:
    """The linear layer that `logits` come from, when every operation in between treats tokens alike; else None."""
    node = logits
    while node.op == "call_function" and len(readers(node)) <= 1:
        if node.target in PROJECTIONS:
            return node
        tensors = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if node.target not in TOKENWISE or len(tensors) != 1:
            return None
        node = tensors[0]
    return None


def projected(logits: fx.Node) -> fx.Node | None:
    """What that layer reads, None where there is none."""
    layer = projection(logits)
    return layer.args[0] if layer is not None and isinstance(layer.args[0], fx.Node) else None


def readers(node: fx.Node) -> list[fx.Node]:
    """The operations that read a value, the program's output not counted."""
    return [user for user in node.users if user.op != "output"]
