"""The program `paracaption`: it heeds Ctrl-C before anything that takes time is imported."""

from .. import stopping


def main() -> None:
    """Entry point of the console script."""
    stopping.run(_run)


def _run() -> None:
    from .app import main

    main()
