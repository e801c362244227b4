"""Checks of the arguments that a decoder and its calls take; each wrong one is an error with its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

from accelc.ir.errors import InputError, StopError, TokenRangeError, unknown_options
from accelc.runtime.sampling import SamplingParams


def reject_unknown(function: Callable[..., Any], unknown: Mapping[str, object]) -> None:
    """Raise `UnknownOptionError` when a call got keyword arguments that ``function`` does not name."""
    if not unknown:
        return
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    sampling = [f.name for f in fields(SamplingParams) if f.name in unknown]
    settings = ", ".join(f"{name}={unknown[name]!r}" for name in sampling)
    advice = f"Pass sampling=accelc.SamplingParams({settings}). " if sampling and "sampling" in known else ""
    if "input_ids" in unknown:
        advice += "Give the prompt first, without a name. "
    raise unknown_options(f"decoder.{function.__name__}", unknown, known, advice=advice)


def is_integer(value: object) -> bool:
    """Whether a value is an integer of Python or numpy; truth values are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise InputError unless ``value`` is an integer of at least ``least``."""
    if not is_integer(value) or value < least:  # type: ignore[operator]
        raise InputError(f"{name} is {value!r}", remedy=f"Give an integer of at least {least}.")


def integers(name: str, given: object) -> list[int]:
    """A list of integers, also from an array or a tensor [N]. Raises InputError."""
    values = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InputError(f"{name} is {given!r}", remedy=f"{name} takes a list of integers, one per row.")
    values = list(values)
    if not all(map(is_integer, values)):
        raise InputError(f"{name} is {values!r}", remedy=f"{name} takes a list of integers, one per row.")
    return [int(value) for value in values]


def token_ids(name: str, given: object) -> frozenset[int]:
    """Ids given as one, several (also as an array or tensor) or none. Raises `StopError`."""
    if given is None:
        return frozenset()
    if isinstance(given, Tensor | np.ndarray):
        given = given.tolist()
    if is_integer(given):
        given = [given]
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise StopError(f"{name} is {given!r}", remedy=f"{name} takes a token id or a list of them.")
    ids = list(given)
    for token in ids:
        if not is_integer(token) or token < 0:
            raise StopError(f"{name} holds {token!r}", remedy="Token ids are integers >= 0.")
    return frozenset(map(int, ids))


def check_vocabulary(name: str, ids: Collection[int], vocab_size: int) -> None:
    """Raise `TokenRangeError` for ids that the model cannot produce: nobody should wait for them."""
    beyond = sorted(i for i in ids if i >= vocab_size)
    if beyond:
        raise TokenRangeError(f"{name} holds {beyond[0]}, outside the vocabulary of {vocab_size}", where=name)


def string_list(given: object) -> tuple[str, ...]:
    """Stop strings given as one, several or none. Raises `StopError`; `Stops` checks each of them."""
    if given is None:
        return ()
    if isinstance(given, str):
        return (given,)
    if isinstance(given, bytes | Mapping) or not isinstance(given, Iterable):
        raise StopError(f"stop_strings is {given!r}", remedy="stop_strings takes a text or a list of texts.")
    return tuple(given)
