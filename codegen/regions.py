"""Regions of operations without a kernel here, and what runs them.

The rule: a region with fewer than `Options.fuse` fusible operations runs node by node, one call of torch each; a larger
one is compiled by Inductor. Importing Inductor and compiling a region take seconds, a call of torch on the small
tensors of a step takes microseconds: routing to experts is never worth a compiler, a long element-wise chain is.

Parameters are arguments of a region, so that the same part of every layer is one compiled artifact; artifacts are
files in the cache and hold no weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from accelc.codegen.cache import cache_dir, cached, content_key
from accelc.codegen.errors import RegionError
from accelc.codegen.options import Options, Report
from accelc.codegen.schedule import Region
from accelc.codegen.symbolic import Symbolic, SymbolicValues
from accelc.ir.compat import INDUCTOR_ERRORS, load_inductor_artifact, save_inductor_artifact
from accelc.ir.dialect import REFERENCES

Compiled = Callable[..., Sequence[torch.Tensor]]


def region_module(region: Region, symbolic: Symbolic | None = None) -> fx.GraphModule:
    """The region as a graph of its own: inputs become placeholders, dialect operations their references.

    With `symbolic`, nodes get their symbolic values, and each symbol a placeholder in front of the inputs: a region
    may use a size that none of its inputs has.
    """
    graph = fx.Graph()
    remap: dict[fx.Node, fx.Node] = {}
    for name, size in (symbolic.fakes.symbols if symbolic else {}).items():
        graph.placeholder(f"size_{name}").meta["val"] = size
    for index, node in enumerate(region.inputs):
        remap[node] = graph.placeholder(f"input_{index}")
    for node in region.nodes:
        copy = graph.node_copy(node, remap.__getitem__)
        copy.name = f"value_{len(remap)}"
        copy.target = REFERENCES.get(node.target, node.target)
        remap[node] = copy
    for node, copy in remap.items():
        copy.meta = {"val": symbolic.values[node]} if symbolic else {}
    graph.output(tuple(remap[n] for n in region.outputs))
    return fx.GraphModule(torch.nn.Module(), graph)


def signature(module: fx.GraphModule) -> str:
    """Equal for regions of equal structure, shapes, strides and dtypes."""
    lines = []
    for node in module.graph.nodes:
        form = _form(node.meta.get("val")) if node.op == "placeholder" else ""
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


def fusible(node: fx.Node) -> bool:
    """Whether Inductor would merge the operation with its neighbours."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


class Regions:
    """Makes regions runnable, each structure once."""

    def __init__(self, options: Options, report: Report, symbolic: SymbolicValues) -> None:
        self._options, self._report, self._symbolic = options, report, symbolic
        self._known: dict[str, Compiled] = {}

    def compile(self, region: Region, sizes: Mapping[str, int]) -> tuple[Compiled, bool]:
        """What runs the region at `sizes`: called with its inputs (tensors and numbers), it returns its outputs. And
        whether that is Inductor's; a region that Inductor fails on runs node by node, with a notice.
        """
        if sum(map(fusible, region.nodes)) >= self._options.fuse:
            try:
                return self._inductor(region, sizes), True
            except RegionError as error:
                self._report.notice(f"a region runs node by node: {error}")
        return self._eager(region), False

    def _eager(self, region: Region) -> Compiled:
        module = region_module(region)
        return self._known.setdefault(signature(module), module.forward)

    def _inductor(self, region: Region, sizes: Mapping[str, int]) -> Compiled:
        try:
            symbolic = self._symbolic.at(sizes)
            module = region_module(region, symbolic)
        except INDUCTOR_ERRORS as error:
            raise RegionError(f"its shapes have no symbolic form: {error}", where=_nodes(region)) from error
        named = str(sorted(symbolic.sizes.items()))
        key = content_key("region", signature(module), named, str(torch.get_num_threads()))
        if key not in self._known:
            self._known[key] = self._build(region, module, key, symbolic)
        return functools.partial(self._known[key], *(sizes[name] for name in symbolic.fakes.symbols))

    def _build(self, region: Region, module: fx.GraphModule, key: str, symbolic: Symbolic) -> Compiled:
        inputs = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]

        def build(path: Path) -> None:
            save_inductor_artifact(module, inputs, symbolic.fakes, str(path))

        try:
            compiled, hit = cached(cache_dir() / "regions" / key, build, lambda path: load_inductor_artifact(str(path)))
        except INDUCTOR_ERRORS as error:
            raise RegionError(f"Inductor failed: {type(error).__name__}: {error}", where=_nodes(region)) from error
        self._report.count(hit)
        return compiled


def _nodes(region: Region) -> str:
    return f"{region.nodes[0].name} .. {region.nodes[-1].name} ({len(region.nodes)} nodes)"
