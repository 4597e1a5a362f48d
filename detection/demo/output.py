"""What a run of the demo writes: a video or annotated pictures, figures, a histogram; and never over other files."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import cv2

from detection.demo.pipeline import Report
from detection.demo.video import IMAGE_SUFFIXES, Frame, FrameSource, ImageSource, fit_image, local_path, pictures_in
from detection.demo.video_writer import VideoWriter, check_free, check_video_output
from detection.visual import Image, plot_histogram
from norton_timm.utils import replacing, write_text


def check_outputs(args: argparse.Namespace) -> None:
    """Check every file to be written, derived ones included: it can be written, and nothing is lost by it.

    Raises:
        FileExistsError: a file is there already, and ``--overwrite`` was not given.
        ValueError: it is one that is read, or has another problem.
    """
    if args.output is not None and not writes_pictures(args):
        check_video_output(args.output, args.codec)
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f'--json folder {args.json.parent} does not exist')
    written = list(_written(args))
    read = list(_read(args))
    for number, path in enumerate(written):
        if path in written[:number]:
            raise ValueError(f'{path} would be written twice: choose another --output or --json')
        with contextlib.suppress(OSError):  # a URL may be too long for a path
            if path.exists() and any(file.exists() and path.samefile(file) for file in read):
                raise ValueError(f'{path} is read and would be overwritten: choose another --output or --json')
        check_free(path, args.overwrite)


def writes_pictures(args: argparse.Namespace) -> bool:
    """Whether each picture gets a file of its own: the input is pictures, and ``--output`` is no .mp4.

    Raises:
        ValueError: the input is pictures, and the output is neither a video nor a place for them.
    """
    path = None if args.input is None else local_path(args.input)
    if args.output is None or path is None or args.output.suffix.lower() == '.mp4':
        return False
    if not path.is_dir() and (not path.is_file() or path.suffix.lower() not in IMAGE_SUFFIXES):
        return False
    suffix = args.output.suffix.lower()
    if not args.output.is_dir() and suffix and (path.is_dir() or suffix not in IMAGE_SUFFIXES):
        one = '' if path.is_dir() else ', or a picture'
        raise ValueError(f'output {args.output} ends in {suffix!r}, expected a folder for the pictures, .mp4{one}')
    if not args.output.parent.is_dir():
        raise ValueError(f'output folder {args.output.parent} does not exist')
    return True


def picture_files(output: Path, paths: list[Path]) -> list[Path]:
    """Where annotated pictures go: under their own names into a folder, or a single one to the file named."""
    if not output.is_dir() and output.suffix.lower() in IMAGE_SUFFIXES:
        return [output]
    return [output / path.name for path in paths]


def figures_file(args: argparse.Namespace) -> Path | None:
    """Where the figures go: ``--json``, or beside the video, the picture or the folder of pictures."""
    if args.json is not None or args.output is None:
        return args.json
    if args.output.is_dir():
        folder = args.output if args.output.name not in ('', '..') else args.output.resolve()
        return folder.with_name(f'{folder.name}.json')
    if args.output.suffix.lower() in IMAGE_SUFFIXES:  # whose .png may be the picture itself
        return args.output.with_name(f'{args.output.stem}_figures.json')
    return args.output.with_suffix('.json')


def _written(args: argparse.Namespace) -> Iterator[Path]:
    if args.output is not None and writes_pictures(args):
        path = local_path(args.input)
        assert path is not None
        yield from picture_files(args.output, pictures_in(path) if path.is_dir() else [path])
    elif args.output is not None:
        yield args.output
    figures = figures_file(args)
    if figures is not None:
        yield figures
        yield figures.with_suffix('.png')


def _read(args: argparse.Namespace) -> Iterator[Path]:
    for name in [args.input, *args.weights]:
        path = local_path(name) if name else None
        with contextlib.suppress(OSError):
            if path is not None:
                yield from pictures_in(path) if path.is_dir() else [path]


class Output:
    """Where finished pictures go: a video, picture files, a window, or nowhere; a context manager.

    Args:
        source: gives the frames their times, and pictures their names.
        path: .mp4 to write, or a folder or file for the pictures of an `ImageSource`, or ``None``.
        window: show a window; Escape, q or closing it ends the run.
        codec: see `VideoWriter`.
        overwrite: replace files that are there.
        progress: called after every frame.
    """

    title = 'norton-timm'

    def __init__(
        self,
        source: FrameSource,
        path: Path | None,
        *,
        window: bool = False,
        codec: str = 'auto',
        overwrite: bool = False,
        progress: Callable[[], object] | None = None,
    ):
        self.source, self.path, self.window, self.codec, self.progress = source, path, window, codec, progress
        self.overwrite, self.pictures = overwrite, 0
        self.writer: VideoWriter | None = None
        self._start = Fraction(0)
        self._targets: list[Path] = []
        if path is not None and path.suffix.lower() != '.mp4':
            if not isinstance(source, ImageSource):
                raise ValueError(f'output {path} of {source.name}, expected .mp4')
            self._targets = picture_files(path, source.paths)

    def __call__(self, image: Image, frame: Frame) -> bool:
        """Write and show one picture; false when the user closed the window."""
        if self._targets:
            self._write_picture(image, self._targets[frame.index])
        elif self.path is not None:
            self._write_frame(image, frame, self.path)
        if self.progress is not None:
            self.progress()
        if not self.window:
            return True
        cv2.imshow(self.title, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        key = cv2.waitKey(1) & 0xFF
        return key not in (27, ord('q')) and cv2.getWindowProperty(self.title, cv2.WND_PROP_VISIBLE) >= 1

    def written(self) -> str | None:
        """What was written, in words."""
        if self.pictures:
            return f'wrote {self.path}: {self.pictures} picture{"s" * (self.pictures > 1)}'
        if self.writer is not None and self.writer.frames:
            return f'wrote {self.path}: {self.writer.frames} frames, {self.writer.codec}'
        return None

    def _write_frame(self, image: Image, frame: Frame, path: Path) -> None:
        at = self.source.time_of(frame)
        if self.writer is None:
            size = image.shape[1], image.shape[0]
            self.writer = VideoWriter(path, self.source.fps, size, self.codec, overwrite=self.overwrite)
            self._start = at
        self.writer.write(fit_image(image, self.writer.size), at - self._start, frame.lasts)

    def _write_picture(self, image: Image, target: Path) -> None:
        ok, data = cv2.imencode(target.suffix.lower(), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        if not ok:
            raise ValueError(f'a picture of shape {image.shape} cannot be encoded as {target.suffix}')
        target.parent.mkdir(exist_ok=True)
        check_free(target, self.overwrite)
        with replacing(target) as temporary:
            temporary.write_bytes(data.tobytes())
        self.pictures += 1

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.writer is not None:
                self.writer.close()
        finally:
            if self.window:
                with contextlib.suppress(cv2.error):
                    cv2.destroyAllWindows()


def save_report(report: Report, path: Path, *, overwrite: bool = False) -> list[Path]:
    """Write the figures as JSON, and beside it the latency histogram as PNG if any frame was counted.

    Raises:
        FileExistsError: one of the files is there already, and ``overwrite`` is false.
    """
    series = report.totals()
    written = [path, path.with_suffix('.png')] if any(series.values()) else [path]
    for file in written:
        check_free(file, overwrite)
    write_text(path, json.dumps(report.to_dict(), indent=2) + '\n')
    if len(written) > 1:
        plot_histogram(series, written[1], title='Picture to detections')
    return written
