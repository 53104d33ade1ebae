"""What code a run was made with: which of the files that train differ from this version's as it ships them.

    python -m tinycnn.sources      write the hashes of the present files to shipped.json, as those of this version

Do so when you change the program itself and tests/test_sources.py still finds the figures of its first epochs: then runs
from before and after the change are the same runs. Where it finds others, raise TRAINING_VERSION too, and add the new figures
to that test: then they are other runs. To try something out, do neither: your runs are compared as edited.
"""

import hashlib
import io
import json
import tokenize
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

TRAINING_VERSION = 1  # raised when a run of the same settings would give other figures than before

ROOT = Path(__file__).parents[1]
SHIPPED = Path(__file__).with_name("shipped.json")
ON_TOP = ("config.py", "augmentation.py", "model.py", "main.py")  # a copy of each lies in a run's folder
# Not these: what images they make is known by the images' own fingerprint
MAKE_IMAGES = {"cifar10.py", "decoding.py", "folder.py", "leftovers.py", "loading.py", "synthetic.py"}


def _paths() -> Iterator[Path]:
    """The files whose code is hashed."""
    yield from (ROOT / name for name in ON_TOP if name != "config.py")  # a run's record has its settings
    yield from (ROOT / "tinycnn" / name for name in ("device.py", "processes.py"))
    for room in ("data", "training", "kernels"):
        yield from (path for path in sorted((ROOT / "tinycnn" / room).glob("*.py")) if path.name not in MAKE_IMAGES)


# Read now: a user may edit them while runs are made
COPIED_FILES = {name: (ROOT / name).read_bytes() for name in ON_TOP}
CODE_FILES = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in _paths()}


def code_hash(source: bytes) -> str:
    """Hash a Python file's code to 16 hex digits: its tokens without comments, docstrings and layout. The same on Windows, and
    on every version of Python that can run the file. A file that is no Python is hashed as it is."""
    try:
        content = "\0".join(_tokens(source)).encode()
    except (SyntaxError, UnicodeError, tokenize.TokenError):
        content = source
    return _byte_hash(content)


def _byte_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _tokens(source: bytes) -> Iterator[str]:
    """The tokens of a file, line by line."""
    encoding = tokenize.detect_encoding(io.BytesIO(source).readline)[0]
    text = io.TextIOWrapper(io.BytesIO(source), encoding).read()  # every line end becomes \n
    lines = list(io.StringIO(text))
    line: list[str] = []
    depth, begun = 0, (0, 0)  # of f-strings inside each other, from Python 3.12 on several tokens
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name.endswith("STRING_START"):
            depth, begun = depth + 1, begun if depth else token.start
        elif name.endswith("STRING_END"):
            depth -= 1
            if not depth:
                line.append(_slice(lines, begun, token.end))
        elif depth or name in ("COMMENT", "NL", "ENDMARKER"):
            continue
        elif name in ("INDENT", "DEDENT"):
            yield name
        elif name == "NEWLINE":
            if not (len(line) == 1 and line[0][-1] in "\"'" and line[0][0] in "\"'rRuUbB"):  # a docstring
                yield from (*line, name)
            line = []
        else:
            line.append(token.string)


def _slice(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The text between two positions, of a line from 1 and a column from 0."""
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    return lines[first - 1][left:] + "".join(lines[first:last - 1]) + lines[last - 1][:right]


@cache
def _shipped() -> dict[str, Any]:
    return json.loads(SHIPPED.read_text(encoding="utf-8"))


@cache
def _edited() -> dict[str, str]:
    shipped, unchanged = _shipped()["files"], _shipped().get("bytes", {})  # bytes are hashed sooner than code
    present = {name: shipped[name] if _byte_hash(source) == unchanged.get(name) else code_hash(source)
               for name, source in CODE_FILES.items()}
    return {name: present.get(name, "deleted") for name in sorted(present | shipped) if present.get(name) != shipped.get(name)}


def present_sources() -> dict[str, Any]:
    """What the record of a new run says of its code: the TRAINING_VERSION, and the hashes of the files that were edited."""
    return {"version": TRAINING_VERSION, "edited": dict(_edited())}


def resumed_sources(record: Mapping[str, Any], epoch: int) -> dict[str, Any]:
    """`record`'s sources, with those of this process where they are others, which hold from `epoch` on."""
    before = record.get("sources") or {"version": 1, "edited": {}}
    pieces = [before, *before.get("resumed", [])]
    now = present_sources()
    if all(pieces[-1][key] == now[key] for key in now):
        return before
    return {**before, "resumed": [*pieces[1:], {"epoch": epoch, **now}]}


# ---------------------------------------------------------------- of a run

# What runs recorded of the code before they recorded sources. These are the committed runs'
COMMITTED_PROCEDURE = {"initialization": "dee36ace772e1ed7", "augmentation": "fdbb5182d8595cd2",
                       "schedule": "cfd86dc10173ec42", "training step": "a0d7b821c05a6740"}


def sources_of(record: Mapping[str, Any]) -> dict[str, str]:
    """In what a run's code differs from that of the committed runs, by name: a file and its hash, mostly. {} is as shipped, and
    so are all runs that recorded nothing."""
    sources = (record.get("sources") or {})
    found = dict(sources.get("edited", {}))
    if (version := sources.get("version", 1)) != 1:
        found["training version"] = str(version)
    if resumed := sources.get("resumed"):
        found["code of several versions, from epoch"] = ", ".join(str(piece["epoch"]) for piece in resumed)
    return found | {f"{name} of an earlier version": value[:8] for name, value in record.get("procedure", {}).items()
                    if value != COMMITTED_PROCEDURE.get(name)}


def check_sources(sources: Any) -> bool:
    """Whether a JSON value is what a record may have under "sources"; older ones have none."""
    match sources:
        case None:
            return True
        case {"version": int(), "edited": dict(edited)}:
            resumed = sources.get("resumed", [])
            return all(isinstance(text, str) for text in edited.values()) and isinstance(resumed, list) and all(
                isinstance(piece, dict) and isinstance(piece.get("epoch"), int) and check_sources(piece) for piece in resumed)
    return False


def edits_between(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """The files whose code is not what it was when the run in `folder` began: those on top by their copies there, those of the
    package by the hashes in its `record`."""
    copies = [name for name, source in COPIED_FILES.items() if name != "config.py" and (folder / name).is_file()
              and code_hash((folder / name).read_bytes()) != code_hash(source)]  # a run keeps its own settings
    then, now = (record.get("sources") or {}).get("edited", {}), _edited()
    return copies + [name for name in sorted(then | now) if name not in ON_TOP and then.get(name) != now.get(name)]


def is_known_model(source: bytes) -> bool:
    """Whether the code of this model.py is that of a version that was shipped, so that it may be run."""
    return code_hash(source) in _shipped()["models"]


def _ship() -> None:
    files = {name: code_hash(source) for name, source in CODE_FILES.items()}
    models = [*_shipped()["models"], files["model.py"]] if SHIPPED.exists() else [files["model.py"]]
    contents = {name: _byte_hash(source) for name, source in CODE_FILES.items()}
    SHIPPED.write_text(json.dumps({"files": files, "bytes": contents, "models": sorted(set(models))}, indent=1) + "\n",
                       encoding="utf-8")


if __name__ == "__main__":
    _ship()
