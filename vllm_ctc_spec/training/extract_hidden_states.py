"""The target's auxiliary hidden states by vLLM, for a dataset whose responses are there."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.dataset import Shard, read_shard
from vllm_ctc_spec.training.dataset_writer import Advance
from vllm_ctc_spec.training.engine import Engine, EngineConfig

States = Iterator[tuple[Shard, Tensor]]
HANDOVER_PREFIX, HANDOVER_SUFFIX = "hidden-states-", ".tmp"  # of the folder through which vLLM hands them over


def compute_states(
    config: EngineConfig, folder: Path, shards: Sequence[Shard], advance: Advance, layer_ids: tuple[int, ...]
) -> States:
    """The target's auxiliary hidden states by vLLM, bfloat16 `[tokens of a shard, A * H]`.

    vLLM's method `extract_hidden_states` keeps them beside the KV cache, and a connector writes those of each finished
    request to a file. The last token of an example gets zeros: no draft's context holds it, and running the target on
    it could need a position that the target does not have.
    """
    from vllm import envs
    from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
        cleanup_hidden_states,
        load_hidden_states,
    )

    if not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        # The files are written by the step after the last one that anybody waits for.
        raise TrainingError(
            "--hidden-states needs vLLM's engine in a process of its own; unset VLLM_ENABLE_V1_MULTIPROCESSING."
        )
    with tempfile.TemporaryDirectory(prefix=HANDOVER_PREFIX, suffix=HANDOVER_SUFFIX, dir=folder) as handover:
        options = {
            "speculative_config": {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layer_ids)}},
            },
            "kv_transfer_config": {
                "kv_connector": "HiddenStatesConnector",
                "kv_connector_module_path": "vllm_ctc_spec.training.hidden_states_connector",
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {"shared_storage_path": handover},
            },
        }
        with contextlib.closing(Engine(config, **options)) as engine:
            for shard in shards:
                examples = read_shard(shard.path(folder))
                rows = []
                for path in engine.hidden_states([(e.prompt + e.response)[:-1] for e in examples], advance):
                    try:
                        states = load_hidden_states(path)["hidden_states"].flatten(1).bfloat16()
                    except (OSError, SafetensorError) as error:  # vLLM logs why, and goes on
                        raise TrainingError(
                            f"vLLM could not write hidden states to {folder} ({error}); when there is room, the same "
                            "command continues."
                        ) from error
                    rows += [states, states.new_zeros(1, states.shape[1])]
                    cleanup_hidden_states(path)
                yield shard, torch.cat(rows)
