"""Conversation formats: messages in, token ids out; deltas in, events out. One file per format.

`cai_runtime.chat(...)` is a function too: see `cai_runtime.default.chat`.
"""
