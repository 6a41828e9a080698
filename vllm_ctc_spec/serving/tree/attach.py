"""Trees meet the loaded target: its attention layers and its model state."""

from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_ctc_spec.accept.rule import AcceptanceRule
from vllm_ctc_spec.serving.hidden import hidden_rows
from vllm_ctc_spec.serving.limits import refused_with_trees
from vllm_ctc_spec.serving.tree.attention import AttendTreeRows, attend_tree_rows, use_tree_attention
from vllm_ctc_spec.serving.tree.compaction import PathCompaction
from vllm_ctc_spec.serving.tree.layers import check_layer
from vllm_ctc_spec.serving.tree.layout import TreeLayout
from vllm_ctc_spec.serving.tree.model_state import Proposer, TreeModelState
from vllm_ctc_spec.serving.tree.table import TreeTable


def target_layers(vllm_config: VllmConfig) -> dict[str, Attention]:
    """The attention layers that exist now: before the drafter is loaded, the target's."""
    return get_layers_from_vllm_config(vllm_config, Attention)


def attach_trees(
    vllm_config: VllmConfig,
    target: nn.Module,
    layers: dict[str, Attention],
    trees: TreeTable,
    layout: TreeLayout,
    proposer: Proposer,
    rule: AcceptanceRule,
) -> None:
    """Let `target`, with its attention `layers`, verify the `trees` of `proposer`, laid out in `layout`, by `rule`.

    vLLM loads a drafter after the target's weights and before the model state, the samplers and the attention
    metadata builders are made from the target (`GPUModelRunner.load_model`), so that they are made from this.
    """
    if resolve_model_state_cls(vllm_config, target) is not DefaultModelState:
        raise refused_with_trees(f"{type(target).__name__}, which keeps a state of its own in vLLM")
    for name, layer in layers.items():
        check_layer(name, layer)
    attend, compaction = _on_cpu() if layout.positions.is_cpu else (attend_tree_rows, PathCompaction)
    use_tree_attention(layers.values(), attend, layout)
    shared = {
        "trees": trees, "layout": layout, "compaction": compaction(layers), "proposer": proposer, "rule": rule,
        "hidden": hidden_rows(target, rule),
    }  # fmt: skip
    model_state = type("TreeModelState", (TreeModelState,), shared)
    target.get_model_state_cls = lambda: model_state


def _on_cpu() -> tuple[AttendTreeRows, type[PathCompaction]]:
    from vllm_ctc_spec.serving.cpu import tree

    return tree.attend_tree_rows, tree.CpuPathCompaction
