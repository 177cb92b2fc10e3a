"""The CompactifAI API's endpoints as functions: check a request, run it, build the reply or its chunks."""
