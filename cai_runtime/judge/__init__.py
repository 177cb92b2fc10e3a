"""Measures the quality of a checkpoint: perplexity, KL divergence, top-1 agreement and word errors, alone or against a
reference.

Takes checkpoint directories and text or audio; returns results, and pictures of them. Judging is no part of making a
checkpoint.
"""
