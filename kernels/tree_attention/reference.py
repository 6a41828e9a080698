"""Reference of `tree_attention` in torch. Tests and benchmarks only: vLLM's own attention serves a CPU."""

import torch
import triton

from vllm_ctc_spec.kernels.contract import TreeRows


def tree_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    rows: TreeRows,
    scale: float,
    max_rows: int,
) -> None:
    """Dense masked attention in fp32, one request after the other."""
    block_size = key_cache.shape[1]
    bits = torch.arange(max_rows - 1, device=query.device)
    is_grouped = query.shape[1] != key_cache.shape[2]
    requests = zip(seq_lens.tolist(), rows.anchor_rows.tolist(), rows.num_rows.tolist())
    for r, (seq_len, anchor_row, count) in enumerate(requests):
        if count == 0:
            continue
        blocks = block_table[r, : triton.cdiv(seq_len, block_size)]
        tree = slice(anchor_row, anchor_row + count)
        mask = None
        if count > 1:
            mask = torch.ones(count, seq_len, dtype=torch.bool, device=query.device)
            mask[:, seq_len - count + 1 :] = (rows.ancestors[tree, None] >> bits[: count - 1]) & 1
        q, k, v = (
            entries.transpose(0, 1)[None].float()
            for entries in (
                query[tree],
                key_cache[blocks].flatten(0, 1)[:seq_len],
                value_cache[blocks].flatten(0, 1)[:seq_len],
            )
        )
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=is_grouped)
        output[tree] = seen[0].transpose(0, 1)
