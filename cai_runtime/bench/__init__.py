"""Measurements, each with the floor that the machine puts under it, measured in the same run.

Of checkpoints: `decode.py` (run by `run.py`) and `prefill.py` say what is measured; every engine has a child process of
its own (`child.py`). Of kernels: `linear.py` over `contenders.py` and `factors.py`, `attention.py` over
`attention_cases.py`, both timed by `timing.py`. `bandwidth.py` and `roofs.py` measure the floors, `roofline.py` draws them.
"""
