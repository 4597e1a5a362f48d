"""The video demo: sources of frames, the predictor, tracking, the pipeline of threads, the video writer, and the web
page.
"""

from detection.demo.output import Output, figures_file, save_report
from detection.demo.predictor import ModelFacts, Predictor
from detection.demo.serve import serve
from detection.demo.tracking import TRACKERS
from detection.demo.video import open_source
from detection.demo.video_writer import CODECS, VideoWriteError, VideoWriter

__all__ = [
    'CODECS', 'TRACKERS', 'ModelFacts', 'Output', 'Predictor', 'VideoWriteError', 'VideoWriter', 'figures_file',
    'open_source', 'save_report', 'serve',
]  # fmt: skip
