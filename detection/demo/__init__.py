"""The video demo: sources of frames, the predictor, tracking, the pipeline of threads, the video writer, and the web
page.
"""

from typing import TYPE_CHECKING, Any

from detection.demo.output import Output, figures_file, save_report
from detection.demo.predictor import ModelFacts, Predictor
from detection.demo.tracking import TRACKERS
from detection.demo.video import open_source
from detection.demo.video_writer import CODECS, VideoWriteError, VideoWriter

if TYPE_CHECKING:
    from detection.demo.server import serve

__all__ = [
    'CODECS', 'TRACKERS', 'ModelFacts', 'Output', 'Predictor', 'VideoWriteError', 'VideoWriter', 'figures_file',
    'open_source', 'save_report', 'serve',
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the web page when it is asked for: its packages are the extra `web`, which the demo runs without."""
    if name == 'serve':
        from detection.demo.server import serve

        return serve
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
