"""``python -m kdkit``."""

from __future__ import annotations

from kdkit.cli.app import main

if __name__ == "__main__":
    main()
