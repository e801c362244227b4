"""The ground floor: programs, states, the op dialect, exactness and errors. Imports torch only."""

from accelc.ir import dialect as dialect
from accelc.ir import sampling as sampling
from accelc.ir.exactness import Exactness
from accelc.ir.program import PassRecord, Program, check
from accelc.ir.state import StateSpec

__all__ = ["Exactness", "PassRecord", "Program", "StateSpec", "check", "dialect", "sampling"]
