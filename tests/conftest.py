"""Puts this folder on the path, so that tests can write `from corpus import ALL`."""

import sys
from pathlib import Path

TESTS = str(Path(__file__).parent)

if TESTS not in sys.path:
    sys.path.insert(0, TESTS)
