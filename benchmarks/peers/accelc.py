"""`accelc.compile(model)`, the decoder of this repository."""

from typing import Any

from peers import Job, Peer

PEER = Peer("accelc")


def prepare(job: Job) -> Any:
    from shapes import load_model

    return load_model(job.path)


def build(job: Job, prepared: Any) -> Any:
    import accelc

    return Settled(accelc.compile(prepared, max_length=job.max_length))


class Settled:
    """The decoder as the benchmark calls it; `settle` ends the time in which steps share their time with the exchange
    of pages, so that no sample depends on when it is taken.
    """

    def __init__(self, decoder: Any) -> None:
        from accelc.demo.contenders import accelc_decoder

        self._generate, self.settle = accelc_decoder(decoder), decoder.settle

    def __call__(self, prompt: Any, new_tokens: int) -> Any:
        return self._generate(prompt, new_tokens)
