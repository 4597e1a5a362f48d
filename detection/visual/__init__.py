"""Pictures for people: detections drawn on images, and latencies of frames as numbers and charts."""

from detection.visual.draw import COCO_SKELETON, Image, draw_caption, draw_detections, grid, side_by_side
from detection.visual.latency import LatencyRecorder, RateMeter, Summary, plot_histogram, summarize

__all__ = [
    'COCO_SKELETON', 'Image', 'LatencyRecorder', 'RateMeter', 'Summary', 'draw_caption', 'draw_detections',
    'grid', 'plot_histogram', 'side_by_side', 'summarize',
]  # fmt: skip
