"""Small models for the tests: transformers architectures with explicit configurations, and hand-written modules."""
