"""Each type in a process of its own, so that one that crashes, grows or hangs costs its own row alone."""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from family_probe import Row, probe

THREADS = 1  # in each process; the models are small


@dataclass
class Running:
    """A process at work; `deadline` is a monotonic time in seconds."""

    model_type: str
    process: mp.process.BaseProcess
    deadline: float


def sweep(types: list[str], *, jobs: int, timeout: float, derive: bool) -> Iterator[Row]:
    """Probe each type in its own process; one that crashes or runs past `timeout` seconds gives a row that says so."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["family_probe"])  # torch and transformers are imported once
    waiting = list(reversed(types))
    running: dict[Connection, Running] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            receiver, sender = context.Pipe(duplex=False)
            model_type = waiting.pop()
            process = context.Process(target=child, args=(model_type, derive, sender))
            process.start()
            sender.close()
            running[receiver] = Running(model_type, process, time.monotonic() + timeout)
        nearest = min(entry.deadline for entry in running.values())
        ready = wait(list(running), timeout=max(0.0, nearest - time.monotonic()))
        late = [receiver for receiver, entry in running.items() if entry.deadline <= time.monotonic()]
        for receiver in {*ready, *late}:
            entry = running.pop(receiver)
            yield collect(receiver, entry, timed_out=receiver not in ready, timeout=timeout)


def collect(receiver: Connection, entry: Running, *, timed_out: bool, timeout: float) -> Row:
    """The row that the process sent, or one that says how it ended; the process is gone afterwards."""
    row = Row(entry.model_type)
    if timed_out:
        entry.process.kill()
        row.stopped, row.reason, row.seconds = "timed out", f"stopped after {timeout:.0f} s", timeout
    else:
        try:
            row = receiver.recv()
        except EOFError:
            entry.process.join()
            row.stopped, row.reason = "crashed", f"the process ended with code {entry.process.exitcode}"
    entry.process.join()
    receiver.close()
    return row


def child(model_type: str, derive: bool, sender: Connection, run: Callable[..., Row] = probe) -> None:
    """What each process does: send the row and end."""
    import torch

    torch.set_num_threads(THREADS)
    sender.send(run(model_type, derive=derive))
    sender.close()
