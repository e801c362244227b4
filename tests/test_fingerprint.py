"""The key of a model: equal for equal programs, different after every change, absent where something is hidden."""

import copy
import functools
import importlib
import logging
import os
import subprocess
import sys
import types

import pytest
import torch
from families import FAMILIES
from models import library, plain
from torch import nn

from accelc.fingerprint import fingerprint, model_key
from accelc.fingerprint_code import file_digest
from accelc.ir.errors import UncacheableError


def build() -> nn.Module:
    return library.build("llama")


@pytest.fixture(scope="module")
def key() -> str:
    return model_key(build(), max_length=32)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gemma2", "bloom", "gpt_oss", "nano_gpt"])
def test_equal_models_have_equal_keys_in_every_process(family: str) -> None:
    one, two = FAMILIES[family].build(), FAMILIES[family].build()
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.add_(1)
    assert model_key(one) == model_key(two)
    assert model_key(one.train()) == model_key(two.eval())


def test_the_key_does_not_depend_on_the_process() -> None:
    code = (
        "from models import library; from accelc.fingerprint import model_key;"
        "print(model_key(library.build('llama'), max_length=32, names=frozenset('abcdef')))"
    )
    keys = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.path.dirname(__file__)}
        keys.add(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)
    assert len(keys) == 1
    assert keys != {b""}


def change_configuration(model: nn.Module) -> None:
    model.config.rms_norm_eps = 1e-3


def change_attention(model: nn.Module) -> None:
    model.config._attn_implementation = "eager"


def change_attribute(model: nn.Module) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def change_buffer(model: nn.Module) -> None:
    model.model.rotary_emb.inv_freq[1] *= 1.5


def change_dtype(model: nn.Module) -> None:
    model.lm_head.half()


def tie(model: nn.Module) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def change_strides(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().t().contiguous().t())


def add_tensor(model: nn.Module) -> None:
    model.model.layers[1].self_attn.shift = torch.zeros(3)


def change_activation(model: nn.Module) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


@pytest.mark.parametrize(
    "change",
    [
        change_configuration, change_attention, change_attribute, change_buffer, change_dtype, tie, change_strides,
        add_tensor, change_activation,
    ],
)  # fmt: skip
def test_changes_change_the_key(change, key: str) -> None:
    model = build()
    change(model)
    assert model_key(model, max_length=32) != key


def test_facts_change_the_key(key: str) -> None:
    model = build()
    others = [
        model_key(model, max_length=33),
        model_key(model, max_length=32.0),
        model_key(model, max_length="32"),
        model_key(model, max_length=32, tree=True),
        model_key(model, length=32),
        model_key(model),
    ]
    assert len({key, *others}) == 7


def test_values_of_plain_tensors_count() -> None:
    models = []
    for value in (0.0, 1.0):
        model = build()
        model.model.shift = torch.full((3,), value)
        models.append(model_key(model))
    assert models[0] != models[1]


def test_classes_replaced_from_outside_are_seen(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaMLP.forward
    keys = {key}
    for factor in (2, 3):
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x, f=factor: original(self, x) * f)
        keys.add(model_key(build(), max_length=32))
    monkeypatch.undo()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *_: (q, k))
    keys.add(model_key(build(), max_length=32))
    monkeypatch.undo()
    assert len(keys) == 4
    assert model_key(build(), max_length=32) == key


def test_registered_attention_functions_are_seen(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    keys = {key}
    for scale in (1.0, 2.0):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda module, q, k, v, *_, s=scale, **__: (q * s, None))
        keys.add(model_key(build(), max_length=32))
    assert len(keys) == 3


SOURCE = """
import torch
from torch import nn
from {helper} import double
SCALE = 1.0
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
    def forward(self, ids):
        return double(self.embed(ids)) * SCALE
"""
HELPER = "def double(x):\n    return x * 2\n"


class Source:
    """A model class in files of its own that are edited and imported again."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.name = f"temporary_{folder.name.replace('-', '_')}"
        self.edit(SOURCE, HELPER)

    def edit(self, source: str, helper: str) -> None:
        (self.folder / f"{self.name}.py").write_text(source.format(helper=f"{self.name}_helper"))
        (self.folder / f"{self.name}_helper.py").write_text(helper)

    def load(self) -> type[nn.Module]:
        for name in (self.name, f"{self.name}_helper"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module(self.name).Model


@pytest.fixture
def source(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return Source(tmp_path)


def test_edits_of_a_class_and_of_what_it_calls_are_seen(source: Source) -> None:
    keys = [model_key(source.load()())]
    for text, helper in [
        (SOURCE.replace("SCALE = 1.0", "SCALE = 2.00"), HELPER),
        (SOURCE.replace("* SCALE", "+ SCALE"), HELPER),
        (SOURCE, HELPER.replace("x * 2", "x * 3")),
        (SOURCE, HELPER),
    ]:
        source.edit(text, helper)
        keys.append(model_key(source.load()()))
    assert keys[-1] == keys[0]
    assert len(set(keys)) == 4


def test_an_edit_after_the_import_does_not_pass_for_what_runs(source: Source) -> None:
    old = source.load()
    edited = SOURCE.replace("* SCALE", "+ SCALE")
    source.edit(edited, HELPER)
    stale = model_key(old())  # the file is new, the class is not
    assert stale != model_key(source.load()())


def test_file_digests_follow_the_content(tmp_path) -> None:
    file = tmp_path / "a.py"
    file.write_text("1")
    first = file_digest(str(file))
    file.write_text("2")
    os.utime(file, ns=(1, 1))
    assert file_digest(str(file)) != first


# -- what cannot be seen -----------------------------------------------------------------------------------------------


def patch_forward(model: nn.Module) -> None:
    layer = model.model.layers[0]
    layer.forward = types.MethodType(type(layer).forward, layer)


def hook(model: nn.Module) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)


def pre_hook(model: nn.Module) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args: args)


def parametrize(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.lm_head)


def unknown_object(model: nn.Module) -> None:
    model.model.layers[0].helper = object()


def hidden_module(model: nn.Module) -> None:
    model.model.layers[0].helpers = [nn.Linear(2, 2)]


def meta_buffer(model: nn.Module) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to("meta")


def closure(model: nn.Module) -> None:
    state = object()
    model.model.layers[0].helper = lambda: state


def bound_method(model: nn.Module) -> None:
    model.model.layers[0].helper = copy.Error().with_traceback


def without_source(model: nn.Module) -> None:
    namespace: dict[str, object] = {"nn": nn, "__name__": "nowhere"}
    exec("class Act(nn.Module):\n    def forward(self, x):\n        return x", namespace)
    model.model.layers[0].mlp.act_fn = namespace["Act"]()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (patch_forward, "forward is replaced on the instance"),
        (hook, "a forward hook"),
        (pre_hook, "a forward hook"),
        (parametrize, "a parametrization"),
        (unknown_object, "an object of type object"),
        (hidden_module, "a Linear that is no submodule"),
        (meta_buffer, "meta device"),
        (closure, "an object of type object"),
        (bound_method, "an object of type"),
        (without_source, "the source of class Act is not known"),
    ],
)
def test_what_cannot_be_seen_is_not_cacheable(change, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    change(model)
    with pytest.raises(UncacheableError, match=reason):
        model_key(model)
    with caplog.at_level(logging.INFO):
        assert fingerprint(model) is None
    assert reason in caplog.text


def test_hooks_for_all_modules_are_noticed() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        assert fingerprint(build()) is None
    finally:
        handle.remove()
    assert fingerprint(build()) is not None


def test_unknown_facts_are_not_cacheable() -> None:
    assert fingerprint(build(), option=object()) is None


def test_known_containers_are_cacheable() -> None:
    model = plain.build(plain.FusedAttention)
    before = model_key(model)
    model.options = {"act": functools.partial(torch.nn.functional.gelu, approximate="tanh"), "kinds": {1, 2}}
    one = model_key(model)
    model.options["act"] = functools.partial(torch.nn.functional.gelu, approximate="none")
    assert len({before, one, model_key(model)}) == 3


def test_capturing_a_model_leaves_its_key_alone() -> None:
    """transformers replaces shared parts of a configuration by equal copies meanwhile."""
    from accelc.capture import capture

    model = build()
    before = model_key(model)
    capture(model, max_length=32)
    assert model_key(model) == before


def test_containers_that_hold_themselves_end() -> None:
    model = nn.Linear(2, 2)
    model.extra = [1, {"again": None}]
    model.extra[1]["again"] = model.extra
    other = nn.Linear(2, 2)
    other.extra = [1, {"again": [1]}]
    assert model_key(model) == model_key(model)
    assert model_key(model) != model_key(other)
