"""Every block of the documentation runs as written and prints what the page shows; the site builds and its links lead.

Long blocks are marked slow in the pages: `pytest tests/test_docs.py -m "slow or not slow"` runs all of them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import timm
import torch
from doc_blocks import Block, Runner, read_blocks, same
from image_sets import write_archive
from PIL import Image
from safetensors.torch import save_file
from test_authors import CifarResNet, settle
from tool_runner import ROOT

import norton_timm
from detection.data.sample import draw_frames, write_sample
from detection.demo.video_writer import VideoWriter
from norton_timm.models.compressed import spec_of

DOCS = ROOT / 'docs'
PAGES = {p.relative_to(DOCS).as_posix(): p for p in sorted(DOCS.rglob('*.md')) if p.name != 'tested_models.md'}


@pytest.fixture(scope='session')
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take from the reader: small files of the same kinds, under the names that the pages use."""
    folder = tmp_path_factory.mktemp('stand_ins')
    torch.manual_seed(0)
    save_file(timm.create_model('resnet56_cifar', num_classes=10).state_dict(), folder / 'dense.safetensors')
    write_archive(folder / 'cifar10.tar.xz', train=130, test=20, classes=10)
    (folder / 'photos').mkdir()
    with VideoWriter(folder / 'clip.mp4', Fraction(25), (160, 120)) as writer:
        for k, frame in enumerate(draw_frames(8, (160, 120), seed=1)):
            writer.write(frame)
            Image.fromarray(frame).save(folder / 'photos' / f'{k}.jpg')
    shutil.copy(folder / 'photos' / '0.jpg', folder / 'photo.jpg')
    write_sample(folder / 'my_coco', train=8, val=4, size=(128, 96))
    (folder / 'my_coco' / 'sample.json').unlink()  # by which the tools know their own set and its settings
    spec = spec_of('norton_resnet56_cifar.r071')
    theirs = settle(CifarResNet(56, spec.rate_list() or [], 2, 'fc'))
    torch.save({'state_dict': theirs.state_dict(), 'rank': 2, 'compress_rate': str(spec.rates)}, folder / 'authors.pt')
    return folder


@pytest.fixture
def runner(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Runs blocks in a folder that looks like a clone of the repository with the reader's files in it."""
    work = tmp_path / 'clone'
    shutil.copytree(stand_ins, work)
    for name in ('tools', 'configs', 'README.md'):
        (work / name).symlink_to(ROOT / name)
    monkeypatch.chdir(work)
    return Runner(monkeypatch, stand_ins.with_name('trained'))


def run_page(blocks: list[Block], runner: Runner, slow: bool) -> None:
    for block in blocks:
        if not block.skipped and (slow or not block.slow):
            runner.run(block)


@pytest.mark.parametrize('page', PAGES)
def test_blocks_run_and_print_what_is_shown(page: str, runner: Runner) -> None:
    run_page(read_blocks(PAGES[page].read_text()), runner, slow=False)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize('page', [page for page, path in PAGES.items() if '<!-- slow -->' in path.read_text()])
def test_long_blocks_run_too(page: str, runner: Runner) -> None:
    """Trains detectors: an hour on two cores."""
    run_page(read_blocks(PAGES[page].read_text()), runner, slow=True)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_readme_runs_from_top_to_bottom(runner: Runner) -> None:
    """Its Python blocks are in the ordinary tests (test_readme.py), installation and tests in .ci/run."""
    for block in read_blocks((ROOT / 'README.md').read_text()):
        if block.language == 'bash' and block.skipped != 'test':
            block.text = '\n'.join(line for line in block.text.splitlines() if not line.startswith('pip install'))
            runner.run(block)


def test_an_output_that_differs_is_noticed(runner: Runner) -> None:
    runner.run(Block('python', 'print("3 of 4 layers")', 1, output='17 of 29   layers\n'))
    for block in (
        Block('python', 'print("3 of 4 layers")', 1, output='3 of 4 filters\n'),
        Block('python', 'print("one")\nprint("two")', 1, output='one\n'),
        Block('bash', 'python tools/compress.py', 1, error='error: something else\n'),
        Block('bash', 'echo one', 1, output='two\n'),
    ):
        with pytest.raises(AssertionError, match='the page shows'):
            runner.run(block)
    with pytest.raises(AssertionError, match='exit code 3'):
        runner.run(Block('bash', 'exit 3', 1))
    assert same('first\n...\nlast 1.5e-3\n', 'first\na\nb\nlast 2\n')
    assert not same('first\n...\nlast\n', 'first\na\n')
    assert same('a ... of 3\n', 'a lot of 7\n') and not same('a ... of 3\n', 'a lot\nof 7\n')


def test_every_block_runs_or_says_why_not() -> None:
    """No block hides behind a comment without a reason, and an output stands behind what prints it."""
    for page, path in PAGES.items():
        for block in read_blocks(path.read_text()):
            assert block.skipped == '' or len(block.skipped.split()) >= 3, f'{page}:{block.line}'
    blocks = read_blocks('<!-- not run: needs a webcam -->\n```bash\nfalse\n```\n\n```text title="Output"\nx\n```\n')
    assert blocks == [Block('bash', 'false\n', 2, skipped='needs a webcam', output='x\n')]


# the site


@pytest.fixture(scope='session')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors."""
    for module in ('mkdocs', 'material', 'mkdocstrings'):
        pytest.importorskip(module, reason='the site needs the extra `docs`')
    folder = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if line.startswith(('WARNING', 'ERROR'))]
    return folder


def test_examples_of_the_reference_are_code(site: Path) -> None:
    for page in ('norton_timm', 'detection'):
        text = (site / 'reference' / page / 'index.html').read_text(encoding='utf-8')
        assert '<blockquote>' not in text and text.count('class="gp">&gt;&gt;&gt;') > 20


class _Links(HTMLParser):
    """Ids of a page, where its links lead, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {values[key] or '' for key in ('id', 'name') if key in values}
        if tag == 'a' and values.get('href'):
            self.links.append(values['href'] or '')
        elif tag == 'link' and values.get('rel') not in ('canonical', 'prev', 'next'):
            self.loads.append(values.get('href') or '')
        elif values.get('src'):
            self.loads.append(values['src'] or '')


def test_links_and_anchors_of_the_site_lead_somewhere(site: Path) -> None:
    pages = {path: _Links(path.read_text()) for path in site.rglob('*.html') if path.name != '404.html'}
    assert len(pages) > len(PAGES)
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme in ('https', 'mailto'), f'{path}: {link}'
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / 'index.html' if target.is_dir() else target
            assert target.exists(), f'{path}: {link}'
            if parts.fragment and not parts.fragment.startswith('__'):
                assert unquote(parts.fragment) in pages[target].ids, f'{path}: {link}'


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob('*.html'):
        for target in _Links(path.read_text()).loads:
            assert not urlsplit(target).netloc, f'{path} loads {target}'
    styles = ''.join(path.read_text() for path in site.rglob('*.css'))
    assert not re.search(r'(@import|url\()\s*["\']?(https?:)?//', styles)


def test_everything_exported_is_in_the_reference(site: Path) -> None:
    ids = _Links((site / 'reference' / 'norton_timm' / 'index.html').read_text()).ids
    for name in set(norton_timm.__all__) - {'models'}:
        thing = getattr(norton_timm, name)
        assert ids & {f'norton_timm.{name}', f'{thing.__module__}.{thing.__name__}'}, name
    # of the functions that are called like their module, the page has the function
    names = {'compression.compress', 'inference.deploy', 'tensors.hosvd'}
    assert ids >= {f'norton_timm.{name}' for name in names}
    assert not ids & {'norton_timm.compress', 'norton_timm.deploy', 'norton_timm.hosvd'}


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / 'README.md').read_text()
    titles = re.findall(r'^#+ (.*)$', text, re.M)
    headings = {re.sub(r'[^\w\- ]', '', title).strip().lower().replace(' ', '-') for title in titles}
    for target in re.findall(r'\]\((?!https?:)([^)]+)\)', text):
        path, _, anchor = target.partition('#')
        assert (ROOT / path).exists(), target
        assert path or anchor in headings, target


# the pictures


def test_pictures_are_drawn_by_the_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, '-c', 'import sys, pathlib; sys.path.insert(0, sys.argv[1]); import draw_pictures; '
         'draw_pictures.main(pathlib.Path(sys.argv[2]))', str(DOCS), str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (DOCS / 'images').glob('*.svg'))
    used = ''.join(path.read_text() for path in PAGES.values())
    assert all(f'images/{name}' in used for name in drawn)
    assert all((DOCS / 'images' / name).stat().st_size < 2e5 for name in drawn)


def test_pictures_of_the_pages_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (DOCS / 'images').iterdir()}
    assert all(size < 1.5e6 for size in sizes.values()), sizes
