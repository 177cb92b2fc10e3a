"""Loads and runs transformers' own models with typed errors, without changes to torch's global state."""
