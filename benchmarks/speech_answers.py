"""How a worker of the speech benchmarks talks to its parent. The standard library alone: a peer's own Python runs it, too.

Reads JSON lines: first the settings, then a file each; answers each with a JSON line. See speech_work.py.
"""

import json
import os
import sys

_answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints goes to standard error


def settings():
    """The first line."""
    return json.loads(sys.stdin.readline())


def serve(versions, hear):
    """Say the versions of what the worker runs on, then answer each further line with what `hear` makes of it."""
    print(json.dumps({"versions": versions}), file=_answers)
    for line in sys.stdin:
        try:
            answer = hear(json.loads(line))
        except Exception as error:  # noqa: BLE001 - the parent raises it
            answer = {"error": repr(error)}
        print(json.dumps(answer), file=_answers)
