"""The benchmarks of `cai bench`: one file each, with `add_arguments(parser)` and `run(args) -> exit status`."""
