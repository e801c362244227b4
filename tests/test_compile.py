"""accelc.compile: defaults, named errors, the program cache, the report."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from greedy import reference
from torch import Tensor, nn

import accelc
from accelc.ir.errors import (
    AccelcError,
    CaptureError,
    ExactnessError,
    InputError,
    MetaDeviceError,
    NoLogitsError,
    PassError,
    PromptTooLongError,
    UnknownOptionError,
    UnknownPassError,
)

PROMPT = torch.tensor([5, 9, 11, 4])


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACCELC_CACHE_DIR", str(tmp_path))
    return tmp_path


class Returns(nn.Module):
    """A bigram model whose forward wraps its logits in something."""

    def __init__(self, wrap: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 11)
        self.wrap = wrap

    def forward(self, ids: Tensor) -> object:
        return self.wrap(self.table(ids))  # type: ignore[operator]


class Counting(nn.Module):
    """Scores depend on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.calls = nn.Embedding(11, 11), 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.table(ids) * self.calls


def test_what_a_model_remembers_between_calls_is_not_taken_for_constant() -> None:
    with pytest.raises(CaptureError, match="counters"):
        accelc.compile(Counting(), max_length=16, cache=False)


def test_generate_is_what_the_model_says() -> None:
    model = FAMILIES["llama"].build()
    decoder = accelc.compile(model, max_length=64, cache=False)
    got = decoder.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
    assert got.tokens[0].tolist() == reference(model, PROMPT, 20)
    assert model.training is False


def test_weights_are_shared_with_the_model() -> None:
    model = FAMILIES["llama"].build()
    decoder = accelc.compile(model, max_length=32, cache=False)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tensors = decoder.programs["step"].tensors()
    mine = {t.untyped_storage().data_ptr() for name, t in tensors.items() if not name.startswith("accelc_tables")}
    assert mine <= own | {b.untyped_storage().data_ptr() for b in model.buffers()}


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, None), lambda x: {"logits": x}], ids=["tensor", "tuple", "dict"]
)
def test_forwards_may_return_logits_in_several_ways(wrap: object) -> None:
    model = Returns(wrap)
    decoder = accelc.compile(model, max_length=16, cache=False)
    table = model.table.weight.argmax(-1)
    assert decoder.generate([3], max_new_tokens=2).tokens[0].tolist() == [int(table[3]), int(table[table[3]])]


def test_second_compilation_takes_the_programs_from_the_cache(fresh_cache: Path) -> None:
    model = FAMILIES["gpt2"].build()
    first = accelc.compile(model, max_length=48)
    second = accelc.compile(FAMILIES["gpt2"].build(), max_length=48)
    assert "capture" in first.report.seconds
    assert "capture" not in second.report.seconds
    assert any("from the cache" in notice for notice in second.report.notices)
    tokens = [d.generate(PROMPT, max_new_tokens=24, ignore_eos=True).tokens[0].tolist() for d in (first, second)]
    assert tokens[0] == tokens[1]
    assert "capture" in accelc.compile(model, max_length=40).report.seconds, "another length is another program"


def test_default_length_is_the_models_own() -> None:
    assert accelc.compile(FAMILIES["llama"].build(), cache=False, check="off", backend="eager").max_length == 256
    with pytest.raises(InputError, match="max_length is not given"):
        accelc.compile(Returns(lambda x: x), cache=False)


def test_bad_options_are_named() -> None:
    model = Returns(lambda x: x)
    with pytest.raises(UnknownOptionError, match="max_lenght"):
        accelc.compile(model, max_lenght=16)
    with pytest.raises(UnknownPassError, match="no_such_pass"):
        accelc.compile(model, max_length=16, disable=["no_such_pass"], cache=False)
    with pytest.raises(InputError, match="backend"):
        accelc.compile(model, max_length=16, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="check"):
        accelc.compile(model, max_length=16, check="maybe")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_length"):
        accelc.compile(model, max_length=1)
    wrong = {"max_length": "16", "max_batch": 0, "disable": "normalise", "require": "exact", "passes": ["x"]}
    others = {"disable": 3, "passes": 3, "cache": "yes", "verify": "x", "tokenizer": 3, "progress": True}
    for option in ({name: value} for values in (wrong, others) for name, value in values.items()):
        with pytest.raises(InputError, match=next(iter(option))):
            accelc.compile(model, **{"max_length": 16, **option})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        accelc.compile(lambda ids: ids, max_length=16)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="make no step") as raised:
        accelc.compile(model, max_length=16, disable=["derive_step"])
    assert "derive_step" in raised.value.remedy


def test_bad_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(MetaDeviceError, match="meta"):
        accelc.compile(Returns(lambda x: x).to("meta"), max_length=16)
    with pytest.raises(InputError, match="ScriptModule"):
        accelc.compile(torch.jit.trace(nn.Embedding(11, 11), torch.tensor([[1]])), max_length=16)
    with pytest.raises(NoLogitsError, match=r"\[2, 11\]"):
        accelc.compile(Returns(lambda x: x.mean(1)), max_length=16)
    with pytest.raises(CaptureError, match="depends on values of tensors"):
        accelc.compile(Returns(lambda x: x * (2 if x.sum() > 0 else 3)), max_length=16)
    with pytest.raises(InputError, match=r"config\.json"):
        accelc.compile(tmp_path, max_length=16)


def test_a_guarantee_is_required_before_any_pass_runs() -> None:
    from dataclasses import dataclass
    from typing import ClassVar

    from accelc.ir import Exactness, Program
    from accelc.passes import Pass, PassResult

    @dataclass(frozen=True)
    class Rough(Pass):
        name: ClassVar[str] = "test.rough"
        after: ClassVar[tuple[str, ...]] = ("derive_step",)
        exactness: ClassVar[Exactness] = Exactness.LOSSY

        def run(self, program: Program) -> PassResult:
            return PassResult(program.clone(), 1)

    model = FAMILIES["llama"].build()
    with pytest.raises(ExactnessError, match=r"test\.rough is lossy|would not be"):
        accelc.compile(model, max_length=32, passes=[Rough()], cache=False)
    decoder = accelc.compile(
        model, max_length=32, passes=[Rough()], cache=False, require=Exactness.LOSSY, backend="eager", check="off"
    )
    assert decoder.programs["step"].exactness is Exactness.LOSSY


def test_stages_are_announced_as_they_begin(fresh_cache: Path) -> None:
    stages: list[str] = []
    model = FAMILIES["llama"].build()
    decoder = accelc.compile(model, max_length=16, quantize="int8", progress=stages.append)
    first = ["cache", "capture", "passes", "codegen", "check", "cache", "quantize", "codegen", "check", "codegen"]
    assert stages == first
    assert set(decoder.report.seconds) == set(stages)
    stages.clear()
    accelc.compile(model, max_length=16, progress=stages.append)
    assert stages == ["cache", "codegen", "check", "codegen"]


def test_report_names_passes_caches_and_check() -> None:
    text = str(accelc.compile(FAMILIES["bloom"].build(), max_length=32, cache=False))
    for word in ("derive_step", "causal with ALiBi slopes", "bytes a token", "token by token", "capture"):
        assert word in text


def test_decoder_is_usable_after_an_error() -> None:
    model = FAMILIES["llama"].build()
    decoder = accelc.compile(model, max_length=16, cache=False)
    with pytest.raises(PromptTooLongError):
        decoder.generate(torch.arange(1, 30), max_new_tokens=4)
    for bad in (
        torch.tensor([500]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([1.5]),
        torch.zeros(1, 1, 1).long(),
    ):
        with pytest.raises(AccelcError):
            decoder.generate(bad, max_new_tokens=2)
    assert decoder.generate(PROMPT, max_new_tokens=8, ignore_eos=True).tokens[0].tolist() == reference(model, PROMPT, 8)


def test_verify_compares_each_pass_with_the_program_before() -> None:
    decoder = accelc.compile(FAMILIES["mistral"].build(), max_length=32, verify=True, check="off", backend="eager")
    notes = {record.name: " ".join(record.notes) for record in decoder.programs["step"].history}
    for name in ("normalise", "raise_norms", "raise_attention", "recognise_masks"):
        assert "logits" in notes[name], f"{name}: {notes[name]}"
    assert "not compared" in notes["derive_step"]


def test_verify_names_the_pass_that_breaks_the_program() -> None:
    from dataclasses import dataclass
    from typing import ClassVar

    from accelc.ir import Program
    from accelc.ir.errors import VerifyError
    from accelc.passes import Pass, PassResult

    @dataclass(frozen=True)
    class Halves(Pass):
        name: ClassVar[str] = "test.halves"
        after: ClassVar[tuple[str, ...]] = ("recognise_masks",)

        def run(self, program: Program) -> PassResult:
            program = program.clone()
            node = next(n for n in program.graph.nodes if n.target is torch.ops.accelc.attention.default)
            node.args = (*node.args[:11], node.args[11] / 2, node.args[12])
            return PassResult(program, 1)

    with pytest.raises(VerifyError, match=r"test\.halves"):
        accelc.compile(FAMILIES["llama"].build(), max_length=32, passes=[Halves()], verify=True, backend="eager")


def test_a_cached_program_is_confirmed_before_it_is_used(fresh_cache: Path) -> None:
    """What the key cannot see, here a class attribute of another class, shows in the logits."""

    class Scaled(Returns):
        def forward(self, ids: Tensor) -> object:
            return self.table(ids) * SETTINGS["sign"]

    model = Scaled(lambda x: x)
    first = accelc.compile(model, max_length=16).generate([3], max_new_tokens=4).tokens[0].tolist()
    SETTINGS["sign"] = -1.0
    try:
        second = accelc.compile(model, max_length=16).generate([3], max_new_tokens=4).tokens[0].tolist()
        third = accelc.compile(model, max_length=16)
    finally:
        SETTINGS["sign"] = 1.0
    token, expected = 3, []
    for _ in range(4):
        token = int((-model.table.weight[token]).argmax())
        expected.append(token)
    assert second == expected
    assert first != second
    assert any("from the cache" in notice for notice in third.report.notices)  # the entry was replaced


SETTINGS = {"sign": 1.0}


def test_a_module_without_parameters_and_one_that_wants_more_arguments() -> None:
    class Counts(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.one_hot(ids, 7).float().cumsum(1)

    class Needs(nn.Module):
        def forward(self, ids: Tensor, other: Tensor) -> Tensor:
            return ids[..., None] * other

    decoder = accelc.compile(Counts(), max_length=16, cache=False)
    assert decoder.generate([2, 2, 5], max_new_tokens=2).tokens[0].tolist() == [2, 2]
    with pytest.raises(CaptureError, match="other"):
        accelc.compile(Needs(), max_length=16)


def test_eos_is_checked_and_an_id_of_the_configuration_that_cannot_occur_is_noted() -> None:
    model = Returns(lambda x: x)
    for wrong in ("a", 1.5, [-1], True):
        with pytest.raises(InputError, match="eos"):
            accelc.compile(model, max_length=16, eos=wrong, cache=False, backend="eager")  # type: ignore[arg-type]
    model = FAMILIES["gpt2"].build()
    model.generation_config.eos_token_id = [3, 50256]
    decoder = accelc.compile(model, max_length=16, cache=False, backend="eager", check="off")
    assert decoder.eos == {3}
    assert any("50256" in notice and "97" in notice for notice in decoder.report.notices)


def test_torchs_default_dtype_changes_nothing() -> None:
    """As those set it who make models in half precision."""
    model, ids = FAMILIES["llama"].build(), torch.arange(3, 43)
    text = accelc.Calibration.of_text(ids, rows=2, length=16)
    options = (None, accelc.QuantizeWeights("int8:g32", method="gptq", calibration=text))

    def tokens() -> list[Tensor]:
        decoders = [accelc.compile(model, max_length=300, quantize=one, cache=False) for one in options]
        return [decoder.generate(ids[:5], max_new_tokens=9).tokens[0] for decoder in decoders]

    wanted, kept = tokens(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = tokens()
    finally:
        torch.set_default_dtype(kept)
    assert all(torch.equal(one, other) for one, other in zip(wanted, got, strict=True))
