"""Regions of a step program that one kernel each could compute, and what they move and compute."""

from accelc.codegen.fusion.partition import Fusion as Fusion
from accelc.codegen.fusion.partition import partition as partition
