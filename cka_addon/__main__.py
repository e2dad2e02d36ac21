"""`python -m cka_addon`."""

import sys

from cka_addon.cli import main

if __name__ == "__main__":
    sys.exit(main())
