"""One process a peer: it builds the decoder once and generates when asked; peers share neither memory nor settings."""

import multiprocessing as mp
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from peers import Job, Peer, load

from accelc.demo.contenders import Timed, make_ready


class WorkerError(RuntimeError):
    """A peer's process failed or ended; the message has the peer's name and what it said, `reason` the latter alone."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Start:
    """Seconds from weights in memory (or in the peer's file format) to the first token, beyond one warm generation."""

    ready_seconds: float
    first_token_seconds: float
    settle_seconds: float = 0.0
    """What a decoder spent afterwards on getting to its full speed, where it can be asked to."""

    @property
    def seconds(self) -> float:
        return self.ready_seconds + self.first_token_seconds


class Worker:
    """A peer's process. Use as a context manager: leaving it ends the process."""

    def __init__(self, name: str, peer: Peer, job: Job, caches: str) -> None:
        """caches: directory for everything that compilers keep between processes."""
        self.name = name
        here, there = mp.get_context("spawn").Pipe()
        environment = {
            **peer.environment,
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "BENCHMARK_CACHE_DIR": f"{caches}/others",
            "ACCELC_CACHE_DIR": f"{caches}/accelc",
            "OMP_NUM_THREADS": str(job.threads),
        }
        with _environment(environment):
            self._process = mp.get_context("spawn").Process(target=_serve, args=(there, name, job), daemon=True)
            self._process.start()
        there.close()
        self._pipe = here

    def start(self, prompt: torch.Tensor, new_tokens: int) -> Start:
        """Load, build and warm up."""
        return self._ask(("start", prompt.tolist(), new_tokens))

    def generate(self, prompt: torch.Tensor, new_tokens: int) -> Timed:
        """One generation, timed in the process."""
        return self._ask(("generate", prompt.tolist(), new_tokens))

    def share_of_limit(self, context: int, step_bytes: float) -> float | None:
        """Of the memory's bandwidth, what one step alone reads at; None where the peer's steps cannot be called."""
        return self._ask(("share", context, step_bytes))

    def _ask(self, question: Any) -> Any:
        try:
            self._pipe.send(question)
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self._process.join(5)
            raise WorkerError(self.name, f"its process ended with status {self._process.exitcode}") from error
        if isinstance(answer, str):
            raise WorkerError(self.name, answer)
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and free its memory."""
        self._pipe.close()  # the process sees the end of its input and returns
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for a process started inside; they must be there before it imports anything."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection, name: str, job: Job) -> None:
    torch.set_num_threads(job.threads)
    generate = None
    while True:
        try:
            question, given, more = pipe.recv()
        except EOFError:
            return
        try:
            if question == "share":
                measure = getattr(generate, "share_of_limit", None)
                pipe.send(measure(given, more) if measure else None)
                continue
            prompt, new_tokens = torch.tensor(given), more
            if question == "start":
                peer = load(name)
                prepared = peer.prepare(job)
                started = time.perf_counter()
                generate = peer.build(job, prepared)
                ready = make_ready(name, generate, started, prompt, new_tokens)
                first = generate(prompt, new_tokens).first_token_seconds
                begun = time.perf_counter()
                if hasattr(generate, "settle"):
                    generate.settle()
                pipe.send(Start(ready.compile_seconds, first, time.perf_counter() - begun))
            else:
                assert generate is not None, "start comes first"
                pipe.send(generate(prompt, new_tokens))
        except Exception as error:  # noqa: BLE001 (a library of another project may raise anything; the parent reports it)
            pipe.send(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
