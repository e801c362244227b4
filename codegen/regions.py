"""Regions of operations without a kernel here: compiled by Inductor, once for all regions of one structure.

Parameters are arguments of a region, so that the same part of every layer is one compiled artifact; artifacts are
files in the cache and hold no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from accelc.codegen.cache import cache_dir, cached, content_key
from accelc.codegen.errors import RegionError
from accelc.codegen.options import Report
from accelc.codegen.schedule import Region
from accelc.codegen.shapes import Shapes
from accelc.ir.compat import inductor_errors, load_inductor_artifact, save_inductor_artifact
from accelc.ir.dialect import REFERENCES

Compiled = Callable[..., Any]


def region_module(region: Region, shapes: Shapes) -> fx.GraphModule:
    """The region as a graph of its own: inputs become placeholders, dialect operations their references."""
    graph = fx.Graph()
    remap: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(region.inputs):
        remap[node] = graph.placeholder(f"input_{index}")
        remap[node].meta["val"] = shapes.values[node]
    for node in region.nodes:
        copy = graph.node_copy(node, remap.__getitem__)
        copy.name = f"value_{len(remap)}"
        copy.target = REFERENCES.get(node.target, node.target)
        copy.meta = {"val": shapes.values[node]}
        remap[node] = copy
    graph.output(tuple(remap[n] for n in region.outputs))
    return fx.GraphModule(torch.nn.Module(), graph)


def signature(module: fx.GraphModule) -> str:
    """Equal for regions of equal structure, shapes, strides and dtypes."""
    lines = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        form = _form(value) if node.op == "placeholder" else ""
        lines.append(f"{node.name} = {node.op} {_name(node.target)} {node.args} {node.kwargs} {form}")
    return "\n".join(lines)


def _name(target: Any) -> str:
    if isinstance(target, str | torch._ops.OpOverload):
        return str(target)
    return f"{target.__module__}.{target.__qualname__}"


def _form(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.storage_offset()}"
    return str(value)


class Regions:
    """Compiles regions, each structure once."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._known: dict[str, Compiled] = {}

    def compile(self, region: Region, shapes: Shapes, sizes: Mapping[str, int | None]) -> Compiled:
        """The compiled region: called with its inputs (tensors and ints), it returns its outputs. Raises
        `RegionError`.
        """
        module = region_module(region, shapes)
        key = content_key("region", signature(module), str(sorted(sizes.items())), str(torch.get_num_threads()))
        self._report.regions += 1
        if key not in self._known:
            self._report.distinct_regions += 1
            self._known[key] = self._build(module, key, shapes)
        return self._known[key]

    def _build(self, module: fx.GraphModule, key: str, shapes: Shapes) -> Compiled:
        inputs = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]

        def build(path: Path) -> None:
            try:
                save_inductor_artifact(module, inputs, shapes.fakes, str(path))
            except inductor_errors() as error:
                raise RegionError(f"Inductor failed: {error}", where="\n" + signature(module)) from error

        compiled, hit = cached(cache_dir() / "regions" / key, build, lambda path: load_inductor_artifact(str(path)))
        self._report.count(hit)
        return compiled
