"""Batches: many requests in OpenAI's batch file format, as many at once as keep the engine busy.

`lines.py` reads requests, `serve.py` answers one, `results.py` keeps the engine supplied, `files.py` writes a file that a
killed run goes on with. `client.batch` itself is in `api/methods/batch.py`.
"""
