"""Which token ids a captured forward takes: the rows of the tables that it looks them up in."""

from __future__ import annotations

import torch
import torch.fx as fx

from accelc.ir.program import fetch
from accelc.passes.match import CASTS, is_call

aten = torch.ops.aten

SAME_IDS = (*CASTS, aten.view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.expand)
"""What leaves the ids as they are."""


def input_vocab_size(module: fx.GraphModule, default: int) -> int:
    """The ids that every table looked up by the tokens themselves has a row for: those in [0, n); ``default`` where
    there is no such table. It may differ from the width of the logits: embeddings are padded, or have rows for tokens
    that are read and never written.
    """
    (tokens,) = (node for node in module.graph.nodes if node.op == "placeholder")
    ids, rows = {tokens}, []
    for node in module.graph.nodes:
        if is_call(node, *SAME_IDS) and node.args[0] in ids:
            ids.add(node)
        table = _table(node, ids)
        if isinstance(table, fx.Node) and table.op == "get_attr":
            rows.append(fetch(module, str(table.target)).shape[0])
    return min(rows, default=default)


def _table(node: fx.Node, ids: set[fx.Node]) -> object:
    """What a node looks the ids up in; None when it does nothing of the kind."""
    if is_call(node, aten.embedding) and node.args[1] in ids:
        return node.args[0]
    if is_call(node, aten.index_select) and node.args[1] == 0 and node.args[2] in ids:
        return node.args[0]
    if is_call(node, aten.index) and isinstance(node.args[1], list | tuple) and node.args[1][0] in ids:
        return node.args[0]
    return None
