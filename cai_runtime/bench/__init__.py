"""Measurements: decode speed of a checkpoint, alone or beside other engines, and the bandwidth that bounds it.

`decode.py` says what is measured and how; `run.py` runs it, one child process for each engine and batch size.
"""
