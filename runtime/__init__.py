"""Runs compiled programs: state, step execution, acceptance, sampling, scheduling."""
