"""Statistics of the dense model: its linear layers, and the second moments of their inputs and gradients.

Input: the checkpoint and token sequences. Output: the means of x x^T and g g^T of every linear layer. Only one block is in
memory at a time. The two moments make a Kronecker-factored curvature (Martens and Grosse 2015, arXiv:1503.05671).
"""
