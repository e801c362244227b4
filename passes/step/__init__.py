"""Deriving the cached step: sizes, roles, rules, the index domain, the cut and the emission."""
