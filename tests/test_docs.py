"""Pages say what is there: links lead somewhere, and the page of the house names every file."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("assets/**/*.md")])
HOUSE = ROOT / "docs/architecture.md"


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def problem_of(page: Path, link: str) -> str | None:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return f"{link}: there is no such file"
    if anchor and target.suffix == ".md":
        headings = re.findall(r"^#+ (.*)$", without_code(target.read_text(encoding="utf-8")), re.MULTILINE)
        if anchor not in map(anchor_of, headings):
            return f"{link}: there is no such heading"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    inside = [link for link in links if not link.startswith(("http://", "https://"))]
    assert [problem for link in inside if (problem := problem_of(page, link))] == []


def test_a_link_into_nothing_is_found() -> None:
    assert problem_of(HOUSE, "nowhere.md") and problem_of(HOUSE, "method.md#no-such-heading")
    assert problem_of(HOUSE, "method.md#how-it-works") is None


def test_the_page_of_the_house_names_every_file() -> None:
    """`serving/cpu/` is one line there: development only."""
    page = without_code(HOUSE.read_text(encoding="utf-8"))
    files = [*ROOT.glob("kernels/*.py"), *(ROOT / "vllm_ctc_spec").rglob("*.py")]
    files = [file for file in files if "cpu" not in file.parts and not file.name.startswith("_")]
    assert len(files) > 60
    names = {word for span in re.findall(r"`([^`]+)`", page) for word in re.split(r"[/{},\s]+", span)}
    assert sorted(str(file.relative_to(ROOT)) for file in files if file.name not in names) == []


def test_the_page_of_the_house_names_no_file_that_is_gone() -> None:
    page = without_code(HOUSE.read_text(encoding="utf-8"))
    there = {file.name for folder in ("kernels", "vllm_ctc_spec", "benchmarks", "scripts", "examples") for file in
             (ROOT / folder).rglob("*.py")}  # fmt: skip
    named = {Path(span).name for span in re.findall(r"`([\w/.]+\.py)`", page)}
    assert len(named) > 60 and sorted(named - there) == []
