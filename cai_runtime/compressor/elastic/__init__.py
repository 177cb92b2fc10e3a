"""Elastic checkpoints: one file that opens at any keep.

Input: error by rank of every layer. Output: the forms of each layer, and the order in which their ranks grow with keep. See
`docs/format.md#elastic-checkpoints`.
"""
