"""Run one detector, or two side by side, on a video, webcam or stream, and measure it honestly.

python tools/demo_video.py --weights runs/keypoint/checkpoint.pt --input clip.mp4 --output annotated.mp4
"""

from __future__ import annotations

from pathlib import Path

from _cli import FAILURE, INTERRUPTED, TERMINATED, Parser, fail, run

from tqdm import tqdm

from detection.demo import (
    CODECS,
    TRACKERS,
    Output,
    Predictor,
    VideoWriteError,
    demo,
    figures_file,
    open_source,
    pipeline,
    save_report,
)
from detection.tasks import TASKS
from norton_timm.utils import choose_device


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument(
        '--input', help='video, picture, folder, webcam index or URL (rtsp, http, file); none = a drawn clip'
    )
    p.add_argument('--output', type=Path, help='.mp4 to write; a folder or picture file if the input is pictures')
    p.add_argument('--overwrite', action='store_true', help='replace files that are there')
    p.add_argument('--headless', action='store_true', help='no window and no file, only measure')
    p.add_argument('--serve', type=int, metavar='PORT', help='show it as a web page instead')
    p.add_argument('--host', default='127.0.0.1', help='address of the page; others than this machine need its token')
    p.add_argument(
        '--weights',
        nargs='+',
        default=[],
        help='checkpoint of train_det.py or torchvision, a name of torchvision, or `authors`: what they released',
    )
    p.add_argument('--random-weights', action='store_true', help='measure time without weights; the picture says so')
    p.add_argument('--task', choices=TASKS, help='of random weights (box if none) or `authors`; refuse other weights')
    p.add_argument('--backbone', help='of random weights or `authors` (norton_resnet50.r078 if none); refuse others')
    p.add_argument('--compare', action='store_true', help='two --weights side by side: dense, then compressed')
    p.add_argument('--score', type=float, default=0.5, help='hide detections below it')
    p.add_argument('--imgsz', type=int, help='shorter image side inside the network, in pixels; none = as trained')
    p.add_argument('--device', help='cpu, cuda, cuda:1, mps; none = the best there is')
    p.add_argument('--half', action='store_true', help='autocast: float16 on accelerators, bfloat16 on a CPU')
    p.add_argument('--deploy', action='store_true', help='tune the network to this machine at the first frame')
    p.add_argument('--compile', action='store_true', help='torch.compile the backbone')
    p.add_argument('--tracker', choices=tuple(TRACKERS), help='number the objects (extra track)')
    p.add_argument('--warmup', type=int, default=3, help='first frames that are not counted')
    p.add_argument('--frames', type=int, help='stop after so many frames')
    p.add_argument('--codec', default='auto', choices=CODECS, help='auto = the first that works here')
    p.add_argument('--json', type=Path, help='figures, with the histogram as .png beside; none = beside --output')
    return p


def main() -> None:
    args = parser().parse_args()
    demo.check_options(args)
    options = {name: getattr(args, name) for name in demo.OPTIONS}
    written = {'codec': args.codec, 'overwrite': args.overwrite}
    options['device'] = choose_device(args.device or 'auto')
    if args.serve is not None:
        from detection.demo import serve  # needs the extra `web`

        return serve(demo.make_studio(args, options), args.host, args.serve, lambda line: print(line, flush=True))
    try:
        with open_source(args.input, frames=args.frames or 150) as source:
            models = demo.choose_models(args)
            predictors = [Predictor(model, facts, **options) for model, facts in models]
            with (
                tqdm(total=args.frames or source.count, unit='frame') as bar,
                Output(source, args.output, window=demo.wants_window(args), **written) as output,
            ):
                output.progress = bar.update
                report = pipeline.run_pipeline(source, predictors, output, warmup=args.warmup, max_frames=args.frames)
    except (ConnectionError, VideoWriteError) as error:
        fail(error, FAILURE)
    print(report)
    if told := output.written():
        print(told)
    figures = figures_file(args)
    if figures is not None and report.frames:
        print('wrote', *save_report(report, figures, overwrite=args.overwrite))
    if report.stopped in ('interrupted', 'terminated'):
        fail(f'{report.stopped} after {report.frames} frames', INTERRUPTED if report.stopped[0] == 'i' else TERMINATED)


if __name__ == '__main__':
    run(main)
