"""The parts of ../gpu_suite.py: one module for each question that needs a GPU, and what they share."""
