"""Entry point of the command line; the commands are in :mod:`embcompress.commands`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run ``embcompress``."""
    try:
        from embcompress.commands import app
    except ModuleNotFoundError as error:
        sys.exit(f"{error}; the command line needs: pip install 'embcompress[bench]'")
    app()


if __name__ == "__main__":
    main()
