"""Program transformations: one file, one pass.

A pass is a frozen dataclass derived from `Pass` and registered by name (`base`, `registry`); a `Pipeline` orders
passes, runs them and checks after each one (`order`, `manager`, `verify`); `bisect` finds the first that breaks
something. docs/passes.md shows how to write one.
"""

from accelc.passes.base import Pass, PassResult
from accelc.passes.manager import Pipeline, report
from accelc.passes.registry import build_pass, find_pass, known_passes, register_pass

__all__ = ["Pass", "PassResult", "Pipeline", "build_pass", "find_pass", "known_passes", "register_pass", "report"]
