"""Where the files of a data set lie: annotation files and pictures, in COCO's own layout and in those of label tools.

What is read without a setting, for a split `val` (`valid` and `validation` stand for it too, `training` for `train`):

| layout | annotations | pictures |
|---|---|---|
| COCO, CVAT | `annotations/instances_val2017.json`, `person_keypoints_...` | `val2017`, `images/val2017`, `images` |
| Roboflow | `valid/_annotations.coco.json` | beside it |
| FiftyOne | `val/labels.json` | `val/data` |
| Label Studio | `val/result.json` | `val/images` |
| CVAT, one export a split | `val/annotations/instances_default.json` | `val/images` |
| labelme, VIA, others | `val.json`, `annotations/val.json`, the one JSON file in `val` | beside it, `images`, `val` |
"""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

_ALIASES = {'train': ('training',), 'val': ('valid', 'validation'), 'valid': ('val', 'validation')}
_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'test', 'testing')
# of label tools, in a folder of its own for each split; the first one that is there
_EXPORTS = ('_annotations.coco.json', 'labels.json', 'result.json', 'annotations.json')
# folders of pictures beside an annotation file
_BESIDE = ('data', 'images', 'JPEGImages', '')


def find_annotations(root: str | os.PathLike[str], split: str, task: str) -> Path:
    """The annotation file of a split: COCO's ``annotations/{instances,person_keypoints}_{split}[year].json``, or a
    label tool's, as the head of this file lists them.

    Raises:
        ValueError: If there is none or more than one; the message lists the splits that are there.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f'data folder {root} does not exist; expected a folder in COCO layout')
    folder, usual = root / 'annotations', 'person_keypoints' if task == 'keypoint' else 'instances'
    files = _of_task(folder, task)
    matches = [f for f in files if re.fullmatch(rf'{_prefix(task)}_{re.escape(split)}(\d{{4}})?\.json', f.name)]
    matches = matches or _exported(root, split, task)
    if len(matches) == 1:
        return matches[0]
    if len(matches) > 1:
        names = ', '.join(os.path.relpath(file, root) for file in matches)
        raise ValueError(f'{root} has several files for split {split!r}: {names}; name one, e.g. "{split}2017"')
    splits = [file.stem.rsplit('_', 1)[-1] for file in files] or splits_of_exports(root, task)
    known = ', '.join(splits)
    hint = '; data.train_split and data.val_split name others' if known else ''
    raise ValueError(
        f'no {usual}_{split}[year].json in {folder}; splits found for task {task!r}: {known or "none"}{hint}'
    )


def has_annotations(root: Path) -> bool:
    """Whether a folder holds annotation files of any split, in any layout."""
    return any((root / 'annotations').glob('*.json')) or bool(splits_of_exports(root, 'box'))


def splits_of_exports(root: Path, task: str) -> list[str]:
    """Splits of a label tool's layout: folders that hold annotations, and files that could be one."""
    inside = sorted(path for path in root.glob('*') if path.is_dir() and path.name not in ('annotations', 'images'))
    return [path.name for path in inside if _in_folder(path, task)] + [
        file.stem for file in sorted(root.glob('*.json')) if file.is_file()
    ]


def _exported(root: Path, split: str, task: str) -> list[Path]:
    """Annotation files of a split in the layouts of label tools; those under the split's own name come first."""
    for name in (split, *_ALIASES.get(split, ())):
        files = [file for file in (root / f'{name}.json', root / 'annotations' / f'{name}.json') if file.is_file()]
        found = files + _in_folder(root / name, task)
        if found:
            return found
    return []


def _in_folder(folder: Path, task: str) -> list[Path]:
    """The annotation files of a folder that holds one split."""
    known = [folder / name for name in _EXPORTS if (folder / name).is_file()]
    if known:
        return known
    return sorted(folder.glob('*.json')) or _of_task(folder / 'annotations', task)


def _prefix(task: str) -> str:
    return r'(?:\w+_)?keypoints' if task == 'keypoint' else 'instances'


def _of_task(folder: Path, task: str) -> list[Path]:
    names = re.compile(rf'{_prefix(task)}_\w+\.json')
    return [file for file in sorted(folder.glob('*.json')) if names.fullmatch(file.name)]


def find_images(
    root: Path, split: str, annotation_file: Path, images: str | os.PathLike[str] | None = None
) -> list[Path]:
    """Folders that may hold the pictures of a split, the most likely one first.

    Args:
        root: The data set.
        split: As for ``find_annotations``.
        annotation_file: What that returned.
        images: The folder that holds the pictures, relative to ``root`` or else to the working folder; a folder in it
            that is named like the split comes first.

    Raises:
        ValueError: If there is none.
    """
    full = annotation_file.stem.split('_')[-1]
    names = dict.fromkeys((full, split, *_ALIASES.get(split, ())))
    if images is not None:
        given = next((folder for folder in (root / images, Path(images)) if folder.is_dir()), None)
        if given is None:
            raise ValueError(f'data.images: no folder {images}, neither in {root} nor here')
        return [folder for folder in (*(given / name for name in names), given) if folder.is_dir()]
    here = annotation_file.parent
    if here.name == 'annotations':
        here = here.parent
    if here != root and here.is_relative_to(root):
        choices = [here / name for name in (*_BESIDE, f'images/{full}')]
    else:
        choices = [root / full, root / 'images' / full, root / split, root / 'images' / split]
        year = glob.escape(split) + '[12][0-9][0-9][0-9]'
        choices += [*sorted(root.glob(year)), *sorted((root / 'images').glob(year)), root / 'images']
        choices += [root / name for name in (*names, *_BESIDE) if name]
        # pictures directly in the folder, beside an export without splits
        choices += [root] if annotation_file.parent == root else []
    folders = [folder for folder in dict.fromkeys(choices) if folder.is_dir()]
    if folders:
        return folders
    raise ValueError(
        f'no image folder for {annotation_file.name}; expected {choices[0]} or {choices[1]}, or data.images=FOLDER'
    )


def other_splits(root: Path, split: str, annotation_file: Path) -> set[str]:
    """Names, in lower case, of folders that hold pictures of other splits than this one.

    They are the usual names of splits, and the names of all annotation files of the data set.
    """
    found = {file.stem.rpartition('_')[2] for file in (root / 'annotations').glob('*.json')}
    found |= {name for task in ('box', 'keypoint') for name in splits_of_exports(root, task)}
    own = {split, annotation_file.stem.rpartition('_')[2], *_ALIASES.get(split, ()), *_BESIDE}
    return ({*_SPLITS} - {split.lower()}) | ({name.lower() for name in found} - {name.lower() for name in own})


@dataclass(frozen=True)
class Pictures:
    """The pictures that an annotation file names.

    Attributes:
        folder: Where they lie.
        files: Of names that are no path below the folder as they stand, the path below it.
        missing: Names that lead to no file, to more than one, or to another name's.
    """

    folder: Path
    files: dict[str, str]
    missing: list[str]

    def path(self, name: str) -> Path:
        """The file of a picture that is not missing."""
        return self.folder / self.files.get(name, name)


def match_pictures(names: Iterable[str], folders: Sequence[Path], others: Iterable[str] = _SPLITS) -> Pictures:
    r"""Match the file names of annotations with files.

    A name that is a path below the folder is that file, and no other name's. Otherwise `\` is read as `/`, `%20` as a
    space, a letter and its accent as one character, and leading folders that are not there are left out: `images/a.jpg`
    in the folder `images`. Of absolute paths and URLs, which are another machine's, the last part is enough if only one
    file has it.

    Args:
        names: `file_name` of all images.
        folders: The one that holds most of the names as they stand is taken, of equal ones the first; if there is none,
            the first where any is found.
        others: Names of folders that are not searched, with or without digits behind them, see ``other_splits``.
    """
    names = list(dict.fromkeys(names))
    plain = min((_as_they_stand(names, folder) for folder in folders), key=lambda found: len(found.missing))
    if not plain.missing:
        return plain
    # where some are found, the others are not searched elsewhere: another split's may have the same names
    places = folders if len(plain.missing) == len(names) else [plain.folder]
    others = set(others)
    for folder in places:
        found = _by_their_ends(names, folder, others)
        if len(found.missing) < len(names):
            return found
    return plain


def _as_they_stand(names: Sequence[str], folder: Path) -> Pictures:
    listed: dict[str, set[str]] = {}
    missing = []
    for name in names:
        head, slash, last = name.rpartition('/')
        parent = head + slash
        if parent not in listed:
            listed[parent] = _listing(folder, parent)
        # a listing is quicker than a question for each file; file systems that ignore case need the question
        if last not in listed[parent] and not _is_file(folder, name):
            missing.append(name)
    return Pictures(folder, {}, missing)


def _by_their_ends(names: Sequence[str], folder: Path, others: set[str]) -> Pictures:
    missing = _as_they_stand(names, folder).missing
    taken = set(names) - set(missing)
    below: dict[str, list[str]] = defaultdict(list)
    for path, inside, files in os.walk(folder):
        inside[:] = [
            name for name in inside
            if name.lower() not in others and name.lower().rstrip('0123456789_-') not in others
        ]  # fmt: skip
        for file in files:
            below[_composed(file)].append(Path(path, file).relative_to(folder).as_posix())
    owners: dict[str, list[str]] = defaultdict(list)
    for name in missing:
        meant = _by_its_end(name, folder, below)
        if meant is not None and meant not in taken:
            owners[meant].append(name)
    found = {users[0]: file for file, users in owners.items() if len(users) == 1}
    return Pictures(folder, found, [name for name in missing if name not in found])


def _by_its_end(name: str, folder: Path, below: dict[str, list[str]]) -> str | None:
    """The path below a folder that a name can only mean; None where there is none or more than one."""
    bare = re.sub(r'^\w+://([^?#]*).*', r'\1', re.sub(r'^.*[?&]d=', '', name))  # Label Studio's local files; URLs
    for form in dict.fromkeys((bare.replace('\\', '/'), unquote(bare).replace('\\', '/'))):
        parts = [part for part in PurePosixPath(form).parts if part not in ('/', '.')]
        parts = [_composed(part) for part in parts]
        files = below.get(parts[-1], []) if parts else []
        foreign = not _stays(form) or '://' in name
        ends = [file for file in files if _composed(file).split('/') == parts[-file.count('/') - 1 :]]
        if not foreign and len(parts) > 1 and (folder / parts[0]).is_dir():
            ends = [
                file for file in ends if _composed(file).split('/') == parts
            ]  # a picture is missing in a folder that is there
        if ends:
            return max(ends, key=len)
        if foreign and len(files) == 1:
            return files[0]
    return None


def _composed(name: str) -> str:
    """A name with one character for a letter and its accent, which some systems (macOS) write as two."""
    return unicodedata.normalize('NFC', name)


def _stays(name: str) -> bool:
    """Whether a name is a path below the folder that it is relative to."""
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != '/' and '..' not in parts and not re.match(r'[A-Za-z]:/', name)


def _is_file(folder: Path, name: str) -> bool:
    try:
        return _stays(name) and (folder / name).is_file()
    except (OSError, ValueError):  # too long, or no name at all
        return False


def _listing(folder: Path, parent: str) -> set[str]:
    """Names in a folder below; none in one that is no folder, or not below."""
    try:
        return set(os.listdir(folder / parent)) if not parent or _stays(parent) else set()
    except (OSError, ValueError):
        return set()
