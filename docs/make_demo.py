"""Turn a video of the demo into the small animated picture of the first page.

python tools/demo_video.py --weights runs/keypoint/checkpoint.pt --frames 60 --output annotated.mp4
python docs/make_demo.py annotated.mp4
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from detection.video import open_source

TARGET = Path(__file__).parent / 'images' / 'demo.gif'


def main(video: Path, target: Path = TARGET, every: int = 2, width: int = 480) -> Path:
    """Write every second frame, `width` pixels wide, with one palette for all."""
    with open_source(str(video)) as source:
        frames = [Image.fromarray(frame.image) for k, frame in enumerate(source) if k % every == 0]
        milliseconds = round(1000 * every / float(source.fps))
    frames = [frame.resize((width, round(width * frame.height / frame.width))) for frame in frames]
    palette = frames[0].quantize(96)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    small[0].save(target, save_all=True, append_images=small[1:], duration=milliseconds, loop=0, optimize=True)
    return target


if __name__ == '__main__':
    print(main(Path(sys.argv[1])))
