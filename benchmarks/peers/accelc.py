"""`accelc.compile(model)`, the decoder of this repository."""

from typing import Any

from peers import Job, Peer

PEER = Peer("accelc", copies=2)


def prepare(job: Job) -> Any:
    from shapes import load_model

    return load_model(job.path)


def build(job: Job, prepared: Any) -> Any:
    import accelc
    from accelc.demo.contenders import accelc_decoder

    return accelc_decoder(accelc.compile(prepared, max_length=job.max_length))
