"""``python -m torch2jax`` shows what it finds here, and proves that it works."""

import sys

from ._doctor.main import main

if __name__ == "__main__":
    sys.exit(main())
