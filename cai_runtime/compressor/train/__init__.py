"""Training of cores: each block against the dense block's output, then the whole model against the dense model's logits.

The optimizer is Muon (Jordan et al. 2024) in whitened coordinates. Healing is distillation by KL divergence (Hinton et al.
2015, arXiv:1503.02531).
"""
