"""Measures speed, each figure beside its floor: the least time that this machine allows, measured in the same run.

Checkpoints: `decode.py` (run by `run.py`) and `prefill.py` define the figures; `child.py` gives each engine a process of its
own. Kernels: `linear.py` with `contenders.py` and `factors.py`, and `attention.py` with `attention_cases.py`, both timed by
`timing.py`. `bandwidth.py`, `roofs.py` and `floors.py` measure the floors, `roofline.py` draws them.
"""
