"""Calibration data: token sequences or audio windows for statistics, refinement and healing.

Input: a source (the model itself, files, a dataset, recordings). Output: token sequences of one length, or speech samples.
Text written by the model itself follows LLM-QAT (Liu et al. 2023, arXiv:2305.17888).
"""
