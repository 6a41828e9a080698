"""The embedded pair: a small target and its CTC drafter, trained for this repository, and how each is served."""

from pathlib import Path

from server import Server, on_cpu

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "assets/target"
DRAFTER = ROOT / "assets/drafter"
PROMPTS = ROOT / "benchmarks/demo_prompts.jsonl"
RESULTS = ROOT / "benchmarks/results"

# vLLM's default on a GPU. On a CPU the plugin selects it for its own method; elsewhere it has to be asked for.
V2_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "1"}


def ctc_config(drafter: Path) -> dict:
    """The `--speculative-config` of a CTC drafter; the number of speculative tokens is the drafter's own choice."""
    return {"method": "ctc", "model": str(drafter)}


def without_drafter(target: Path = TARGET, **options) -> Server:
    """The target alone, under the same model runner as with its drafter."""
    options.setdefault("env", V2_RUNNER if on_cpu() else {})
    return Server(existing(target), **options)


def with_drafter(target: Path = TARGET, drafter: Path = DRAFTER, **options) -> Server:
    return Server(existing(target), speculative_config=ctc_config(existing(drafter)), **options)


def existing(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise SystemExit(f"error: there is no model in {folder}: config.json is missing.")
    return folder
