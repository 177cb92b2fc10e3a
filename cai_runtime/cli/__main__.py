"""`python -m cai_runtime.cli`: the same as `cai`."""

import sys

from cai_runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
