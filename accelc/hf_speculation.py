"""`accelc.hf.decode(draft=...)`: what a call of transformers asks for, as a speculative generation.

transformers hands over functions that shape the scores of one token, and functions that say when to stop. A drafted
tree has the scores of many tokens at once, so the functions are read for what they do; unknown ones are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelc.ir.errors import GenerationModeError
from accelc.runtime import Decoder, SamplingParams
from accelc.runtime.stream import TokenStreamer, call_streamer

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation import GenerateDecoderOnlyOutput

SHAPING = {
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", "penalty"),
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
}
"""transformers' processors, in its order, which is ours: the option of `SamplingParams` and the attribute it is in."""
REMEDY = "Leave out the drafter: accelc.hf.decode() without draft= does it."


@dataclass(frozen=True)
class Limits:
    """When rows end."""

    length: int
    """Tokens of a sequence, padding included."""
    stop_tokens: tuple[int, ...]


def sampling_of(processors: Iterable[Any] | None, sample: bool, padding: list[int]) -> SamplingParams:
    """What the processors do to scores of rows with so much padding in front. Raises `GenerationModeError` for others
    than `SHAPING` knows.
    """
    found: dict[str, Any] = {"temperature": 1.0} if sample else {}
    last = -1
    for processor in processors or ():
        name = type(processor).__name__
        known = type(processor).__module__.startswith("transformers.") and name in SHAPING
        if not known or (name.startswith("Repetition") and not _counts_the_text(processor, padding)):
            raise GenerationModeError(f"the logits processor {name} together with a drafter", remedy=REMEDY)
        place = list(SHAPING).index(name)
        if place <= last:
            raise GenerationModeError(f"{name} behind {list(SHAPING)[last]}, together with a drafter", remedy=REMEDY)
        last = place
        option, attribute = SHAPING[name]
        found[option] = getattr(processor, attribute)
    return SamplingParams(**found)


def _counts_the_text(penalty: Any, padding: list[int]) -> bool:
    """Whether a repetition penalty counts the prompts without their padding, and nothing less."""
    ignored = getattr(penalty, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor):
        return ignored.tolist() == padding  # type: ignore[no-any-return]
    return not ignored and not any(padding)


def limits_of(criteria: Iterable[Any]) -> Limits:
    """When the criteria end a row. Raises `GenerationModeError` for others than a length and stop tokens."""
    length, stops = None, set()
    for criterion in criteria:
        name = type(criterion).__name__
        if name == "MaxLengthCriteria":
            length = min(criterion.max_length, length or criterion.max_length)
        elif name == "EosTokenCriteria":
            stops |= set(criterion.eos_token_id.flatten().tolist())
        else:
            raise GenerationModeError(f"the stopping criterion {name} together with a drafter", remedy=REMEDY)
    if length is None:
        raise GenerationModeError("no longest length", remedy="Pass max_new_tokens or max_length.")
    return Limits(length, tuple(sorted(stops)))


def speculate(
    decoder: Decoder,
    ids: Tensor,
    prompts: list[Tensor],
    processors: Any,
    criteria: Any,
    config: GenerationConfig,
    streamers: list[TokenStreamer],
) -> Tensor | GenerateDecoderOnlyOutput:
    """Continue ids [B, T], whose rows are `prompts` without their padding, by the decoder's own drafter: greedily the
    same sequences as without one, otherwise drawn from the same distribution, seeded by torch's global generator.
    """
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        raise GenerationModeError("output_scores or output_logits together with a drafter", remedy=REMEDY)
    if streamers and len(prompts) > 1:
        raise GenerationModeError(
            f"a streamer for {len(prompts)} rows together with a drafter: they advance by different numbers of tokens",
            remedy=REMEDY,
        )
    padding = [ids.shape[1] - len(prompt) for prompt in prompts]
    sampling, limits = sampling_of(processors, bool(config.do_sample), padding), limits_of(criteria)

    def show(event: Any) -> None:
        for streamer in streamers:
            call_streamer(streamer.put, torch.tensor([event.token]))

    result = decoder.generate(
        [prompt.cpu() for prompt in prompts],
        max_new_tokens=limits.length - ids.shape[1],
        sampling=sampling,
        stop_tokens=limits.stop_tokens,
        ignore_eos=True,
        streamer=show if streamers else None,
    )
    for streamer in streamers:
        call_streamer(streamer.end)
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    new = torch.nn.utils.rnn.pad_sequence(list(result.tokens), batch_first=True, padding_value=pad)
    sequences = torch.cat([ids, new.to(ids.device)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)
