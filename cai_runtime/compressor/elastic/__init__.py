"""Elastic checkpoints: one file that opens at any keep.

Takes curves of error by rank for every layer; gives forms of each layer and the order in which they grow. See
`docs/format.md#elastic-checkpoints`.
"""
