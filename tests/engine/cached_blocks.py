"""The blocks of the prefix cache, compared with those that a fresh prefill writes."""

from collections.abc import Iterable

import torch
from vllm import SamplingParams
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, get_group_id


def engine_core(llm):
    return llm.llm_engine.engine_core.engine_core


def cached_blocks(llm) -> list[tuple[BlockHashWithGroupId, dict[str, torch.Tensor]]]:
    """Every cached block by its hash, twice if two are alike: keys and values by layer, the drafter's among them."""
    core = engine_core(llm)
    runner = core.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context
    groups = runner.kv_cache_config.kv_cache_groups
    found = []
    for block in core.scheduler.kv_cache_manager.block_pool.blocks:
        if block.block_hash is not None:
            names = groups[get_group_id(block.block_hash)].layer_names
            content = {name: layers[name].kv_cache[block.block_id].clone() for name in names}
            found.append((block.block_hash, content))
    return found


def wrong_blocks(llm, sequences: Iterable[list[int]]) -> tuple[list[str], int]:
    """The layers that a cached block has other keys and values of than a fresh prefill, and how many blocks were
    compared: those of `sequences`, tokens that a request had or was answered. Empties the cache."""
    cached = cached_blocks(llm)
    waiting = {block_hash for block_hash, _ in cached}
    llm.reset_prefix_cache()
    wrong, compared = [], 0
    for tokens in sequences:
        if not waiting:
            break
        prompt = {"prompt_token_ids": tokens[: llm.llm_engine.model_config.max_model_len - 1]}
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        fresh = dict(cached_blocks(llm))
        for block_hash, content in cached:
            if block_hash in waiting and block_hash in fresh:
                compared += 1
                wrong += [
                    layer
                    for layer, values in content.items()
                    if not torch.allclose(values, fresh[block_hash][layer], rtol=1e-3, atol=1e-3)
                ]
        waiting -= fresh.keys()
    llm.reset_prefix_cache()
    return wrong, compared
