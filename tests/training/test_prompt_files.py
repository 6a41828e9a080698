"""Files of prompts as people have them: every row is read or named, and no row costs another one."""

import codecs
import gzip
import json
import subprocess
import sys

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.prompt_files import NOT_JSON, NOT_UTF8, REST_LOST, prompt_files, read_records
from vllm_ctc_spec.training.rows import COLUMNS

ROWS = [{"question": "Wie heißt du?"}, {"question": "今年几岁"}, {"question": "كيف الحال 🙂"}, {"question": "a\u2028b"}]


def read(path) -> list:
    """Rows, or why there is none in their place."""
    return [record.problem or record.fields for record in read_records(path, COLUMNS)]


def lines(rows=ROWS, end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


FORMS = {
    "rows.jsonl": lines(),
    "crlf.jsonl": lines(end="\r\n"),
    "blank.jsonl": "\n\n" + lines(end="\n \n\t\n"),
    "no-newline.jsonl": lines().rstrip(),
    "lines.json": lines(),
    "rows": lines(),
    "rows.txt": lines(),
    "array.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "one-a-line.json": "[\n" + ",\r\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "array.jsonl": json.dumps(ROWS, indent=1),
    "objects.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "no-commas.json": "[" + " ".join(map(json.dumps, ROWS)) + "]",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read(name, encoding, tmp_path):
    (tmp_path / name).write_bytes(FORMS[name].encode(encoding))
    assert read(tmp_path / name) == ROWS
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert read(tmp_path / f"{name}.gz") == ROWS


def test_files_that_were_joined_have_marks_in_the_middle(tmp_path):
    part = codecs.BOM_UTF8 + lines().encode()
    (tmp_path / "rows.jsonl").write_bytes(part + b"\n" + part)
    assert read(tmp_path / "rows.jsonl") == ROWS * 2


def test_a_damaged_line_costs_its_row(tmp_path):
    good = json.dumps({"question": "a"}).encode()
    bad = [b'{"question": "a', b"what is this", b'{"question": "\xff\xfe"}', b"[1]", b"[" * 100_000, b'"a"',
           b"9" * 5000, b'{"question": "b"} {"question": "c"}', b"\x00"]  # fmt: skip
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(part for each in bad for part in (each, good)))
    found = list(read_records(tmp_path / "rows.jsonl", COLUMNS))
    assert [record.fields for record in found[1::2]] == [{"question": "a"}] * len(bad)
    problems = [record.problem for record in found[0::2]]
    assert problems == [NOT_JSON, NOT_JSON, NOT_UTF8, "not a JSON object", NOT_JSON, "not a JSON object", NOT_JSON,
                        NOT_JSON, NOT_JSON]  # fmt: skip
    assert [record.place for record in found[:3]] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[1, {}]", ["not a JSON object", {}]),
        ('[{"a": 1}, {"a": 2', [{"a": 1}, REST_LOST]),
        ('[{"a": NaN}, {"a": 2}, oh, {"a": 3}]', 3),
        ('[{"a": 1}', [{"a": 1}]),
        ("[]", []),
        ("  ", []),
        ("", []),
        ("{", [REST_LOST]),
        ("[" * 10_000, [REST_LOST]),
    ],
)
def test_behind_damage_in_an_array_nothing_is_read(text, found, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    records = read(tmp_path / "rows.json")
    assert len(records) == found if isinstance(found, int) else records == found
    if records and records[-1] == REST_LOST:
        (*_, last) = read_records(tmp_path / "rows.json", COLUMNS)
        assert last.place == f"rows.json, item {len(records)}"


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("rows.jsonl", "rows.json"):
        (folder / name).write_bytes(content)
        for record in read_records(folder / name, COLUMNS):
            assert isinstance(record.fields, dict) and (not record.problem or not record.fields)


def test_a_row_of_a_megabyte_is_one_row(tmp_path):
    long = {"question": "word " * 200_000}
    (tmp_path / "rows.jsonl").write_text(lines([long, *ROWS]))
    assert read(tmp_path / "rows.jsonl") == [long, *ROWS]


CHATS = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]]


def test_a_parquet_file_is_read_in_the_columns_of_prompts(tmp_path):
    table = pyarrow.table({"messages": CHATS, "text": ["x", "y"], "category": ["qa", None]})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=1)
    expected = [{"messages": CHATS[0], "text": None, "category": "qa"}, {"messages": CHATS[1], "text": None,
                 "category": None}]  # fmt: skip
    found = list(read_records(tmp_path / "rows.parquet", COLUMNS))
    assert [record.fields for record in found] == expected
    assert [record.place for record in found] == ["rows.parquet, row 1", "rows.parquet, row 2"]


def test_a_parquet_file_without_prompts_has_its_rows(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["x"] * 3000}), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [{"text": None}] * 3000


def test_a_damaged_text_in_a_parquet_file_costs_its_row(tmp_path):
    damaged = pyarrow.array([b"good", b"\xff\xfe", b"also good"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"question": damaged}), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [{"question": "good"}, NOT_UTF8, {"question": "also good"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.parquet", b"PAR1 and no more"), ("rows.jsonl.gz", gzip.compress(b"{}" * 1000)[:20]),
     ("rows.jsonl.gz", b"no gzip"), ("nowhere.jsonl", None)],
    ids=["no parquet", "half a gzip", "no gzip", "no file"],  # a gzip's bytes hold the time: no name for a test
)  # fmt: skip
def test_a_file_that_cannot_be_opened_is_one_sentence(name, content, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=rf"The data file .*{name} cannot be read \(") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow_is_one_sentence_and_the_rest_needs_none(tmp_path, monkeypatch):
    parquet.write_table(pyarrow.table({"question": ["a"]}), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text(lines())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TrainingError, match="read by pyarrow, which cannot be imported .*: pip install pyarrow"):
        read(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.jsonl") == ROWS


def test_a_folder_is_all_of_its_files_by_name(tmp_path):
    for name in ("b/second.jsonl", "a/first.JSON", "c.jsonl.gz", ".cache/hidden.jsonl", "README.md", "b/data.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = lines([{"question": name}])
        (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    parquet.write_table(pyarrow.table({"question": ["d"]}), tmp_path / "d.parquet")
    found = list(read_records(tmp_path, COLUMNS))
    places = ["a/first.JSON:1", "b/second.jsonl:1", "c.jsonl.gz:1", "d.parquet, row 1"]
    assert [record.place for record in found] == places
    assert [record.fields["question"] for record in found] == ["a/first.JSON", "b/second.jsonl", "c.jsonl.gz", "d"]
    assert [path.name for path in prompt_files(tmp_path)[1]] == ["README.md", "data.csv"]


def test_a_folder_without_prompts_is_refused(tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(TrainingError, match="neither a dataset of `vllm-ctc data` nor a folder with files of prompts"):
        read(tmp_path)


def test_rows_are_read_when_they_are_asked_for(tmp_path):
    """A few prompts of a large file cost no more than these."""
    (tmp_path / "rows.jsonl").write_text(lines([{"question": "a"}]) * 10 + "{}" * 3)
    (tmp_path / "array.json").write_text(json.dumps([{"question": "a"}] * 10)[:-1] + ", ?]")
    for name in ("rows.jsonl", "array.json"):
        records = read_records(tmp_path / name, COLUMNS)
        assert [next(records).problem for _ in range(10)] == [""] * 10


def test_reading_prompts_needs_no_torch():
    """The command line's help and the benchmarks start quickly."""
    program = "import sys, vllm_ctc_spec.training.rows; sys.exit({'torch', 'pyarrow'} & sys.modules.keys() or None)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
