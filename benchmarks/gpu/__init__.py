"""The parts of ../gpu_suite.py: each question that only a GPU can answer has a module."""
