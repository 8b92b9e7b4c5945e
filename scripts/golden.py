"""Compares models with the outputs of reference implementations: ``golden.py PATH [PATH ...]``.

The checkers are in tests/golden/checkers, a file for each family of models.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "golden"))

from checkers.registry import main

if __name__ == "__main__":
    sys.exit(main())
