"""`custom_generate=accelc.hf.decode()` against transformers' own generate: the same tokens, padding, scores and draws.

But for the last test `accelc.compile` is replaced by a decoder that recomputes the whole text with the model itself:
what is tested here is the loop and its dealings with transformers, not the compiled step.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from families import FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import RepetitionPenaltyLogitsProcessor
from transformers.generation.streamers import BaseStreamer

import accelc
from accelc import hf
from accelc.ir.errors import (
    EmptyPromptError,
    GenerationModeError,
    InputError,
    NonFiniteLogitsError,
    PromptTooLongError,
    StreamerError,
    UnknownOptionError,
)
from accelc.ir.state import StateSpec
from accelc.runtime import Decoder

VOCAB, PAD = 97, 0


def eager_compile(model, *, max_length, **options):
    """A decoder whose only state is the text, and whose step runs the model over all of it."""
    shared = weakref.ref(model)

    def step(tokens, positions, lengths, texts):
        n = tokens.shape[1]
        for row, length in enumerate(lengths.tolist()):
            texts[row, length : length + n] = tokens[row]
        end = int(lengths.max()) + n
        logits = shared()(texts[:, :end], use_cache=False).logits
        at = lengths[:, None] + torch.arange(n)
        return (logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1])),)

    return Decoder(step, step, [StateSpec("texts", ("B", "S"), torch.int64, 1)], max_length=max_length, chunk=4)


PROMPT = torch.tensor([[5, 9, 2, 30]])


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Shapes are tiny: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compilations(monkeypatch):
    """Stand in for the compiler, and count what it was asked for."""
    asked = []

    def compile_and_count(model, *, max_length, **options):
        asked.append((max_length, options))
        return eager_compile(model, max_length=max_length)

    monkeypatch.setattr(accelc, "compile", compile_and_count, raising=False)
    return asked


def small_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=PAD, eos_token_id=None, bos_token_id=1,
        initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def llama(compilations):
    return small_llama()


def prompt(batch=1, length=7):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


def left_padded():
    ids, mask = prompt(3, 9), torch.ones(3, 9, dtype=torch.int64)
    for row, pads in enumerate((0, 4, 8)):
        ids[row, :pads], mask[row, :pads] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def both(model, inputs, **options):
    """The outcome of transformers and ours, from the same global seed."""
    outcomes = []
    for extra in ({}, {"custom_generate": hf.decode()}):
        torch.manual_seed(42)
        outcomes.append(model.generate(**inputs, **copy.deepcopy(options), **extra))
    return outcomes


def early_eos(model, inputs, at=5):
    """A token that some row greedily produces after `at` others."""
    return int(model.generate(**inputs, max_new_tokens=at + 1, do_sample=False)[0, -1])


@pytest.mark.parametrize("make", [lambda: {"input_ids": prompt()}, lambda: {"input_ids": prompt(3)}, left_padded])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 8, "top_p": 0.9, "repetition_penalty": 1.3},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "suppress_tokens": [3, 4]},
    ],
    ids=str,
)
def test_tokens_equal_those_of_transformers(llama, make, options):
    theirs, ours = both(llama, make(), max_new_tokens=16, **options)
    assert torch.equal(theirs, ours)
    assert not ours.is_inference()


@pytest.mark.parametrize("do_sample", [False, True])
def test_eos_and_padding(llama, do_sample):
    inputs = left_padded()
    eos = early_eos(llama, inputs)
    theirs, ours = both(llama, inputs, max_new_tokens=20, do_sample=do_sample, eos_token_id=[eos, 96])
    assert torch.equal(theirs, ours)
    if not do_sample:
        assert (ours[0, 9:] == eos).any()


def test_a_pad_id_outside_the_vocabulary_is_never_fed(llama):
    inputs = left_padded()
    ours = llama.generate(
        **inputs,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=early_eos(llama, inputs),
        pad_token_id=VOCAB + 5,
        custom_generate=hf.decode(),
    )
    assert (ours == VOCAB + 5).any()


def test_gpt2_with_its_learned_positions(compilations):
    torch.manual_seed(1)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ).eval()
    theirs, ours = both(model, left_padded(), max_new_tokens=12, do_sample=False, pad_token_id=PAD)
    assert torch.equal(theirs, ours)


def test_the_output_object(llama):
    inputs = left_padded()
    theirs, ours = both(
        llama,
        inputs,
        max_new_tokens=8,
        do_sample=False,
        repetition_penalty=1.2,
        eos_token_id=early_eos(llama, inputs),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert torch.equal(theirs.sequences, ours.sequences)
    assert len(ours.scores) == len(theirs.scores) == len(ours.logits)
    live = theirs.sequences[:, 9:] != PAD  # what ended rows are fed differs, and means nothing
    for step in range(len(theirs.scores)):
        rows = live[:, step]
        torch.testing.assert_close(ours.logits[step][rows], theirs.logits[step][rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.scores[step][rows], theirs.scores[step][rows], rtol=1e-4, atol=1e-5)
    assert (
        llama.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, custom_generate=hf.decode()).scores
        is None
    )


def test_several_samples_of_a_prompt(llama):
    theirs, ours = both(llama, {"input_ids": prompt(2)}, max_new_tokens=6, do_sample=True, num_return_sequences=3)
    assert torch.equal(theirs, ours)
    assert ours.shape == (6, 13)


class Forbid(LogitsProcessor):
    """Depends on the whole sequences, padding included, and writes in place."""

    def __call__(self, input_ids, scores):
        scores.scatter_(1, input_ids, -1e4)
        return scores


class UpTo(StoppingCriteria):
    """Stops a row once it has 5 different tokens among the last 6; asks for the scores to be absent."""

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        return torch.tensor([len(set(row[-6:].tolist())) >= 5 and len(row) > 12 for row in input_ids])


def test_processors_and_criteria_of_the_caller(llama):
    theirs, ours = both(
        llama,
        left_padded(),
        max_new_tokens=30,
        do_sample=False,
        logits_processor=[Forbid()],
        stopping_criteria=[UpTo()],
    )
    assert torch.equal(theirs, ours)
    assert ours.shape[1] < 39


class Recorder(BaseStreamer):
    def __init__(self, fail=False):
        self.values, self.ended, self.fail = [], 0, fail

    def put(self, value):
        if self.fail and len(self.values) == 2:
            raise OSError("closed")
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


def test_the_owned_streamer(llama):
    mine, theirs = Recorder(), Recorder()
    inputs = {"input_ids": prompt()}
    llama.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=theirs)
    llama.generate(**inputs, max_new_tokens=5, do_sample=False, custom_generate=hf.decode(streamer=mine))
    assert mine.values == theirs.values
    assert mine.ended == 1
    with pytest.raises(StreamerError, match="closed"):
        llama.generate(
            **inputs, max_new_tokens=5, do_sample=False, custom_generate=hf.decode(streamer=Recorder(fail=True))
        )
    assert torch.equal(*both(llama, inputs, max_new_tokens=5, do_sample=False))


def test_the_streamer_of_the_call(llama):
    """transformers shows it the prompt and then forgets it."""
    mine, owned, theirs = Recorder(), Recorder(), Recorder()
    call = {"input_ids": prompt(), "max_new_tokens": 5, "do_sample": False}
    llama.generate(**call, streamer=theirs)
    llama.generate(**call, streamer=mine, custom_generate=hf.decode(streamer=owned))
    assert mine.values == owned.values == theirs.values
    assert mine.ended == owned.ended == 1
    llama.generate(**call, streamer=mine, custom_generate=hf.decode(streamer=mine))  # twice the same is one
    assert mine.values == theirs.values * 2
    with pytest.raises(StreamerError, match="closed"):
        llama.generate(**call, streamer=Recorder(fail=True), custom_generate=hf.decode())


def test_stop_strings_by_their_criterion(llama):
    """transformers loses the tokenizer of a call with custom_generate, which stop_strings= needs."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)[:VOCAB]
    letters = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    call = {"max_new_tokens": 8, "do_sample": False}
    free = llama.generate(prompt(), **call)[0, 7:].tolist()
    stop = tokenizer.decode(free[3:4])
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    theirs, ours = both(llama, {"input_ids": prompt()}, stopping_criteria=criteria, **call)
    assert torch.equal(theirs, ours)
    assert len(ours[0]) == 7 + free.index(free[3]) + 1
    with pytest.raises(ValueError, match="tokenizer"):
        llama.generate(prompt(), **call, stop_strings=[stop], tokenizer=tokenizer, custom_generate=hf.decode())


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"eos": True}], ids=str)
def test_greedy_tokens_with_a_drafter_are_those_of_transformers(llama, options):
    inputs = left_padded()
    options = dict(options)
    if options.pop("eos", False):
        free = llama.generate(**inputs, max_new_tokens=20, do_sample=False)[0, 7:]
        options |= {"eos_token_id": int(free[5]), "pad_token_id": 3}
    call = {**inputs, "max_new_tokens": 20, "do_sample": False, **options}
    theirs = llama.generate(**call)
    ours = llama.generate(**call, custom_generate=hf.decode(draft="prompt_lookup"))
    assert torch.equal(theirs, ours)


def test_a_drafter_samples_streams_and_gives_an_object(llama):
    call = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01}
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        shown = Collected()
        drawn.append(
            llama.generate(prompt(), **call, custom_generate=hf.decode(draft="token_recycling", streamer=shown))
        )
        assert shown.tokens == drawn[-1][0].tolist()
        assert shown.ended
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    found = llama.generate(
        prompt(), max_new_tokens=4, return_dict_in_generate=True, custom_generate=hf.decode(draft="prompt_lookup")
    )
    assert found.sequences.shape == (1, 11)


class Collected:
    """A streamer that keeps what it is shown."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"min_new_tokens": 3, "eos_token_id": 5}, "LogitsProcessor"),
        ({"do_sample": True, "typical_p": 0.5}, "TypicalLogitsWarper"),
        ({"max_time": 5.0}, "MaxTimeCriteria"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"streamer": Collected()}, "streamer"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_a_drafter_cannot_keep_is_refused(llama, options, what):
    with pytest.raises((GenerationModeError, ValueError), match=what):
        llama.generate(**left_padded(), max_new_tokens=4, **options, custom_generate=hf.decode(draft="prompt_lookup"))


def test_a_penalty_that_counts_something_else_is_refused(llama):
    for ignored, given in ((None, left_padded()), (3, {"inputs": prompt()})):
        penalty = RepetitionPenaltyLogitsProcessor(1.2, prompt_ignore_length=ignored)
        with pytest.raises(GenerationModeError, match="RepetitionPenalty"):
            llama.generate(
                **given, max_new_tokens=4, logits_processor=[penalty], custom_generate=hf.decode(draft="prompt_lookup")
            )


def test_an_assistant_is_refused(llama):
    with pytest.raises(GenerationModeError, match="assistant_model"):
        llama.generate(prompt(), assistant_model=llama, max_new_tokens=4, custom_generate=hf.decode())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"streamer": print}, StreamerError),
        ({"max_length": "x"}, InputError),
        ({"max_length": True}, InputError),
        ({"max_length": 1}, InputError),
        ({"quantise": "int8"}, UnknownOptionError),
        ({"drafts": "prompt_lookup"}, UnknownOptionError),
    ],
    ids=str,
)
def test_wrong_options_are_named_at_once(options, error):
    with pytest.raises(error):
        hf.decode(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True, "output_attentions": True},
        {"return_dict_in_generate": True, "output_hidden_states": True},
        {"position_ids": torch.arange(7)[None] + 3},
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0]])},
        {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]])},
    ],
    ids=str,
)
def test_what_the_loop_does_not_do(llama, compilations, options):
    with pytest.raises(GenerationModeError):
        llama.generate(prompt(), max_new_tokens=4, do_sample=False, custom_generate=hf.decode(), **options)
    assert compilations == []


def test_past_keys_and_embeddings_are_refused(llama):
    past = llama(prompt()).past_key_values
    more = torch.cat([prompt(), prompt(length=2)], dim=1)
    with pytest.raises(GenerationModeError, match="past_key_values"):
        llama.generate(more, past_key_values=past, max_new_tokens=2, custom_generate=hf.decode())
    with pytest.raises(GenerationModeError, match="inputs_embeds"):
        llama.generate(inputs_embeds=llama.model.embed_tokens(prompt()), max_new_tokens=2, custom_generate=hf.decode())
    with pytest.raises(EmptyPromptError):
        llama.generate(
            prompt(), attention_mask=torch.zeros(1, 7, dtype=torch.int64), max_new_tokens=2, custom_generate=hf.decode()
        )
    with pytest.raises(GenerationModeError, match="custom_generate="):
        hf.decode()(llama, prompt())


def test_nan_weights(llama):
    llama.generate(prompt(), max_new_tokens=2, custom_generate=hf.decode())
    with torch.no_grad():
        kept = llama.lm_head.weight[3].clone()
        llama.lm_head.weight[3] = torch.nan
    with pytest.raises(NonFiniteLogitsError):
        llama.generate(prompt(), max_new_tokens=2, custom_generate=hf.decode())
    with torch.no_grad():
        llama.lm_head.weight[3] = kept
    assert torch.equal(*both(llama, {"input_ids": prompt()}, max_new_tokens=4, do_sample=False))


def test_one_compilation_serves_calls_of_similar_length(llama, compilations):
    def run(length, new, **options):
        llama.generate(prompt(length=length), max_new_tokens=new, do_sample=False, custom_generate=hf.decode(**options))

    run(7, 4)
    run(20, 3)
    assert compilations == [(128, {})]  # a bucket of 256, but the model has 128 positions
    run(7, 4, quantize="int8")
    run(7, 4, quantize="int8")
    run(9, 2)
    assert compilations[1:] == [(128, {"quantize": "int8"})]
    run(7, 4, max_length=40, quantize="int4")
    run(7, 4, max_length=40, quantize="int4", progress=lambda stage: None)  # another one each time, and no reason
    assert compilations[2:] == [(40, {"quantize": "int4"})]
    with pytest.raises(PromptTooLongError, match="up to 54 tokens"):
        run(50, 4, max_length=40, quantize="int4")
    llama.config.max_position_embeddings = 4096
    assert [hf.bucket(llama, n) for n in (3, 256, 600, 4000, 5000)] == [256, 256, 1024, 4096, 5000]


def test_changed_weights_compile_again(llama, compilations):
    options = {"max_new_tokens": 6, "do_sample": False}
    before = both(llama, {"input_ids": prompt()}, **options)[1]
    other = LlamaForCausalLM(llama.config)
    torch.nn.init.normal_(other.model.embed_tokens.weight)
    llama.load_state_dict(other.state_dict())
    theirs, ours = both(llama, {"input_ids": prompt()}, **options)
    assert len(compilations) == 2
    assert torch.equal(theirs, ours)
    assert not torch.equal(before, ours)


def test_decoders_live_and_die_with_their_model(llama, compilations):
    llama.generate(prompt(), max_new_tokens=2, custom_generate=hf.decode())
    assert len(llama._accelc_decoders) == 1
    assert copy.deepcopy(llama)._accelc_decoders == []
    assert pickle.loads(pickle.dumps(llama))._accelc_decoders == []
    model = copy.deepcopy(llama)
    model.generate(prompt(), max_new_tokens=2, custom_generate=hf.decode())
    decoder = weakref.ref(model._accelc_decoders[0].decoder)
    del model
    gc.collect()
    assert decoder() is None


def test_the_derived_step():
    model, inputs = small_llama(), left_padded()
    theirs = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    ours = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, custom_generate=hf.decode(backend="eager", check="off")
    )
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("change", ["buffer", "attribute", "hook"])
def test_a_model_that_changed_is_compiled_again(llama, change):
    """Not only parameters make a model."""
    run = {"max_new_tokens": 6, "do_sample": False}
    before = llama.generate(prompt(length=9), **run, custom_generate=hf.decode())
    if change == "buffer":
        llama.model.rotary_emb.inv_freq.mul_(0.3)
    if change == "attribute":
        llama.model.layers[0].self_attn.scaling *= 6
    if change == "hook":
        llama.model.norm.register_forward_hook(lambda module, inputs, output: -output)
    expected = llama.generate(prompt(length=9), **run)
    assert torch.equal(llama.generate(prompt(length=9), **run, custom_generate=hf.decode()), expected)
    assert not torch.equal(before, expected)


def test_a_model_that_once_returned_attentions_is_still_watched(compilations):
    """transformers leaves hooks behind that collect outputs; a change of the model must be seen all the same."""
    model = FAMILIES["llama"].build()
    model.generate(PROMPT, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    for change in (lambda: None, lambda: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.Tanh())):
        change()
        expected = model.generate(PROMPT, max_new_tokens=8, do_sample=False)
        got = model.generate(PROMPT, max_new_tokens=8, do_sample=False, custom_generate=accelc.hf.decode())
        assert torch.equal(got, expected)
    assert len(compilations) == 2


def test_a_model_with_hooks_of_its_own_is_compared_at_each_call(monkeypatch):
    model, compile_, made = FAMILIES["llama"].build(), accelc.compile, []
    monkeypatch.setattr(accelc, "compile", lambda *a, **k: made.append(compile_(*a, **k)) or made[-1], raising=False)
    factor = [1.0]
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * factor[0])
    for factor[0] in (1.0, 1.0, -3.0):
        expected = model.generate(PROMPT, max_new_tokens=8, do_sample=False)
        got = model.generate(PROMPT, max_new_tokens=8, do_sample=False, custom_generate=accelc.hf.decode())
        assert torch.equal(got, expected)
    assert len(made) == 2


def test_the_function_in_place_of_its_result_is_named():
    with pytest.raises(GenerationModeError, match=r"hf\.decode\(\)"):
        FAMILIES["llama"].build().generate(PROMPT, max_new_tokens=2, custom_generate=accelc.hf.decode)
