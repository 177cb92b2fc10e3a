"""Conversation formats: messages in, token ids out; deltas in, events out. One file per format."""
