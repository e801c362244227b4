"""transformers glue: `model.generate(..., custom_generate=accelc.hf.decode())` decodes with accelc.

transformers prepares everything (config, padding, logits processors, stopping criteria) and hands over the loop. The
loop here runs the compiled step and otherwise does what transformers' own sampling loop does, so that the outcome is
the same: tokens, padding, scores, and with do_sample the same draws from torch's global generator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import accelc
from accelc.compiler import OPTIONS
from accelc.confirm import confirm
from accelc.decoder import CompiledDecoder
from accelc.fingerprint import fingerprint
from accelc.hf_speculation import speculate
from accelc.ir.errors import (
    DTypeError,
    EmptyPromptError,
    GenerationModeError,
    NonFiniteLogitsError,
    PromptTooLongError,
    StreamerError,
    unknown_options,
)
from accelc.runtime import Session
from accelc.runtime.arguments import check_count
from accelc.runtime.stream import TokenStreamer, call_streamer
from accelc.watch import memory_of, tensors_of, version_of

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation import GenerateDecoderOnlyOutput

MODES = ("greedy_search", "sample")
NEUTRAL = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})
"""Model arguments that transformers itself prepares for a text prompt; others would change what the model computes."""
SMALLEST_BUCKET = 256


def decode(
    *wrong: object, max_length: int | None = None, streamer: TokenStreamer | None = None, **options: object
) -> CustomGenerate:
    """An object for `model.generate(custom_generate=...)`.

    max_length: longest sequence the model is compiled for, and the most a call may ask for; None takes the call's own,
    rounded up to a power of two, so that calls of similar length share one compilation. streamer: a transformers
    streamer for every call, beside the one that a call brings. options: for `accelc.compile`; with ``draft`` tokens
    come by speculation: the same ones greedily, others of the same distribution when sampling.

    Raises `UnknownOptionError`, `InputError`, `StreamerError`.

    The compiled decoder is kept with the model and made anew when a parameter, a buffer, an attribute of a submodule or
    its code has changed (what `accelc.fingerprint` sees). A model that has no fingerprint, because of a hook of its
    own for example, is compared with its decoder on a few tokens at each call.
    """
    if wrong:  # generate called this function itself
        raise GenerationModeError(
            "custom_generate is the function accelc.hf.decode", remedy="Call it: custom_generate=accelc.hf.decode()."
        )
    if unknown := options.keys() - set(OPTIONS):
        raise unknown_options("accelc.hf.decode", unknown, ("streamer", *OPTIONS))
    if max_length is not None:
        check_count("max_length", max_length, least=2)
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise StreamerError(
            f"{type(streamer).__name__} is no transformers streamer", remedy="Pass an object with put and end."
        )
    return CustomGenerate(max_length, streamer, options)


@dataclass
class CustomGenerate:
    """What `decode` returns. Raises `GenerationModeError` for modes and arguments that the loop does not do."""

    max_length: int | None
    streamer: TokenStreamer | None
    options: dict[str, Any]

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
        stopping_criteria: Any = None,
        generation_config: GenerationConfig | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continue input_ids [B, T] (left-padded where attention_mask is 0) as `GenerationMixin._sample` does.

        Returns sequences [B, T + new], or transformers' output object (its past_key_values are None).
        """
        if generation_config is None or stopping_criteria is None:
            raise GenerationModeError(
                "called without generation_config and stopping_criteria",
                remedy="Pass the object as custom_generate= to model.generate; do not call it yourself.",
            )
        refuse_what_differs(model, generation_config, model_kwargs)
        call = self._call_of_generate()
        if call.get("assistant_model") is not None:
            raise GenerationModeError("assistant_model", where="model.generate")
        prompts = unpad(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
        wanted = int(generation_config.max_length)
        if self.max_length is not None and wanted > self.max_length:
            raise PromptTooLongError(
                f"the call asks for sequences of up to {wanted} tokens, accelc.hf.decode for {self.max_length}",
                remedy="Give decode a larger max_length or none, or generate a smaller max_new_tokens.",
            )
        decoder = compiled(model, self.max_length or wanted, self.options, exact=self.max_length is not None)
        own, given = self.streamer, call.get("streamer")
        if own is not None and own is not given:
            call_streamer(own.put, input_ids.cpu())  # to the call's own streamer transformers has shown the prompt
        streamers = list(dict.fromkeys(s for s in (own, given) if s is not None))
        if self.options.get("draft") is not None:
            return speculate(
                decoder, input_ids, prompts, logits_processor, stopping_criteria, generation_config, streamers
            )
        with decoder.start(prompts) as session:
            return self._loop(session, input_ids, logits_processor, stopping_criteria, generation_config, streamers)

    def _call_of_generate(self) -> dict[str, Any]:
        """The arguments of the call of generate that runs this; empty where there is none. transformers passes neither
        its streamer nor its assistant_model on to a custom_generate, which would lose them in silence.
        """
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_locals.get("custom_generate") is self and "streamer" in frame.f_locals:
                return dict(frame.f_locals)
            frame = frame.f_back
        return {}

    def _loop(
        self,
        session: Session,
        ids: Tensor,
        processor: Any,
        criteria: Any,
        config: GenerationConfig,
        streamers: list[TokenStreamer],
    ) -> Tensor | GenerateDecoderOnlyOutput:
        pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        pad = config._pad_token_tensor
        as_object = bool(config.return_dict_in_generate)
        scores: tuple[Tensor, ...] | None = () if as_object and config.output_scores else None
        raw: tuple[Tensor, ...] | None = () if as_object and config.output_logits else None
        unfinished = torch.ones(len(ids), dtype=torch.int64, device=ids.device)
        logits = session.logits
        while True:
            fresh = logits.to(device=ids.device, dtype=torch.float32, copy=True)  # [B, V]
            if not fresh.amax(-1).isfinite().all():
                raise NonFiniteLogitsError("the model's logits are not finite", where=f"length {ids.shape[1]}")
            shaped = processor(ids, fresh.clone()) if processor else fresh
            scores = scores if scores is None else (*scores, shaped)
            raw = raw if raw is None else (*raw, fresh)
            tokens = pick(shaped, bool(config.do_sample))
            # Ended rows show the pad id; what is fed for them does not matter, but must be a token.
            feed = tokens * unfinished if pads else tokens
            if pads:
                tokens = feed + pad.to(ids.device) * (1 - unfinished)
            ids = torch.cat([ids, tokens[:, None]], dim=-1)
            unfinished = unfinished & ~criteria(ids, scores)
            for streamer in streamers:
                call_streamer(streamer.put, tokens.cpu())
            if not unfinished.any():
                break
            # Unchecked: the tokens come from the logits, and max_length is among the criteria.
            with session.alone():
                logits = session.decode(feed)
        for streamer in streamers:
            call_streamer(streamer.end)
        if not as_object:
            return ids
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=ids, scores=scores, logits=raw)


def pick(scores: Tensor, sample: bool) -> Tensor:
    """The next token of each row of scores [B, V]: drawn from their softmax, or the largest."""
    if sample:
        probs = torch.softmax(scores, dim=-1)
        if not probs.isfinite().all():
            raise NonFiniteLogitsError("the processed scores have no distribution", where="logits processors or model")
        return torch.multinomial(probs, num_samples=1).squeeze(1)
    return scores.argmax(dim=-1)


def refuse_what_differs(model: PreTrainedModel, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise `GenerationModeError` for everything that would make the outcome differ from transformers' own."""
    mode = config.get_generation_mode()
    if mode not in MODES:
        raise GenerationModeError(f"generation mode {mode.value!r}", where=f"supported: {', '.join(MODES)}")
    if (config.num_beams or 1) > 1:
        raise GenerationModeError(f"num_beams={config.num_beams}")
    if config.output_attentions or config.output_hidden_states:
        raise GenerationModeError("output_attentions or output_hidden_states: the compiled step returns logits alone")
    if model.config.is_encoder_decoder:
        raise GenerationModeError("an encoder-decoder model", remedy="Only decoder-only models have a derived step.")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise GenerationModeError(
            "past_key_values that already hold tokens", remedy="Pass the whole text as input_ids."
        )
    foreign = sorted(k for k, v in model_kwargs.items() if v is not None and k not in NEUTRAL)
    if foreign:
        raise GenerationModeError(f"model arguments {', '.join(foreign)}", where="model.generate")


def unpad(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[Tensor]:
    """Rows [T_b] without their left padding. Raises `GenerationModeError` for holes, right padding, other positions."""
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise DTypeError(f"input_ids of dtype {input_ids.dtype}")
    kept = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.to(torch.bool)
    if kept.shape != input_ids.shape:
        raise GenerationModeError(f"attention_mask {list(kept.shape)} for input_ids {list(input_ids.shape)}")
    rows = []
    for index, (row, keep) in enumerate(zip(input_ids, kept)):
        count = int(keep.sum())
        where = f"row {index}"
        if count == 0:
            raise EmptyPromptError(f"the prompt {'is all padding' if len(row) else 'has no tokens'}", where=where)
        if not bool(keep[len(row) - count :].all()):
            raise GenerationModeError(
                "attention_mask with holes or right padding", where=where, remedy="Pad on the left."
            )
        given = None if positions is None else positions[min(index, len(positions) - 1)][-count:].tolist()
        if given is not None and given != list(range(count)):
            raise GenerationModeError("position_ids other than 0, 1, 2, ... per row", where=where)
        rows.append(row[len(row) - count :])
    return rows


# -- compiled decoders, kept with their model --------------------------------------------------------------------------


@dataclass
class Entry:
    """One compiled decoder, what it was compiled with, and the parameters it was compiled from."""

    options: dict[str, Any]
    weights: tuple[object, ...]
    decoder: CompiledDecoder


class DecoderCache(list[Entry]):
    """Lives in the model's ``__dict__``, so that it dies with the model; copies and pickles of a model start empty."""

    def __deepcopy__(self, memo: dict[int, object]) -> DecoderCache:
        return DecoderCache()

    def __reduce__(self) -> tuple[type[DecoderCache], tuple[()]]:
        return DecoderCache, ()


def compiled(
    model: PreTrainedModel, max_length: int, options: dict[str, Any], *, exact: bool = False
) -> CompiledDecoder:
    """The model's decoder for at least ``max_length`` tokens, compiled unless one is kept; one is kept per options."""
    cache: DecoderCache = model.__dict__.pop("_accelc_decoders", DecoderCache())  # not part of what is fingerprinted
    key = fingerprint(model)
    weights = (key, *((memory_of(tensor), version_of(tensor)) for _, tensor in tensors_of(model)))
    model.__dict__["_accelc_decoders"] = cache
    cache[:] = [entry for entry in cache if entry.weights == weights]
    deciding = {name: value for name, value in options.items() if name != "progress"}
    for entry in cache:
        fits = entry.options == deciding and entry.decoder.max_length >= max_length
        if fits and (key is not None or still_agrees(model, entry.decoder)):
            return entry.decoder
    decoder = accelc.compile(model, max_length=max_length if exact else bucket(model, max_length), **options)
    cache[:] = [entry for entry in cache if entry.options != deciding]
    cache.append(Entry(deciding, weights, decoder))
    return decoder


def still_agrees(model: PreTrainedModel, decoder: CompiledDecoder) -> bool:
    """For models without a key, whose code and attributes cannot be compared: their logits can."""
    return confirm(model, decoder.programs["step"], decoder.steps.decode, decoder.steps.capacity)


def bucket(model: PreTrainedModel, length: int) -> int:
    """``length`` rounded up to a power of two, but not beyond the model's own positions unless ``length`` is."""
    rounded = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return rounded if not isinstance(limit, int) else min(rounded, max(limit, length))
