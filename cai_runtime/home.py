"""Where cai_runtime keeps what it fetched and converted. Light to import."""

from __future__ import annotations

import os
from pathlib import Path


def cai_home() -> Path:
    """The cache directory: `$CAI_HOME`, else the platform's user cache directory for "cai_runtime".

    Read from the environment at every call; the directory need not exist (whoever writes creates it). Everything in it
    can be fetched again, so deleting it costs time and nothing else.
    """
    wanted = os.environ.get("CAI_HOME")
    if wanted:
        return Path(wanted).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("cai_runtime", appauthor=False))
