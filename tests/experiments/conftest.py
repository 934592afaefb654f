"""Makes `toy_studies` importable by the tests of this folder and by the study files that they write."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
