"""`accelc.compile(model)`, the decoder of this repository."""

from typing import Any

from shapes import SCHEMES

from peers import Job, Peer

PEER = Peer("accelc", dtypes=("fp32", "bf16", "int8", "int4"))


def prepare(job: Job) -> Any:
    """The model in memory; for few bits its directory, which is quantized while it is read: that is timed."""
    from shapes import load_model

    return job.path if job.quantized else load_model(job.path)


def build(job: Job, prepared: Any) -> Any:
    import accelc

    if not job.quantized:
        return Settled(accelc.compile(prepared, max_length=job.max_length))
    scheme, head = SCHEMES[job.dtype]
    chosen = accelc.QuantizeWeights(scheme=scheme, head=head)
    return Settled(accelc.compile(prepared, max_length=job.max_length, quantize=chosen))


class Settled:
    """The decoder as the benchmark calls it; `settle` ends the time in which steps share their time with the exchange
    of pages, so that no sample depends on when it is taken.
    """

    def __init__(self, decoder: Any) -> None:
        from accelc.demo.contenders import accelc_decoder

        self._decoder = decoder
        self._generate, self.settle = accelc_decoder(decoder), decoder.settle

    def __call__(self, prompt: Any, new_tokens: int) -> Any:
        return self._generate(prompt, new_tokens)

    def share_of_limit(self, context: int, step_bytes: float, repeats: int = 60) -> float:
        """A decoding step alone, at `context` committed tokens: its share of the memory's bandwidth."""
        import torch
        from bandwidth import Bandwidth

        steps, meter = self._decoder.steps, Bandwidth(threads=torch.get_num_threads())
        lengths, states = torch.tensor([context]), steps.allocate(1)
        arguments = (torch.zeros(1, 1, dtype=torch.int64), lengths.view(1, 1), lengths, *states)
        steps.decode(*arguments)
        return meter.share(lambda: steps.decode(*arguments), step_bytes, repeats)
