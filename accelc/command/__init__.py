"""Commands of the command line that have a file of their own, and what all commands share."""

from accelc.command.shared import DTYPE, MODEL, QUANTIZE, compiled, errors, named_errors

__all__ = ["DTYPE", "MODEL", "QUANTIZE", "compiled", "errors", "named_errors"]
