"""Speculative decoding: a drafter proposes a tree of tokens, one step verifies it, a rule accepts a path of it.

Start at `generation.SpeculativeGeneration`. A drafter is one file (`draft.Drafter`), an acceptance rule one class
(`acceptance.AcceptanceRule`); both are registries.
"""
