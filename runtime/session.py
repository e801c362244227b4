"""A session: rows of tokens with their states, one step at a time. The level for algorithms that bring their own loop.

session = decoder.start([[1, 2, 3], [4, 5]])   # rows of different lengths, no left padding
session.logits                                 # [B, V]: what follows each prompt
logits = session.step(torch.tensor([7, 8]))    # [B, 1, V]; the tokens are committed
session.rollback([0], [3])                     # row 0 holds 3 tokens again
session.close()                                # gives its states back for the next call
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from accelc.ir.errors import (
    BatchSizeError,
    CopyError,
    EmptyPromptError,
    InputError,
    NonFiniteLogitsError,
    PromptTooLongError,
    RankError,
    SessionClosedError,
)
from accelc.runtime.arguments import integers
from accelc.runtime.functions import Functions, increase
from accelc.runtime.prompts import check_range, split_rows
from accelc.runtime.steps import Steps, TreeSteps
from accelc.runtime.workspace import Workspace, WorkspacePool


def round_up(tokens: int, chunk: int) -> int:
    """The width that a prefill of `tokens` is padded to: 1, powers of two, then multiples of 16, at most `chunk`.

    A compiled step plans its memory for each width it meets, so prompts share a few; the padding costs less than a
    plan.
    """
    width = 1 << (tokens - 1).bit_length() if tokens <= 16 else -(-tokens // 16) * 16
    return min(width, chunk)


def placed(tokens: Tensor, depths: Tensor, words: Tensor, lengths: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    """Trees of tokens [B, N] behind lengths [B], depths and words [B or 1, N, ...], as a step takes them: ids [B, N],
    positions [B, N] up to `last` (of no dim), words [B, N, W].
    """
    positions = lengths[:, None] + depths
    positions = torch.where(positions > last, last, positions)
    return tokens.clamp(min=0), positions, words.expand(len(tokens), -1, -1).contiguous()


@dataclass(frozen=True)
class TappedChunk:
    """What a prefill returned besides logits for one chunk of the prompts."""

    valid: Tensor
    """[B] int64: tokens of the chunk that each row has."""
    taps: tuple[Tensor, ...]
    """[B, N, ...] each."""


class Session:
    """B rows; row b holds ``lengths[b]`` committed tokens, in slots 0 .. lengths[b] - 1 of every state.

    Made by `Decoder.start`. Public methods check their input, run one at a time per decoder (``lock``), and leave the
    session as it was when they raise. A session is a context manager that closes itself.
    """

    def __init__(
        self,
        steps: Steps,
        pool: WorkspacePool,
        lock: threading.RLock,
        input_vocab_size: int | None,
        batch: int,
        before_call: Callable[[], None] | None = None,
        call: Functions | None = None,
    ) -> None:
        self.steps = steps
        self.batch = batch
        self.call = call or Functions()
        """Calls tensor functions, until the session is closed."""
        self._pool, self._lock, self._before_call = pool, lock, before_call
        self.input_vocab_size = input_vocab_size
        self._space: Workspace | None = pool.take(batch)
        self._states = self._space.states
        self.lengths = self._space.lengths
        """Committed tokens per row, int64 [B]; a live buffer: read it, change it through `step` and `rollback`."""
        self._active, self.decode = self._space.active, self._space.decode
        with torch.inference_mode(False):
            self._last_position = torch.tensor(steps.max_length - 1, device=steps.device)
        self._trees: TreeSteps | None = None
        self.taps: tuple[Tensor, ...] = ()
        """What the last `verify` returned besides logits, [B, N, ...] each; the next overwrites it."""
        self.logits: Tensor = torch.empty(0)
        """[B, V]: the logits after the last token of each row; empty after a `rollback`, until tokens are appended."""

    # -- the hot path: no checks; the caller is inside `alone` -----------------------------------------------------

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other call of the decoder runs meanwhile; inference mode. Raises `SessionClosedError`."""
        with self._lock, torch.inference_mode():
            if self._space is None:
                raise SessionClosedError("the session is closed")
            yield

    def tap(self, passes: tuple[object, ...]) -> None:
        """From now on `prefill` and `verify` give what these passes add to the step; see `Steps.trees`."""
        assert self.steps.trees is not None
        with self.call.compiling:
            self._trees = self.steps.trees(passes)

    def prefill(self, prompts: Sequence[Tensor], tapped: list[TappedChunk] | None = None) -> Tensor:
        """Append one prompt per row (int64 [T] CPU tensors, checked) in chunks; [B, V] logits after each row's last.
        `tapped` gets what the chunks returned besides logits.
        """
        chunk, device = self.steps.chunk, self.steps.device
        counts = torch.tensor([len(p) for p in prompts])
        longest = int(counts.max())
        padded = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)  # [B, longest], zeros behind
        last_width = (longest - 1) % chunk + 1
        padded = torch.nn.functional.pad(padded, (0, round_up(last_width, chunk) - last_width)).to(device)
        final: Tensor | None = None
        for begin in range(0, longest, chunk):
            tokens = padded[:, begin : begin + chunk].contiguous()
            valid = (counts - begin).clamp(0, tokens.shape[1]).to(device)
            if tapped is None or self._tree_steps().prefill is None:
                logits = self._last_logits(tokens, valid)
            else:
                logits, *taps = self._tapped(tokens, valid)
                tapped.append(TappedChunk(valid, tuple(taps)))
            # A row keeps the logits of the chunk it ends in; later chunks only pad it.
            final = logits if final is None else torch.where((valid > 0)[:, None], logits, final)
            self.lengths.add_(valid)
        assert final is not None
        return final

    def append(self, tokens: Tensor) -> Tensor:
        """Append a chain of N tokens to every row (int64 [B, N]): logits [B, N, V]."""
        logits = self._run(tokens)
        self.lengths.add_(tokens.shape[1])
        return logits

    def verify(self, tokens: Tensor, depths: Tensor, words: Tensor) -> Tensor:
        """Run a tree of new tokens [B, N] behind the committed ones, committing nothing: logits [B, N, V].

        depths [B, N] and words [B, N, W] may be the same for all rows ([1, ...]); negative tokens are none, and what is
        computed for them means nothing. What is returned, the next call may overwrite.
        """
        run = self._tree_steps().verify
        ids, positions, tree = self.call(placed, tokens, depths, words, self.lengths, self._last_position)
        logits, *taps = self.call.step(run, ids, positions, self.lengths, tree, *self._states)
        self.taps = tuple(taps)
        return logits

    def commit(self, path: Tensor, counts: Tensor) -> None:
        """Keep the first counts[b] nodes of path [B, K] of the tree that was verified last."""
        if path.shape[1] > 1:  # else the root stands where it belongs
            self.call.step(self._tree_steps().commit, path, counts, self.lengths, *self._states)
        self.call(increase, self.lengths, counts)

    @property
    def active(self) -> Tensor:
        """[B] int64: 1 for each row that has not been retired, else 0; a live buffer."""
        return self._active

    def retire(self, rows: Sequence[int]) -> None:
        """Rows that generate no more: from now on `decode` leaves their lengths alone."""
        self._active[list(rows)] = 0

    def synchronize(self) -> None:
        """Wait for the device, so that the host's clock means something."""
        if self.steps.device.type == "cuda":
            torch.cuda.synchronize(self.steps.device)

    def _last_logits(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Run tokens [B, N] and return the logits [B, V] at each row's last valid token."""
        last = (valid - 1).clamp_(min=0)
        if tokens.shape[1] > 1 and self.steps.prefill is not None:
            return self.steps.prefill(tokens, self._chain(tokens), self.lengths, last, *self._states)[0].select(1, 0)
        logits = self._run(tokens)
        return logits[torch.arange(self.batch, device=logits.device), last]

    def _tree_steps(self) -> TreeSteps:
        if self._trees is None:
            self.tap(())
        assert self._trees is not None
        return self._trees

    def _tapped(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        """As `_last_logits`, with the further outputs [B, N, ...]."""
        prefill = self._tree_steps().prefill
        assert prefill is not None
        last = (valid - 1).clamp_(min=0)
        logits, *taps = prefill(tokens, self._chain(tokens), self.lengths, last, *self._states)
        return logits.select(1, 0), *taps

    def _run(self, tokens: Tensor) -> Tensor:
        """Run tokens [B, N] behind the committed ones, committing nothing: logits [B, N, V]."""
        step = self.steps.decode if tokens.shape[1] == 1 else self.steps.many
        return step(tokens, self._chain(tokens), self.lengths, *self._states)[0]

    def _chain(self, tokens: Tensor) -> Tensor:
        """Positions [B, N] of a chain behind the lengths. Padding may reach max_length: position tables end there."""
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        return (self.lengths[:, None] + offsets).clamp_(max=self.steps.max_length - 1)

    # -- the public, checked level -----------------------------------------------------------------------------------

    def extend(self, rows: Sequence[Tensor] | Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to every row, of different lengths if you like, in chunks; [B, V] logits after each row's last.

        Raises `InputError`s for bad ids, `PromptTooLongError` beyond max_length, `NonFiniteLogitsError`.
        """
        prompts = split_rows(rows)
        for index, row in enumerate(prompts):
            if row.numel() == 0:
                raise EmptyPromptError("nothing to append", where=f"row {index}")
            self._check_ids(row, f"row {index}")
        with self._transaction([len(p) for p in prompts]):
            logits = self.prefill(prompts)
            self._require_finite(logits.amax(-1, keepdim=True))
        self.logits = logits
        return logits

    def step(self, tokens: Tensor, valid: Sequence[int] | None = None) -> Tensor:
        """Append a chain of N tokens per row, N <= chunk, and return their logits [B, N, V].

        tokens: integers [B] or [B, N]. valid: how many of the N are meant per row (all by default); the others are
        padding at the row's end, are not committed, and their logits mean nothing. Speculation verifies a draft by
        stepping it and rolling back what it rejects. The logits stay valid until the next step.
        """
        if isinstance(tokens, Tensor) and tokens.dim() == 1:
            tokens = tokens[:, None]
        if not isinstance(tokens, Tensor):
            raise RankError(
                f"step tokens of type {type(tokens).__name__}",
                remedy=f"Pass a tensor [{self.batch}] or [{self.batch}, N]; lists of different lengths go to extend().",
            )
        if tokens.dim() != 2 or tokens.shape[0] != self.batch or not 1 <= tokens.shape[1] <= self.steps.chunk:
            raise RankError(
                f"step tokens of shape {list(tokens.shape)}",
                remedy=f"Pass [{self.batch}] or [{self.batch}, N] with N at most {self.steps.chunk}.",
            )
        ids = torch.stack(split_rows(tokens))
        self._check_ids(ids, "step")
        n = ids.shape[1]
        counts = [n] * self.batch if valid is None else integers("valid", valid)
        if not all(0 <= v <= n for v in counts):
            raise InputError(f"valid must hold counts in [0, {n}], not {counts}")
        with self._transaction(counts):
            advance = torch.tensor(counts, device=self.steps.device)
            logits = self._run(ids.to(self.steps.device))
            padding = torch.arange(n, device=logits.device) >= advance[:, None]
            self._require_finite(logits.amax(-1).masked_fill(padding, 0.0))
            self.lengths.add_(advance)
            last = logits[torch.arange(self.batch, device=logits.device), (advance - 1).clamp(min=0)]
            before = self.logits if self.logits.shape == last.shape else torch.full_like(last, torch.nan)
            after = torch.where((advance > 0)[:, None], last, before)
        self.logits = after
        return logits

    def rollback(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Shorten ``rows`` to ``lengths`` committed tokens each: the tokens behind are forgotten, at no cost."""
        rows, lengths = integers("rows", rows), integers("lengths", lengths)
        if len(rows) != len(lengths):
            raise InputError(f"{len(rows)} rows and {len(lengths)} lengths")
        if len(set(rows)) != len(rows):
            raise InputError(f"rows {rows} name one of them twice")
        with self._transaction():
            present = self.lengths.tolist()
            for row, length in zip(rows, lengths):
                if not 0 <= row < self.batch or not 0 <= length <= present[row]:
                    raise InputError(f"cannot roll row {row} back to {length} tokens", where=f"lengths {present}")
            for row, length in zip(rows, lengths):
                self.lengths[row] = length
        self.logits = torch.empty(0)

    def __reduce__(self) -> NoReturn:
        raise CopyError("a Session cannot be copied or pickled: it holds states of its decoder")

    def close(self, *, discard: bool = False) -> None:
        """Give the states back. ``discard`` frees them instead: for states a failed run may have filled with NaN."""
        with self._lock:
            if self._space is not None and not discard:
                self._pool.give(self._space)
            self._space, self._states = None, ()
            self.call.release()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(discard=kind is not None)

    # -- checks ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self, counts: Sequence[int] | None = None) -> Iterator[None]:
        """Alone on the decoder, in inference mode, with room for ``counts`` more tokens; whatever raises is undone."""
        with self.alone():
            if self._before_call is not None:
                self._before_call()
            if counts is not None:
                self._check_room(counts)
            before = self.lengths.clone()
            try:
                yield
            except BaseException:  # KeyboardInterrupt as well
                self._restore(before)
                raise

    def _restore(self, lengths: Tensor) -> None:
        """Put the lengths back and zero every slot behind them: NaN there would survive a zero attention weight."""
        self.lengths.copy_(lengths)
        for spec, state in zip(self.steps.states, self._states):
            slots = torch.arange(state.shape[spec.time_dim], device=state.device)
            shape = [1] * state.dim()
            shape[0], shape[spec.time_dim] = self.batch, len(slots)
            state.masked_fill_((slots >= lengths[:, None]).reshape(shape), 0.0)

    def _check_ids(self, ids: Tensor, where: str) -> None:
        if self.input_vocab_size is not None:
            check_range(ids, self.input_vocab_size, where)

    def _check_room(self, counts: Sequence[int]) -> None:
        if len(counts) != self.batch:
            raise BatchSizeError(f"{len(counts)} rows for a session of {self.batch}")
        for row, (length, count) in enumerate(zip(self.lengths.tolist(), counts)):
            if length + count > self.steps.max_length:
                raise PromptTooLongError(
                    f"{length} tokens and {count} more exceed max_length {self.steps.max_length}", where=f"row {row}"
                )

    @staticmethod
    def _require_finite(peaks: Tensor) -> None:
        """Raise `NonFiniteLogitsError` unless the largest logits [B, N] are numbers; single tokens may be -inf."""
        finite = peaks.isfinite().all(-1).tolist()
        if not all(finite):
            rows = [row for row, ok in enumerate(finite) if not ok]
            raise NonFiniteLogitsError("the model's logits are not finite", where=f"rows {rows}")
