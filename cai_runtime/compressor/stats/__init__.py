"""Statistics of the dense model: which layers there are, and what their inputs and gradients look like.

Takes the checkpoint and token sequences; gives, for every linear layer, the mean of x x^T and of g g^T. Blocks are loaded
one at a time, so memory is that of one block. The metric made of both is a Kronecker-factored curvature (Martens and
Grosse 2015, arXiv:1503.05671).
"""
