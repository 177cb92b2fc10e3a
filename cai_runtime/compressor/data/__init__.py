"""Calibration data: the sequences of tokens, or windows of audio, that statistics, refinement and healing read.

Takes a source (the model itself, files, a dataset, recordings); gives token sequences of one length, or speech samples.
Text that a model writes itself follows LLM-QAT (Liu et al. 2023, arXiv:2305.17888).
"""
