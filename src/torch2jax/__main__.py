"""``python -m torch2jax``: what was found here, and a proof that it works."""

import sys

from ._doctor.main import main

if __name__ == "__main__":
    sys.exit(main())
