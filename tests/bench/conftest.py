"""Makes the checkout's `bench` importable; last in the path, so that an installed fastgen stays the one tested."""

import sys
from pathlib import Path

CHECKOUT = str(Path(__file__).resolve().parents[2])
if CHECKOUT not in sys.path:
    sys.path.append(CHECKOUT)
