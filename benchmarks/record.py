"""What every benchmark leaves: OUTPUT.json, everything, and OUTPUT.md, its table. Needs nothing but Python."""

import json
import platform
import re
from pathlib import Path


def write_record(output: Path, record: dict, table: str) -> None:
    """Write both and print the table."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


def processor() -> str:
    match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1) if match else platform.processor()
