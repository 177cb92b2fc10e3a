"""Transformers' own models, run with care: typed errors, torch's global state left alone, generation in batches."""
