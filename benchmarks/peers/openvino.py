"""OpenVINO's CPU plugin, on the same weights converted to a model that keeps its cache as state.

The model has the form that optimum-intel exports and OpenVINO GenAI runs, so that the plugin's attention with a cache
inside matches it. (optimum-intel itself, up to 2.2, cannot be imported with transformers 5.6 or later.)
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelc.demo.contenders import Generate
from peers import Job, Peer, timed

PEER = Peer("OpenVINO", requires=("openvino",), dtypes=("fp32", "bf16", "int8"), copies=3)


def prepare(job: Job) -> Path:
    """Convert the transformers directory, once. The file is fp32, which holds bf16 weights exactly."""
    path = job.work / f"{job.path.name}.openvino" / "model.xml"
    if not path.exists():
        import openvino

        converted = _convert(job)
        if job.dtype == "int8":
            _compress(converted)
        openvino.save_model(converted, path, compress_to_fp16=False)
    return path


def build(job: Job, prepared: Path) -> Generate:
    import numpy as np
    import openvino

    precision = "bf16" if job.dtype == "bf16" else "f32"
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": job.threads,
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,  # 8 bits unless told otherwise
        "CACHE_DIR": os.environ["BENCHMARK_CACHE_DIR"],
    }
    request = openvino.Core().compile_model(prepared, "CPU", settings).create_infer_request()

    def stream(ids: list[int]) -> Iterator[int]:
        request.reset_state()
        position = 0
        while True:
            request.infer(
                {
                    "input_ids": np.array([ids]),
                    "position_ids": np.arange(position, position + len(ids))[None],
                    "beam_idx": np.zeros(1, np.int32),
                },
                share_inputs=True,
            )
            position += len(ids)
            ids = [int(request.get_output_tensor().data.argmax())]
            yield ids[0]

    return lambda prompt, new_tokens: timed(stream(prompt[0].tolist()), new_tokens)


def _convert(job: Job) -> Any:
    """An `openvino.Model` from input_ids and position_ids [1, N] int64 to logits [1, 1, V]."""
    import openvino
    import torch
    from openvino._offline_transformations import apply_make_stateful_transformation
    from shapes import load_model
    from transformers import DynamicCache

    model = load_model(job.path).float()

    class Step(torch.nn.Module):
        """One step with the cache as inputs and outputs [1, Hk, T, D]."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids, position_ids, *past):
            cache = DynamicCache(config=self.model.config)
            for layer, key, value in zip(cache.layers, past[::2], past[1::2], strict=True):
                layer.lazy_initialization(key, value)
                layer.keys, layer.values = key, value  # `update` would join them to an empty tensor of one axis
            slots = torch.arange(past[0].shape[2] + input_ids.shape[1])
            hidden = slots > position_ids[:, None, :, None]  # [1, 1, N, T + N]
            mask = hidden * torch.finfo(torch.float32).min
            logits = self.model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            return logits, *[part for layer in cache.layers for part in (layer.keys, layer.values)]

    caches = [f"{part}.{i}" for i in range(job.shape.layers) for part in ("key", "value")]
    heads, width = job.shape.kv_heads, job.shape.hidden // job.shape.heads
    example = [
        torch.ones(1, 2, dtype=torch.int64),
        torch.tensor([[3, 4]]),
        *[torch.zeros(1, heads, 3, width)] * len(caches),
    ]
    inputs = ["input_ids", "position_ids", *(f"past.{name}" for name in caches)]
    shapes = [openvino.PartialShape(shape) for shape in ([1, -1], [1, -1], *[[1, heads, -1, width]] * len(caches))]
    with torch.no_grad():
        converted = openvino.convert_model(Step().eval(), example_input=tuple(example))
    for port, name, shape in zip(converted.inputs, inputs, shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(shape)
    for port, name in zip(converted.outputs, ["logits", *(f"present.{name}" for name in caches)], strict=True):
        port.get_tensor().set_names({name})
    converted.validate_nodes_and_infer_types()
    _gather_by_beam(converted, inputs[2:])
    apply_make_stateful_transformation(converted, {f"past.{name}": f"present.{name}" for name in caches})
    _start_empty(converted, (1, heads, 0, width))
    return converted


def _gather_by_beam(model: Any, caches: list[str]) -> None:
    """Reorder the caches by an input `beam_idx`: without it the plugin does not recognise its attention."""
    import openvino
    from openvino import opset13

    beam = opset13.parameter(name="beam_idx", dtype=openvino.Type.i32, shape=openvino.PartialShape([1]))
    beam.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beam])
    for name in caches:
        port = model.input(name)
        consumers = port.get_target_inputs()
        gathered = opset13.gather(port, beam, opset13.constant(0))
        for consumer in consumers:
            consumer.replace_source_output(gathered.output(0))
    model.validate_nodes_and_infer_types()


def _start_empty(model: Any, shape: tuple[int, ...]) -> None:
    """Give every cache its first value, of no tokens."""
    import numpy as np
    from openvino import opset13

    empty = opset13.constant(np.zeros(shape, np.float32))
    for op in model.get_ops():
        if op.get_type_name() == "ReadValue":
            op.set_arguments([empty])
    model.validate_nodes_and_infer_types()


def _compress(model: Any) -> None:
    """Weights of products in 8 bits a row, symmetric, in the form that the plugin's kernels for such weights take."""
    import numpy as np
    from openvino import opset13

    for op in model.get_ops():
        if op.get_type_name() != "MatMul" or op.input_value(1).get_node().get_type_name() != "Constant":
            continue
        weight = op.input_value(1).get_node().data  # [N, K], or [K, N]
        rows = 1 if op.get_attributes()["transpose_b"] else 0  # the axis that a row's scale is common to
        scale = np.maximum(np.abs(weight).max(axis=rows, keepdims=True), 1e-12) / 127
        codes = opset13.constant(np.clip(np.rint(weight / scale), -127, 127).astype(np.int8))
        floats = opset13.convert(codes, "f32")
        op.input(1).replace_source_output(
            opset13.multiply(floats, opset13.constant(scale.astype(np.float32))).output(0)
        )
    model.validate_nodes_and_infer_types()
