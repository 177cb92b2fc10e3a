"""What makes other libraries read slim checkpoints. Importing it loads neither torch nor transformers.

`import cai_runtime` registers the format with transformers (`registration`); `quantizer` is what transformers then calls,
`linear` and `embedding` are the modules of a model that was loaded so, `dense` gives their dense weights back.
"""
