"""Faults, bad input and hostile files: fuzzers, a hostile corpus, and a harness that kills the real tools.

python -m tests.faults fuzz    # every surface; writes tests/faults/REPORT.md
python -m tests.faults kill    # 100 kills of the real tools; writes its part of the report
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what all tests share
