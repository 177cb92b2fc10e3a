"""Training of cores: block by block against the dense block's output, then the whole model against its logits.

Takes cores and hidden states, gives better cores. Steps are orthogonalized momentum (Muon, Jordan et al. 2024) in whitened
coordinates; healing is distillation by KL divergence (Hinton et al. 2015, arXiv:1503.02531).
"""
