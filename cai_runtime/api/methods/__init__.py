"""The method tree of a client: a file for each of its branches, with the twin for asyncio beside it."""
