"""Speculative decoding end to end: the tokens of plain decoding, whatever drafts, samples, stops and streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES

import accelc
from accelc.ir import Exactness
from accelc.ir.errors import DraftError, ExactnessError, InputError, NonFiniteLogitsError, TreeError
from accelc.runtime import SamplingParams
from accelc.runtime.session import TappedChunk
from accelc.runtime.speculation.acceptance import Typical
from accelc.runtime.speculation.draft import (
    DRAFTERS,
    Draft,
    Drafter,
    DraftKind,
    Proposer,
    Setting,
    Source,
    Text,
    register_drafter,
)
from accelc.runtime.speculation.prompt_lookup import PromptLookup
from accelc.runtime.speculation.target import TargetSampler
from accelc.runtime.speculation.token_recycling import TokenRecycling
from accelc.runtime.speculation.trees import Tree

PROMPTS = [[5, 9, 11, 4, 5, 9], [7], [3, 4, 3, 4, 3, 4, 3, 4, 8]]
SMALL = Tree.of_paths([(0,), (1,), (0, 0), (0, 1), (0, 0, 0), (1, 0)])
DRAFTS = [PromptLookup(tokens=5), TokenRecycling(SMALL)]


@register_drafter
@dataclass(frozen=True)
class Oracle(Drafter):
    """Drafts what it was told will come, from `behind` tokens on; a drafter of somebody else."""

    name = "tests.oracle"
    kind = DraftKind.DETERMINISTIC

    sequences: tuple[tuple[int, ...], ...] = ()
    length: int = 4

    def bind(self, setting: Setting) -> Source:
        return _Told(self)


class _Told(Source):
    def __init__(self, oracle: Oracle) -> None:
        self.size, self.depth = oracle.length + 1, oracle.length
        self.sequences = torch.tensor(oracle.sequences)

    def start(self, text: Text, sampler: TargetSampler, prompts: Sequence[TappedChunk]) -> Proposer:
        return _Reader(self)


class _Reader(Proposer):
    def __init__(self, told: _Told) -> None:
        self.told, self.layout = told, Tree.chain(told.depth).layout()

    def propose(self, text: Text, nodes: int) -> Draft:
        places = text.lengths[:, None] + torch.arange(self.told.depth)
        drafts = self.told.sequences.gather(1, places.clamp(max=self.told.sequences.shape[1] - 1))
        return Draft(torch.cat([text.root, drafts], dim=1), self.layout)


@pytest.fixture(scope="module")
def llama() -> accelc.CompiledDecoder:
    return accelc.compile(FAMILIES["llama"].build(), max_length=96, cache=False)


def oracle(decoder: accelc.CompiledDecoder, prompts: list[list[int]], new: int, **options: object) -> Oracle:
    """Knows what plain decoding gives."""
    result = decoder.generate(prompts, max_new_tokens=new, ignore_eos=True, **options)
    longest = max(map(len, result.sequences))
    return Oracle(tuple(tuple(s.tolist() + [0] * (longest - len(s))) for s in result.sequences))


@pytest.mark.parametrize("draft", DRAFTS, ids=lambda d: d.name)
@pytest.mark.parametrize(
    "sampling",
    [
        None,
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.3),
        SamplingParams(temperature=0.7, top_k=20, min_p=0.02),
        SamplingParams(repetition_penalty=1.2),
        [SamplingParams(), SamplingParams(temperature=0.5), SamplingParams(temperature=1.2, repetition_penalty=0.8)],
    ],
    ids=["greedy", "warm", "nucleus", "filtered", "penalised", "mixed"],
)
def test_tokens_are_those_of_plain_decoding(llama: accelc.CompiledDecoder, draft: Drafter, sampling: object) -> None:
    """With the same seed, sampled ones too: matching follows the random numbers of plain decoding."""
    options = {"max_new_tokens": 40, "ignore_eos": True, "sampling": sampling, "seed": 5}
    plain = llama.generate(PROMPTS, **options)  # type: ignore[arg-type]
    for nodes in (None, 1, 4, 100):
        fast = llama.generate(PROMPTS, draft=draft, draft_nodes=nodes, **options)  # type: ignore[arg-type]
        assert [t.tolist() for t in fast.tokens] == [t.tolist() for t in plain.tokens]
    assert all(len(t) == 40 for t in fast.tokens)
    assert fast.finish_reasons == plain.finish_reasons
    options["sampling"] = sampling[0] if isinstance(sampling, list) else sampling
    alone = llama.generate(PROMPTS[0], draft=draft, **options)  # type: ignore[arg-type]
    assert alone.tokens[0].tolist() == plain.tokens[0].tolist()


def test_a_perfect_draft_takes_few_steps(llama: accelc.CompiledDecoder) -> None:
    draft = oracle(llama, PROMPTS, 41)
    result = llama.generate(PROMPTS, max_new_tokens=41, ignore_eos=True, draft=draft, draft_nodes=5)
    assert result.statistics.steps == 8  # the first token by prefill, then five a step
    found = result.statistics.speculation
    assert found is not None
    assert found.mean_accepted_length == 5.0
    assert found.lengths == (0, 0, 0, 0, 0, 24)
    assert found.accuracy == [[1.0]] * 4
    assert found.row_steps == 24
    assert "5.00 tokens a step" in str(result.statistics)
    assert (found.table().row_count, len(found.table().columns)) == (4, 2)


def test_a_wrong_draft_takes_the_steps_of_plain_decoding(llama: accelc.CompiledDecoder) -> None:
    told = oracle(llama, PROMPTS, 20)
    wrong = Oracle(tuple(tuple((t + 1) % llama.vocab_size for t in row) for row in told.sequences))
    result = llama.generate(PROMPTS, max_new_tokens=20, ignore_eos=True, draft=wrong, draft_nodes=5)
    assert result.statistics.steps == 19
    assert result.statistics.speculation is not None
    assert result.statistics.speculation.lengths[1] == 57


def test_rows_of_different_luck(llama: accelc.CompiledDecoder) -> None:
    """One row drafts well, one badly, one ends early: lengths part, tokens stay."""
    told = [list(row) for row in oracle(llama, PROMPTS, 30).sequences]
    told[1] = [0] * len(told[1])
    plain = llama.generate(PROMPTS, max_new_tokens=30, ignore_eos=True)
    stop = plain.tokens[2][17].item()
    options = {"max_new_tokens": 30, "ignore_eos": True, "stop_tokens": stop}
    expected = llama.generate(PROMPTS, **options)  # type: ignore[arg-type]
    got = llama.generate(PROMPTS, draft=Oracle(tuple(map(tuple, told))), **options)  # type: ignore[arg-type]
    assert [t.tolist() for t in got.tokens] == [t.tolist() for t in expected.tokens]
    assert got.finish_reasons == expected.finish_reasons


@pytest.mark.parametrize("new", [1, 2, 3, 7, 8])
def test_exactly_so_many_tokens(llama: accelc.CompiledDecoder, new: int) -> None:
    draft = oracle(llama, PROMPTS, 20)
    result = llama.generate(PROMPTS, max_new_tokens=new, ignore_eos=True, draft=draft)
    assert [len(t) for t in result.tokens] == [new] * 3


def test_up_to_the_longest_sequence(llama: accelc.CompiledDecoder) -> None:
    """Trees reach beyond max_length at the end; what they hold there does not count."""
    plain = llama.generate(PROMPTS, ignore_eos=True)
    told = tuple(tuple(s.tolist()) for s in plain.sequences)
    for draft in (Oracle(told, 7), *DRAFTS):
        fast = llama.generate(PROMPTS, ignore_eos=True, draft=draft)
        assert [t.tolist() for t in fast.tokens] == [t.tolist() for t in plain.tokens]
        assert max(map(len, fast.sequences)) == llama.max_length


def words(ids: list[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


def test_stop_strings_and_texts_inside_a_path(llama: accelc.CompiledDecoder) -> None:
    draft = oracle(llama, PROMPTS[:1], 20)
    plain = llama.generate(PROMPTS[0], max_new_tokens=20, ignore_eos=True)
    stop = words(plain.tokens[0][7:9].tolist())
    options = {"max_new_tokens": 20, "ignore_eos": True, "tokenizer": words, "stop_strings": stop}
    expected = llama.generate(PROMPTS[0], **options)  # type: ignore[arg-type]
    got = llama.generate(PROMPTS[0], draft=draft, **options)  # type: ignore[arg-type]
    assert got.texts == expected.texts
    assert got.tokens[0].tolist() == expected.tokens[0].tolist()
    assert got.finish_reasons == expected.finish_reasons == [accelc.runtime.FinishReason.STOP_STRING]


def test_events_come_token_by_token(llama: accelc.CompiledDecoder) -> None:
    draft = oracle(llama, PROMPTS, 20)
    options = {"max_new_tokens": 20, "ignore_eos": True, "tokenizer": words}
    plain = [list(llama.stream(p, **options)) for p in PROMPTS]  # type: ignore[arg-type]
    events = list(llama.stream(PROMPTS, draft=draft, **options))  # type: ignore[arg-type]
    for row in range(3):
        mine = [(e.token, e.text, e.finish_reason) for e in events if e.row == row]
        assert mine == [(e.token, e.text, e.finish_reason) for e in plain[row]]


def test_a_stream_that_is_closed_in_the_middle_of_a_step(llama: accelc.CompiledDecoder) -> None:
    draft = oracle(llama, PROMPTS, 20)
    stream = llama.stream(PROMPTS, max_new_tokens=20, ignore_eos=True, draft=draft, draft_nodes=5)
    events = [next(stream) for _ in range(8)]  # three first tokens, then some of the first step's fifteen
    assert len(events) == 8
    result = stream.result
    assert all(1 <= len(t) < 20 for t in result.tokens)
    assert llama.generate(PROMPTS, max_new_tokens=4, draft="prompt_lookup").statistics.steps >= 1


def test_streamers_get_one_token_of_each_row(llama: accelc.CompiledDecoder) -> None:
    class Keeper:
        def __init__(self) -> None:
            self.puts: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.puts.append(value.flatten().tolist())

        def end(self) -> None:
            self.puts.append([])

    told = [list(row) for row in oracle(llama, PROMPTS, 12).sequences]
    told[1] = [0] * len(told[1])
    plain, fast = Keeper(), Keeper()
    options = {"max_new_tokens": 12, "ignore_eos": True}
    llama.generate(PROMPTS, streamer=plain, **options)  # type: ignore[arg-type]
    llama.generate(PROMPTS, streamer=fast, draft=Oracle(tuple(map(tuple, told))), **options)  # type: ignore[arg-type]
    assert fast.puts == plain.puts


def test_token_recycling_remembers(llama: accelc.CompiledDecoder) -> None:
    draft = TokenRecycling(SMALL.cut(5))  # a matrix of its own
    options = {"max_new_tokens": 40, "ignore_eos": True, "draft": draft, "draft_nodes": 5}
    first, again = (llama.generate(PROMPTS[0], **options).statistics for _ in range(2))  # type: ignore[arg-type]
    assert again.steps < first.steps
    assert again.speculation is not None
    assert again.speculation.mean_accepted_length > 1.1


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"quantize": "int8"}], ids=str)
def test_other_decoders(options: dict[str, object]) -> None:
    decoder = accelc.compile(FAMILIES["gemma2"].build(), max_length=64, cache=False, **options)  # type: ignore[arg-type]
    plain = decoder.generate(PROMPTS, max_new_tokens=20, ignore_eos=True)
    for draft in DRAFTS:
        fast = decoder.generate(PROMPTS, max_new_tokens=20, ignore_eos=True, draft=draft)
        assert [t.tolist() for t in fast.tokens] == [t.tolist() for t in plain.tokens]


def test_a_decoder_that_speculates_by_itself() -> None:
    decoder = accelc.compile(FAMILIES["llama"].build(), max_length=64, cache=False, draft="prompt_lookup")
    assert decoder.generate(PROMPTS, max_new_tokens=8).statistics.speculation is not None
    assert decoder.generate(PROMPTS, max_new_tokens=8, draft=False).statistics.speculation is None
    found = decoder.generate(PROMPTS, max_new_tokens=8, draft="token_recycling").statistics.speculation
    assert found is not None
    assert found.drafter == "token_recycling"


def test_mistakes_are_named(llama: accelc.CompiledDecoder) -> None:
    generate = llama.generate
    with pytest.raises(DraftError, match="no drafter is named 'prompt_look'") as caught:
        generate(PROMPTS, draft="prompt_look")
    assert "Did you mean 'prompt_lookup'?" in caught.value.remedy
    with pytest.raises(DraftError, match="no drafter is named 3"):
        generate(PROMPTS, draft=3)  # type: ignore[arg-type]
    with pytest.raises(DraftError, match="nothing drafts"):
        generate(PROMPTS, accept="matching")
    with pytest.raises(DraftError, match="draft_nodes is 4 and nothing drafts"):
        generate(PROMPTS, draft_nodes=4)
    with pytest.raises(InputError, match="draft_nodes"):
        generate(PROMPTS, draft="prompt_lookup", draft_nodes=0)
    with pytest.raises(DraftError, match="no acceptance rule"):
        generate(PROMPTS, draft="prompt_lookup", accept="hopeful")
    with pytest.raises(TreeError, match="200 nodes"):
        generate(PROMPTS, draft=Oracle(((0,),), 199))
    for wrong in ({"tokens": 0}, {"tokens": 128}, {"ngram": "3"}, {"ngram": True}):
        with pytest.raises(DraftError, match=next(iter(wrong))):
            PromptLookup(**wrong)  # type: ignore[arg-type]
    for tree in (Tree((-1,), (0,)), "tree"):
        with pytest.raises(DraftError, match="tree"):
            TokenRecycling(tree)  # type: ignore[arg-type]
    model = FAMILIES["llama"].build()
    with pytest.raises(ExactnessError, match="lossy"):
        accelc.compile(model, max_length=32, draft="prompt_lookup", accept=Typical())
    with pytest.raises(DraftError, match="nothing drafts"):
        accelc.compile(model, max_length=32, accept="matching")
    assert {"prompt_lookup", "token_recycling", "tests.oracle"} <= set(DRAFTERS.names())
    lossy = accelc.compile(model, max_length=32, draft="prompt_lookup", accept=Typical(), require=Exactness.LOSSY,
                           cache=False)  # fmt: skip
    assert len(lossy.generate(PROMPTS, max_new_tokens=8, seed=1).tokens[0]) == 8


def test_nan_logits_in_a_tree() -> None:
    model = FAMILIES["llama"].build()
    decoder = accelc.compile(model, max_length=64, cache=False)
    expected = decoder.generate(PROMPTS, max_new_tokens=10, ignore_eos=True)
    weight = model.model.embed_tokens.weight  # type: ignore[union-attr]
    third = int(expected.tokens[0][2])
    with torch.no_grad():
        kept = weight[third].clone()  # type: ignore[index]
        weight[third] = torch.nan  # type: ignore[index]
    longest = max(map(len, expected.sequences))
    draft = Oracle(tuple(tuple(s.tolist() + [0] * (longest - len(s))) for s in expected.sequences))
    with pytest.raises(NonFiniteLogitsError, match="row 0"):
        decoder.generate(PROMPTS[:1], max_new_tokens=10, ignore_eos=True, draft=Oracle(draft.sequences[:1]))
    with torch.no_grad():
        weight[third] = kept  # type: ignore[index]
    again = decoder.generate(PROMPTS, max_new_tokens=10, ignore_eos=True, draft=draft)
    assert [t.tolist() for t in again.tokens] == [t.tolist() for t in expected.tokens]
