"""Faults, bad input and hostile files: fuzzers, a hostile corpus, and a harness that kills the real tools.

python -m tests.faults fuzz    # every surface; writes tests/faults/REPORT.md
python -m tests.faults kill    # 100 kills of the real tools; writes its part of the report
"""
