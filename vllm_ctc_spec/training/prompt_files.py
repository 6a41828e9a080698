"""Files of prompts as people have them: JSON lines, JSON arrays, parquet; gzipped, in folders, with damaged rows.

A row that cannot be read costs that row. Kept free of torch; pyarrow is imported for parquet alone.
"""

import contextlib
import dataclasses
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from vllm_ctc_spec.errors import TrainingError

LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*LINE_SUFFIXES, ".json", ".parquet")  # of the files that are read in a folder; each may end with .gz
ROWS_AT_ONCE = 1024  # of a parquet file, in memory
SPACE = re.compile(r"[ \t\r\n]*")
NOT_JSON, NOT_UTF8 = "not JSON", "not UTF-8"
REST_LOST = "not JSON, with everything behind it in its file"


@dataclasses.dataclass(frozen=True)
class Record:
    """One row of a file, an object by its fields; problem: why it is none."""

    place: str  # for a user to find it
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""


def prompt_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The file itself; or the files of a folder and of those below, by name, and the ones among them that are of no
    known kind. Hidden ones are neither (TrainingError if there is nothing to read)."""
    if not path.is_dir():
        return [path], []
    inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file.relative_to(path))]
    known = [file for file in inside if _suffix(file) in SUFFIXES]
    if not known:
        raise TrainingError(
            f"{path} is neither a dataset of `vllm-ctc data` nor a folder with files of prompts "
            f"({', '.join(SUFFIXES)}): give one of them, or a file."
        )
    return known, [file for file in inside if file not in known]


def read_records(path: Path, columns: Collection[str]) -> Iterator[Record]:
    """All rows of a file or folder, in the order of the files' names (TrainingError for a file that cannot be opened).

    columns: those of a parquet file that are read; the others are None.
    """
    for file in prompt_files(path)[0]:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        try:
            yield from _parquet(file, name, columns) if _suffix(file) == ".parquet" else _json(file, name)
        except (OSError, EOFError, ValueError, zlib.error) as error:  # Arrow's own errors are ValueErrors
            if isinstance(error, TrainingError):
                raise
            raise TrainingError(f"The data file {file} cannot be read ({_reason(error)}).") from error


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _json(path: Path, name: str) -> Iterator[Record]:
    with _open_text(path) as file:
        lines = (line.lstrip("\ufeff") for line in file)
        first = next((line for line in lines if line.strip()), "")
        if _one_object_a_line(first, _suffix(path) in LINE_SUFFIXES):
            file.seek(0)
            yield from _lines(file, name)
        else:
            yield from _values("".join(itertools.chain([first], lines)), name)


def _open_text(path: Path) -> TextIO:
    """Decoded by its byte-order mark, or its first characters. Lines end at \\n alone: JSON allows other separators
    within strings, such as U+2028."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    return opened(path, "rt", encoding=encoding, errors=errors, newline="\n")


def _one_object_a_line(first: str, is_named_so: bool) -> bool:
    """By the first line. Files that are named .json have one object a line as often as an array."""
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(first), dict)
    return is_named_so and not first.lstrip().startswith("[")


def _lines(file: TextIO, name: str) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        line = line.lstrip("\ufeff")  # also in the middle, of files that were joined
        if line.strip():
            yield _record(f"{name}:{number}", line)


def _record(place: str, line: str) -> Record:
    try:
        line.encode()
        value = json.loads(line)
    except UnicodeEncodeError:
        return Record(place, problem=NOT_UTF8)
    except (ValueError, RecursionError):
        return Record(place, problem=NOT_JSON)
    return _of_value(place, value)


def _of_value(place: str, value: Any) -> Record:
    return Record(place, value) if isinstance(value, dict) else Record(place, problem="not a JSON object")


def _values(text: str, name: str) -> Iterator[Record]:
    """The elements of an array, or values one after the other, each parsed when it is asked for. Where one is damaged
    nobody knows where the next one begins."""
    decoder, position = json.JSONDecoder(), SPACE.match(text).end()
    in_array = text.startswith("[", position)
    if in_array:
        position = SPACE.match(text, position + 1).end()
    for number in itertools.count(1):
        if position == len(text) or in_array and text[position] == "]":
            return
        place = f"{name}, item {number}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            yield Record(place, problem=REST_LOST)
            return
        yield _of_value(place, value)
        position = SPACE.match(text, position).end()
        if in_array and text.startswith(",", position):
            position = SPACE.match(text, position + 1).end()


def _parquet(path: Path, name: str, columns: Collection[str]) -> Iterator[Record]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        message = f"{path} is read by pyarrow, which cannot be imported ({error}): pip install pyarrow."
        raise TrainingError(message) from error
    with parquet.ParquetFile(path) as file:
        names, numbers = file.schema_arrow.names, itertools.count(1)
        unread = dict.fromkeys(names)
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column for column in names if column in columns]):
            for row in range(batch.num_rows):
                place = f"{name}, row {next(numbers)}"
                try:
                    yield Record(place, unread | batch.slice(row, 1).to_pylist()[0])
                except UnicodeDecodeError:  # Arrow does not look into strings before
                    yield Record(place, problem=NOT_UTF8)
