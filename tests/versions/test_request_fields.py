"""No field of a request slips by: those of every supported vLLM are in the tables of what they do with a drafter."""

import json

import pytest
from request_fields import CLASSES, request_fields
from touches import snapshot_path

from vllm_ctc_spec.serving.release import SUPPORTED_RELEASES

from ..engine.request_cases import DRAWN, SAME, TABLES

RELEASES = [f"{major}.{minor}" for major, minor in SUPPORTED_RELEASES]


@pytest.mark.parametrize("cls", [name.rpartition(".")[2] for name in CLASSES])
def test_every_field_has_its_case(cls):
    recorded = [json.loads(snapshot_path(release, "requests").read_text(encoding="utf-8")) for release in RELEASES]
    assert TABLES[cls].keys() == {field for fields in recorded for field in fields[cls]}


def test_a_case_sends_its_field_or_says_why_there_is_nothing_to_compare():
    for cls, table in TABLES.items():
        for name, case in table.items():
            inner = [value.keys() for value in case.fields.values() if isinstance(value, dict)]
            assert name in {*case.fields}.union(*inner) if case.outcome in (SAME, DRAWN) else case.why, (cls, name)


def test_fields_are_found_in_source(tmp_path, monkeypatch):
    monkeypatch.setattr("request_fields.CLASSES", ("vllm.requests.Request",))
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    (tmp_path / "vllm" / "requests.py").write_text(
        "from typing import ClassVar\nclass Base:\n  seed: int | None = None\n"
        "class Request(Base):\n  names: ClassVar[set] = set()\n  _inner: int = 3\n  text: str\n  def ask(self): ...\n"
    )
    assert request_fields(tmp_path) == {"Request": {"text": "str", "seed": "int | None"}}
