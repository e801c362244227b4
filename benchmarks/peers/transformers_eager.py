"""transformers' `generate` as it is."""

from typing import Any

from peers import Job, Peer

PEER = Peer("transformers, eager")


def prepare(job: Job) -> Any:
    from shapes import load_model

    return load_model(job.path)


def build(job: Job, prepared: Any) -> Any:
    from accelc.demo.contenders import transformers_eager

    return transformers_eager(prepared)
