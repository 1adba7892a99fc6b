"""``python -m torch2jax`` shows what it finds here, and proves that it works.

``python -m torch2jax cache`` shows the libraries of ``compiled=True``.
"""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["cache"]:
        from ._bridge.compiled.command import main

        sys.exit(main(sys.argv[2:]))
    from ._doctor.main import main

    sys.exit(main())
