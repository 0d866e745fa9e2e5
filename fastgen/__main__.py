"""``python -m fastgen``: the command line."""

from __future__ import annotations

import sys

from fastgen.cli import main

sys.exit(main())
