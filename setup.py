"""Lists the packages: `accelc` itself, and the rooms at the top of the repository under the same import name.

Everything else is in pyproject.toml; its package-dir table says where each room lies.
"""

from setuptools import find_packages, setup

ROOMS = ("passes", "codegen", "runtime")

setup(
    packages=find_packages(include=["accelc", "accelc.*"])
    + [f"accelc.{package}" for room in ROOMS for package in find_packages(include=[room, f"{room}.*"])]
)
