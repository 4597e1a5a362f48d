"""The report takes the rows of a run, keeps those of others, and says what was found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from . import report
from .kills import Campaign


def test_campaigns_are_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, 'RESULTS', tmp_path / 'results.json')
    monkeypatch.setattr(report, 'REPORT', tmp_path / 'REPORT.md')
    first = Campaign('demo', kills=Counter(SIGKILL=3, SIGINT=2), restarts=5, finished=1, lost=Counter(SIGTERM=1))
    report.write_kills([first])
    report.write_kills([Campaign('compression', kills=Counter(SIGTERM=4), problems=['SIGTERM after 1 s: a traceback'])])
    text = (tmp_path / 'REPORT.md').read_text()
    assert '9 kills at random moments; 1 left something wrong' in text
    assert '| demo | 3 | 0 | 2 | 5 | 1 | 0 |' in text and '- compression: SIGTERM after 1 s: a traceback' in text
