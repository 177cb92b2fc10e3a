"""Factorization: the error of every rank of every layer, the choice of ranks, and the cores.

Input: weights and moments. Output: plans (kind, rank and store of every layer) and cores. Whitened SVD as in SVD-LLM (Wang
et al. 2024, arXiv:2403.07378); rounding with error feedback as in GPTQ (Frantar et al. 2022, arXiv:2210.17323).
"""
