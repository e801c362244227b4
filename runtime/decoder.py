"""The decoder: compiled steps with their states, behind `generate`, `stream` and `start`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from accelc.ir.errors import CopyError, InputError, PromptTooLongError, StopError
from accelc.ir.state import StateSpec
from accelc.runtime.arguments import check_count, check_vocabulary, reject_unknown, string_list, token_ids
from accelc.runtime.functions import Compile
from accelc.runtime.generation import Generation, Row
from accelc.runtime.prompts import Prompt, read_prompts
from accelc.runtime.result import GenerateResult
from accelc.runtime.sampling import SamplingParams
from accelc.runtime.selection import spread_params, spread_seeds
from accelc.runtime.session import Session
from accelc.runtime.speculation.acceptance import AcceptanceRule
from accelc.runtime.speculation.draft import Drafter, Setting
from accelc.runtime.speculation.generation import SpeculativeGeneration
from accelc.runtime.speculation.speculator import Speculator, Wish
from accelc.runtime.steps import StepFunction, Steps, TreeSteps, cache_capacity
from accelc.runtime.stopping import Stops
from accelc.runtime.stream import Stream, Streamer, StreamerGuard
from accelc.runtime.text import Decode, Detokenizer, Tokenizer, decode_function
from accelc.runtime.workspace import WorkspacePool


class Decoder:
    """Generates tokens with compiled steps.

    decode, many, prefill: see `Steps`. states: one spec per state argument. max_length: tokens of a sequence, prompt
    included. chunk: most tokens one step takes. capacity: slots of the states' time axis (default: `cache_capacity`).
    max_batch: None for any. vocab_size: None learns it from the logits of one step at the first call. input_vocab_size:
    how many ids the model reads, where that is another number. eos: token id or ids that end a row. tokenizer: default
    for texts and stop strings, an object with ``decode(ids)`` or a callable.
    before_call: called first by each call, those of sessions too; raises when the decoder must not be used any more.
    trees: see `Steps`. compile_function: for what drafters and rules compute, which runs as written without one. draft,
    accept, draft_nodes: those of calls that name none; see `generate`.

    Calls from several threads wait for each other. Any error, KeyboardInterrupt included, leaves the decoder usable.
    """

    def __init__(
        self,
        decode: StepFunction,
        many: StepFunction,
        states: Sequence[StateSpec],
        *,
        prefill: StepFunction | None = None,
        max_length: int,
        chunk: int = 256,
        capacity: int | None = None,
        max_batch: int | None = None,
        vocab_size: int | None = None,
        input_vocab_size: int | None = None,
        eos: int | Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        tokenizer: Tokenizer | Decode | None = None,
        before_call: Callable[[], None] | None = None,
        trees: Callable[[tuple[object, ...]], TreeSteps] | None = None,
        compile_function: Compile | None = None,
        draft: Drafter | str | None = None,
        accept: AcceptanceRule | str | None = None,
        draft_nodes: int | None = None,
    ) -> None:
        self.steps = Steps(
            decode=decode,
            many=many,
            prefill=prefill,
            states=tuple(states),
            max_length=max_length,
            chunk=chunk,
            capacity=cache_capacity(max_length, chunk) if capacity is None else capacity,
            device=torch.device(device),
            trees=trees,
        )
        if max_batch is not None:
            check_count("max_batch", max_batch)
        self.max_batch = max_batch
        self.eos = token_ids("eos", eos)
        if vocab_size is not None:
            check_vocabulary("eos", self.eos, vocab_size)
        self.tokenizer = tokenizer
        self._before_call = before_call
        self._vocab_size, self._input_vocab_size = vocab_size, input_vocab_size
        self._pool = WorkspacePool(self.steps)
        room = self.steps.capacity - self.steps.max_length if trees is not None else 0
        self.speculator = Speculator(Wish(draft, accept, draft_nodes), compile_function, room)
        # Re-entrant: a streamer may call the decoder that is calling it. Calls never share states, so that is safe.
        self._lock = threading.RLock()

    @property
    def max_length(self) -> int:
        """Tokens a sequence may have, prompt included."""
        return self.steps.max_length

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model scores; learned by running one step where it was not given."""
        if self._vocab_size is None:
            with self._lock, torch.inference_mode(), Session(self.steps, self._pool, self._lock, None, 1) as probe:
                self._vocab_size = probe.decode(torch.zeros(1, dtype=torch.int64, device=self.steps.device)).shape[-1]
        return self._vocab_size

    @property
    def input_vocab_size(self) -> int:
        """Number of token ids that the model reads: what prompts may hold."""
        return self.vocab_size if self._input_vocab_size is None else self._input_vocab_size

    def generate(
        self,
        prompt: Prompt = (),
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        seed: int | Sequence[int] | None = None,
        stop_tokens: int | Sequence[int] = (),
        stop_strings: str | Sequence[str] = (),
        ignore_eos: bool = False,
        tokenizer: Tokenizer | Decode | None = None,
        streamer: Streamer | None = None,
        draft: Drafter | str | bool | None = None,
        accept: AcceptanceRule | str | None = None,
        draft_nodes: int | None = None,
        **unknown: object,
    ) -> GenerateResult:
        """Continue one or several prompts until each row ends.

        prompt: [T] or [B, T] integer tensor, a list of ids, or a list of prompts of different lengths.
        max_new_tokens: exact unless a row ends before; None goes on to max_length. sampling: for all rows or one each;
        None is greedy. seed: row b of one integer uses seed + b; or one each; None draws one and reports it.
        stop_tokens, stop_strings: see `Stops`; strings need a tokenizer. ignore_eos: go on after the model's eos.
        streamer: a function called with each `TokenEvent`, or a transformers streamer.
        draft: a drafter or its name, for speculative decoding; False decodes without the decoder's own. accept: an
        acceptance rule or its name; None takes the best lossless one. draft_nodes: nodes of the drafter's tree that a
        step verifies, the root included, all of a smaller tree; None chooses by what gives most tokens a second, 1
        (plain decoding) included.

        Raises `InputError`s for bad input, `UnknownOptionError`, `NonFiniteLogitsError`, and `StreamerError` and
        `TokenizerError` for what the streamer and the tokenizer raise.
        """
        reject_unknown(self.generate, unknown)
        with self._lock:
            generation = self._prepare(
                prompt,
                max_new_tokens,
                sampling,
                seed,
                stop_tokens,
                stop_strings,
                ignore_eos,
                tokenizer,
                Wish(draft, accept, draft_nodes),
            )
            with generation.session, torch.inference_mode():
                if streamer is None:
                    for _ in generation.run():
                        pass
                else:
                    guard = StreamerGuard(streamer, generation.prompts, min(self.eos, default=0))
                    for rows in generation.run():
                        guard.step(rows)
                    guard.end()
            return generation.result()

    def stream(
        self,
        prompt: Prompt = (),
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        seed: int | Sequence[int] | None = None,
        stop_tokens: int | Sequence[int] = (),
        stop_strings: str | Sequence[str] = (),
        ignore_eos: bool = False,
        tokenizer: Tokenizer | Decode | None = None,
        draft: Drafter | str | bool | None = None,
        accept: AcceptanceRule | str | None = None,
        draft_nodes: int | None = None,
        **unknown: object,
    ) -> Stream:
        """As `generate`, but returns an iterator of `TokenEvent`s; bad input raises here, not at the first event."""
        reject_unknown(self.stream, unknown)
        with self._lock:
            generation = self._prepare(
                prompt,
                max_new_tokens,
                sampling,
                seed,
                stop_tokens,
                stop_strings,
                ignore_eos,
                tokenizer,
                Wish(draft, accept, draft_nodes),
            )
            return Stream(generation, self._lock)

    def start(self, prompts: Prompt) -> Session:
        """A `Session` that holds the prompts (prefilled), for callers that bring their own loop."""
        with self._lock:
            rows = self._read(prompts)
            session = self._session(len(rows))
            try:
                session.extend(rows)
            except BaseException:
                session.close(discard=True)
                raise
            return session

    def setting(self) -> Setting:
        """What drafters are bound to."""
        steps = self.steps
        return Setting(self.vocab_size, steps.device, self.input_vocab_size, self.max_length, steps.capacity)

    def __reduce__(self) -> NoReturn:
        raise CopyError(
            f"a {type(self).__name__} cannot be copied or pickled: it holds compiled code, states and a lock"
        )

    def _read(self, prompt: Prompt) -> list[torch.Tensor]:
        return read_prompts(
            prompt, vocab_size=self.input_vocab_size, max_length=self.max_length, max_batch=self.max_batch
        )

    def _session(self, batch: int) -> Session:
        return Session(self.steps, self._pool, self._lock, self.input_vocab_size, batch, self._before_call,
                       self.speculator.call)  # fmt: skip

    def _prepare(
        self,
        prompt: Prompt,
        max_new_tokens: int | None,
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        seed: int | Sequence[int] | None,
        stop_tokens: int | Sequence[int],
        stop_strings: str | Sequence[str],
        ignore_eos: bool,
        tokenizer: Tokenizer | Decode | None,
        wish: Wish,
    ) -> Generation:
        """Check everything a caller gave, then take states."""
        if self._before_call is not None:  # `start` leaves that to its session
            self._before_call()
        if not isinstance(ignore_eos, bool):
            raise InputError(f"ignore_eos is {ignore_eos!r}", remedy="Use True or False.")
        strings = string_list(stop_strings)
        stops = Stops(
            max_new_tokens, frozenset() if ignore_eos else self.eos, token_ids("stop_tokens", stop_tokens), strings
        )
        check_vocabulary("stop_tokens", stops.tokens, self.vocab_size)
        decode = decode_function(tokenizer if tokenizer is not None else self.tokenizer)
        if strings and decode is None:
            raise StopError("stop strings without a tokenizer", remedy="Pass tokenizer=, or use stop_tokens.")
        prompts = self._read(prompt)
        params, seeds = spread_params(sampling, len(prompts)), spread_seeds(seed, len(prompts))
        greedy = all(p.greedy for p in params)
        speculation = self.speculator.speculation(wish, self.setting(), greedy=greedy, seeded=seed is not None)
        rows = []
        for index, ids in enumerate(prompts):
            room = self.max_length - len(ids)
            if max_new_tokens is not None and max_new_tokens > room:
                raise PromptTooLongError(
                    f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed max_length {self.max_length}",
                    where=f"row {index}",
                )
            text = None if decode is None else Detokenizer(decode, ids.tolist(), strings)
            rows.append(Row(index, int(max_new_tokens or room), stops, text))
        given = (self._session(len(prompts)), prompts, rows, params, seeds)
        return Generation(*given) if speculation is None else SpeculativeGeneration(*given, speculation=speculation)
