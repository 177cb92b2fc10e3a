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


def existing(name: str | Path, *, file: bool = False) -> Path | None:
    """The directory (`file`: the file) called `name`, as one absolute path without symbolic links however it is spelled;
    None if there is none. Names that no path can have are none: of a user who does not exist, or too long."""
    try:
        path = Path(name).expanduser()
        return path.resolve() if (path.is_file() if file else path.is_dir()) else None
    except (OSError, RuntimeError, ValueError):  # ValueError: a NUL or a lone surrogate in it
        return None
