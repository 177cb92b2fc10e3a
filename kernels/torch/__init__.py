"""An optional corner: the operations as `torch.library` operators, for programs that use torch.compile or torch.export.

Nothing in the package imports it. `ops` registers the operators, `modules` wraps prepared objects as `torch.nn.Module`s.
`frozen` and `relocation` turn packed weights into plain tensors and numbers, and back.
"""
