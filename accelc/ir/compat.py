"""The only module that touches private torch modules; works on torch 2.11 and 2.13."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

# -- torch.compile backend: Inductor as a library ----------------------------------------------------------------------
# Inductor is imported inside the functions: it takes seconds, and decoding an artifact does not need it.


def compile_with_inductor(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    options: Mapping[str, object] | None = None,
    rewrite: Callable[[fx.Graph], None] | None = None,
    cache_key: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph of dynamo with Inductor, as ``backend="inductor"`` does, `options` being Inductor's.

    ``rewrite`` gets each inference graph (functional ATen, decomposed, writes to inputs as ``copy_`` at the end) before
    Inductor's own passes, and may replace the graph of its owning module. ``cache_key`` identifies what `rewrite` does;
    without one, nothing is read from or written to torch's compile caches.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass

    if rewrite is None:
        return compile_fx(module, inputs, config_patches=dict(options or {}))
    installed = (options or {}).get("joint_custom_pre_pass", config.joint_custom_pre_pass)
    others: list[Any] = (
        [] if installed is None else list(installed) if isinstance(installed, list | tuple) else [installed]
    )

    chosen: Callable[[fx.Graph], None] = rewrite

    class Rewrite(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            owner = graph.owning_module
            for other in others:
                other(owner.graph)
            with _disable_current_modes():  # a fake mode is active, in which no pass could touch a real tensor
                chosen(owner.graph)

        def uuid(self) -> object | None:
            keys = [cache_key, *(getattr(other, "uuid", lambda: None)() for other in others)]
            return None if None in keys else tuple(map(str, keys))

    return compile_fx(module, inputs, config_patches={**(options or {}), "joint_custom_pre_pass": Rewrite()})


def compile_whole(module: fx.GraphModule) -> Callable[..., Any]:
    """A graph module by torch.compile, without a break; for each batch that it meets, the second one on for any. Values
    are rounded where the graph says so.
    """
    from torch._inductor import config

    options = {"emulate_precision_casts": True} if hasattr(config, "emulate_precision_casts") else {}
    return torch.compile(module, fullgraph=True, options=options)


def inductor_options() -> frozenset[str]:
    """The names of Inductor's options."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def is_joint_graph(graph: fx.Graph) -> bool:
    """Whether a graph contains a backward pass: the partitioner knows its gradients by this name too."""
    return any(n.op == "placeholder" and str(n.target).startswith("tangents") for n in graph.nodes)


def is_decomposed(target: object) -> bool:
    """Whether Inductor has a decomposition for an operation, and so no lowering."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import lowerings

    return target in select_decomp_table() and target not in lowerings


def trace_decomposed(function: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule:
    """Trace `function` on fake values into ATen, decomposed as Inductor wants it."""
    from torch._inductor.decomposition import select_decomp_table

    with enable_python_dispatcher():
        return make_fx(function, decomposition_table=select_decomp_table(), _allow_non_fake_inputs=True)(*values)


@contextmanager
def on_fakes(mode: Any) -> Iterator[None]:
    """Run operators on fake tensors of a mode, with torch's decompositions in Python.

    Those in C++ turn symbolic sizes into numbers in some versions (matmul in 2.11).
    """
    with enable_python_dispatcher(), mode or nullcontext(), torch.no_grad():
        yield


def fill_values(graph: fx.Graph, module: torch.nn.Module) -> None:
    """Compute the fake value ``meta["val"]`` of every node that has none; placeholders must have theirs."""
    mode = detect_fake_mode([n.meta.get("val") for n in graph.nodes if n.op == "placeholder"])
    with on_fakes(mode):
        for node in graph.nodes:
            if "val" in node.meta:
                continue
            if node.op == "get_attr":
                tensor = module.get_buffer(node.target)
                node.meta["val"] = mode.from_tensor(tensor, static_shapes=True) if mode else tensor
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)


def is_module_tensor(node: fx.Node) -> bool:
    """Whether a placeholder of a dynamo graph is a parameter or buffer of a module, not a tensor that a user passes."""
    tensor_dict = node.meta.get("tensor_dict") or {}
    return tensor_dict.get("_dynamo_static_input_type") == "unguarded"


def module_path(node: fx.Node) -> tuple[str, str]:
    """The variable that holds the module of a parameter or buffer, a placeholder of a dynamo graph, and its name in the
    module, as in ``state_dict``; empty where that cannot be told.
    """
    source = getattr(getattr(node, "_dynamo_source", None), "name", "")
    text = source() if callable(source) else str(source)  # a property since torch 2.12
    parts = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", text)
    owner = re.match(r"\w+\['(\w+)'\]\._", text)
    return owner[1] if owner else "", ".".join(parts)


def with_attributes(gm: fx.GraphModule, tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """A copy of a dynamo graph in which the placeholders named in `tensors` are attributes that hold these tensors.

    A copy, because dynamo reads the placeholders of its own graph again to know what to pass.
    """
    graph = fx.Graph()
    module = fx.GraphModule(gm, graph)
    module.meta = dict(gm.meta)
    sources = module._param_name_to_source = dict(gm._param_name_to_source)  # read by AOT autograd, for guards
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.name in tensors:
            tensor = tensors[node.name]
            parameter = isinstance(tensor, torch.nn.Parameter)
            (module.register_parameter if parameter else module.register_buffer)(node.name, tensor)
            sources[node.name] = node._dynamo_source
            env[node] = graph.get_attr(node.name)
            env[node].meta = dict(node.meta)
            continue
        if node.op == "get_attr" and not hasattr(module, str(node.target)):
            setattr(module, str(node.target), getattr(gm, str(node.target)))
        env[node] = graph.node_copy(node, env.__getitem__)
        if node.op == "placeholder":
            env[node]._dynamo_source = node._dynamo_source
    module.recompile()
    return module


def attribute_of(node: fx.Node) -> str | None:
    """The attribute that a placeholder of an AOT graph stands for, None when it is an argument."""
    return getattr(node.meta.get("desc"), "target", None)


def is_top_level(graph: fx.Graph) -> bool:
    """Whether an AOT graph is a whole graph, not the body of a higher-order operation: only those describe outputs."""
    return "desc" in graph.output_node().meta


# -- fake values -------------------------------------------------------------------------------------------------------


def symbols_in(size: torch.SymInt) -> dict[str, tuple[int, int, int]]:
    """The symbols of a size by name, each with its hint, least and greatest value (2**40 where there is no bound)."""
    env = size.node.shape_env
    hints = getattr(env, "backed_var_to_val", None) or env.var_to_val  # the former since torch 2.12
    found = {}
    for symbol in size.node.expr.free_symbols:
        least, most = env.var_to_range[symbol].lower, env.var_to_range[symbol].upper
        found[str(symbol)] = (int(hints[symbol]), int(least), int(most) if most.is_Integer else 1 << 40)
    return found


def symbolic_values(
    described: Sequence[Any], symbols: Mapping[str, tuple[int, int, int]]
) -> list[torch.Tensor | torch.SymInt | int | None]:
    """Fake placeholder values in one new fake mode.

    `described` holds (shape, dtype, device), sizes, or None; sizes are ints or expressions over the names in `symbols`,
    which gives for each name its hint, least and greatest value.
    """
    import sympy
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
    from torch.utils._sympy.value_ranges import ValueRanges

    env = ShapeEnv()
    sizes: dict[str, torch.SymInt] = {}
    for name, (hint, least, most) in symbols.items():
        source = ConstantSource(name)
        # Without a zero-one specialisation the range is ours to state.
        symbol = env.create_symbol(
            hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None, do_not_specialize_zero_one=True
        )
        env.var_to_range[symbol] = ValueRanges(least, most)
        sizes[name] = env.create_symintnode(symbol, hint=hint, source=source)

    def size(value: int | str) -> Any:
        return sympy.lambdify(list(sizes), value)(*sizes.values()) if isinstance(value, str) else value

    values: list[torch.Tensor | torch.SymInt | int | None] = []
    with FakeTensorMode(shape_env=env, allow_non_fake_inputs=True):
        for one in described:
            if isinstance(one, tuple):
                shape, dtype, device = one
                values.append(torch.empty([size(n) for n in shape], dtype=dtype, device=device))
            else:
                values.append(size(one))
    return values


@contextmanager
def fake_execution(values: Sequence[Any]) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Run operators on fakes, in the mode of `values`; yields what turns a real tensor into a static fake of it."""
    mode = detect_fake_mode(list(values))
    with on_fakes(mode):
        yield lambda tensor: mode.from_tensor(tensor, static_shapes=True)


# -- code generation: symbolic shapes, the C++ toolchain, Inductor for regions -----------------------------------------


class FakeShapes:
    """A fake tensor mode with named symbolic sizes (each at least 2)."""

    def __init__(self, names: Sequence[str]) -> None:
        from torch._dynamo.source import ConstantSource
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

        self.env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.symbols: dict[str, Any] = {}
        self._bare: dict[str, Any] = {}
        for index, name in enumerate(names):
            hint = (5, 7, 11, 13)[index]  # distinct primes: no accidental equality decides a branch
            source = ConstantSource(name)
            symbol = self.env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
            self._bare[name] = symbol
            self.symbols[name] = self.env.create_symintnode(symbol, hint=hint, source=source)

    def empty(self, shape: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous fake tensor."""
        with self.mode:
            return torch.empty(tuple(shape), dtype=dtype)

    def constant(self, value: torch.Tensor) -> torch.Tensor:
        """The fake of a tensor of fixed shape; views and strides as they are."""
        return self.mode.from_tensor(value.detach(), static_shapes=True)

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether everything assumed about the symbols so far is true at `sizes`."""
        if any(symbol in self.env.replacements for symbol in self._bare.values()):
            return False  # an operation forced a symbol to one value
        given = {symbol: sizes[name] for name, symbol in self._bare.items()}
        return all(size >= 2 for size in given.values()) and all(
            bool(guard.expr.xreplace(given)) for guard in self.env.guards
        )

    def evaluate(self, value: Any, sizes: Mapping[str, int]) -> int:
        """A symbolic int as a number."""
        return int(value.node.expr.xreplace({symbol: sizes[name] for name, symbol in self._bare.items()}))


def fake_shapes(names: Sequence[str]) -> FakeShapes:
    """Fresh symbols of these names and a fake mode that knows them."""
    return FakeShapes(names)


def storage_key(value: torch.Tensor) -> int:
    """Equal for (fake) tensors that share storage, while they live."""
    return value.untyped_storage()._cdata


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would use, or None."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return None


INDUCTOR_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What Inductor raises when it cannot compile a graph: besides its own errors (RuntimeErrors), whatever escapes it."""


def save_inductor_artifact(module: fx.GraphModule, inputs: Sequence[Any], fakes: FakeShapes, path: str) -> None:
    """Compile a graph whose placeholders carry fakes of `fakes`, symbolic sizes included, into one file."""
    from torch._inductor import config, standalone_compile

    # Traced first: torch's caches accept ATen operations, and no Python functions such as the dialect's references.
    with on_fakes(fakes.mode):
        flat = trace_decomposed(module, inputs)
    # The harness is a main program in the generated file, for which torch 2.11 looks up sizes that it does not know.
    with torch.no_grad(), config.patch(benchmark_harness=False):
        standalone_compile(flat, list(inputs), dynamic_shapes="from_graph").save(path=path, format="binary")


def load_inductor_artifact(path: str) -> Callable[..., Any]:
    """What `save_inductor_artifact` wrote. OSError or ValueError: the file is damaged."""
    import pickle

    from torch._inductor import CompiledArtifact

    try:
        return CompiledArtifact.load(path=path, format="binary")
    except (AssertionError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"not a compiled region: {error}") from error


@contextmanager
def mask_hint_unasked() -> Iterator[None]:
    """Keep `nn.TransformerEncoder` from comparing its mask with a causal one, which a trace cannot do.

    The outcome is only a hint: whether it is given or not, the layers apply the mask itself.
    """
    from torch.nn.modules import transformer

    asked = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True  # type: ignore[assignment]
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = asked


def lazy_graph_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module whose Python code is generated at its first call as a function."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)
