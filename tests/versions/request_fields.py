"""Every field of a request, in one version of vLLM. `touches.py` writes `requests-MAJOR.MINOR.json`: of each class, the
fields and their annotations. `tests/engine/request_cases.py` says of each field what it does with a drafter.
"""

import ast
from pathlib import Path

from vllm_source import VllmSource

CLASSES = (
    "vllm.sampling_params.SamplingParams",
    "vllm.sampling_params.StructuredOutputsParams",
    "vllm.sampling_params.RepetitionDetectionParams",
    "vllm.sampling_params.BeamSearchParams",
    "vllm.entrypoints.generate.base.protocol.StreamOptions",
    "vllm.entrypoints.openai.completion.protocol.CompletionRequest",
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest",
)


def request_fields(folder: Path) -> dict[str, dict[str, str]]:
    """Class, then field, then annotation; of the vLLM in `folder`. Private names are no fields of a request."""
    source, found = VllmSource(folder), {}
    for name in CLASSES:
        cls = source.find(name)
        assert cls is not None, f"vLLM has no {name} any more: name the class that has its fields in CLASSES"
        found[name.rpartition(".")[2]] = {
            node.target.id: ast.unparse(node.annotation)
            for owner in source.lineage(cls)
            for node in owner.node.body
            if isinstance(node, ast.AnnAssign) and not _is_no_field(node)
        }
    return found


def _is_no_field(node: ast.AnnAssign) -> bool:
    return node.target.id.startswith("_") or ast.unparse(node.annotation).startswith("ClassVar")
