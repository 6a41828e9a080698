"""Tree attention, against plain attention over a list of visible positions for each node."""

import dataclasses
import random

import pytest
import torch

from vllm_ctc_spec.kernels.contract import TreeRows
from vllm_ctc_spec.kernels.tree_attention import tree_attention, tree_attention_triton

from ..oracle.trees import node_path, random_tree, starts, tree_tables

NEVER = 7.5  # what rows of the output hold that must not be written
# Positions before the root and tree rows of each request: a tree behind a context, a full tree at the start of a
# sequence, plain decoding, a request without rows, a root at the start and at the end of a tile of positions, and trees
# over the end of a tile.
MIXED = [(37, 5), (0, 65), (100, 1), (20, 0), (64, 2), (63, 9), (127, 3), (0, 1)]


@dataclasses.dataclass
class Step:
    """The arguments of tree_attention, and the trees in them."""

    arguments: dict
    trees: list[list[int]]
    requests: list[tuple[int, int]]


def caches(layout: str, entries: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values [num_blocks, block_size, Hkv, d], as views of the memory of a layout of vLLM.

    entries: [2, num_blocks, block_size, Hkv, d].
    """
    if layout == "pair NHD":
        return entries.unbind(0)
    if layout == "pair HND":
        return entries.transpose(2, 3).contiguous().transpose(2, 3).unbind(0)
    halves = torch.cat([entries[0], entries[1]], -1)
    if layout == "halves HND":
        halves = halves.transpose(1, 2).contiguous().transpose(1, 2)
    return halves.split(entries.shape[-1], -1)


def make_step(
    requests: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 1),
    size: int = 16,
    block_size: int = 16,
    layout: str = "halves HND",
    dtype: torch.dtype = torch.float32,
    chains: bool = False,
    device: str = "cpu",
) -> Step:
    """Each request also has three rows of a prompt before its tree; only slots that the trees may see are not NaN."""
    rng, generator = random.Random(len(requests)), torch.Generator().manual_seed(size)
    widest = max(num_rows for _, num_rows in requests)
    trees = [
        list(range(-1, num_rows - 1)) if chains else random_tree(max(num_rows - 1, 0), rng) for _, num_rows in requests
    ]
    _, _, node_ancestors = tree_tables(trees, max(widest, 1))
    num_tokens = sum(3 + num_rows for _, num_rows in requests)
    ancestors = torch.zeros(num_tokens, dtype=torch.int64)
    anchor_rows = starts([3 + num_rows for _, num_rows in requests])[:-1] + 3
    seq_lens = torch.tensor([sum(request) for request in requests], dtype=torch.int32)
    max_blocks = int(seq_lens.max()) // block_size + 2
    num_blocks = max_blocks * len(requests) + 1
    order = torch.randperm(num_blocks - 1, generator=generator)[: max_blocks * len(requests)] + 1
    block_table = order.view(len(requests), max_blocks).to(torch.int32)
    entries = torch.full((2, num_blocks, block_size, heads[1], size), torch.nan)
    for r, (_, num_rows) in enumerate(requests):
        ancestors[anchor_rows[r] : anchor_rows[r] + num_rows] = node_ancestors[r, :num_rows]
        for j in range(int(seq_lens[r])):
            place = slice(None), block_table[r, j // block_size], j % block_size
            entries[place] = torch.randn(2, heads[1], size, generator=generator)
    key_cache, value_cache = caches(layout, entries.to(device, dtype))
    arguments = {
        "query": torch.randn(num_tokens, heads[0], size, generator=generator).to(device, dtype),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "output": torch.full((num_tokens, heads[0], size), NEVER, device=device, dtype=dtype),
        "block_table": block_table.to(device),
        "seq_lens": seq_lens.to(device),
        "rows": TreeRows(
            anchor_rows=anchor_rows.to(device),
            num_rows=torch.tensor([num_rows for _, num_rows in requests], dtype=torch.int32, device=device),
            ancestors=ancestors.to(device),
        ),
        "scale": 0.3,
        "max_rows": widest,
    }
    return Step(arguments, trees, requests)


def expected_output(step: Step) -> torch.Tensor:
    """fp64, one node and one head after the other."""
    query, keys, values = (step.arguments[name].cpu().double() for name in ("query", "key_cache", "value_cache"))
    block_table, block_size = step.arguments["block_table"].cpu(), keys.shape[1]
    output = torch.full_like(query, NEVER)
    group = query.shape[1] // keys.shape[2]
    for r, (context, num_rows) in enumerate(step.requests):
        for node in range(num_rows):
            row = int(step.arguments["rows"].anchor_rows[r]) + node
            visible = [*range(context + 1), *(context + m for m in node_path(step.trees[r], node))]
            places = [(int(block_table[r, j // block_size]), j % block_size) for j in visible]
            key, value = (torch.stack([cache[place] for place in places]) for cache in (keys, values))
            for head in range(query.shape[1]):
                scores = key[:, head // group] @ query[row, head] * step.arguments["scale"]
                output[row, head] = scores.softmax(0) @ value[:, head // group]
    return output


def assert_attention(run, step: Step, atol: float = 2e-6, **options: int) -> None:
    before = {name: value.clone() for name, value in step.arguments.items() if isinstance(value, torch.Tensor)}
    run(**step.arguments, **options)
    output = step.arguments["output"].cpu().double()
    expected = expected_output(step)
    torch.testing.assert_close(output, expected, atol=atol, rtol=0)
    assert torch.equal(output == NEVER, expected == NEVER)
    for name in before.keys() - {"output"}:
        assert torch.equal(before[name].nan_to_num(), step.arguments[name].nan_to_num()), f"{name} was written"


@pytest.mark.parametrize("layout", ["pair NHD", "pair HND", "halves NHD", "halves HND"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (16, 2)])
def test_reference_on_mixed_steps(layout: str, heads: tuple[int, int]) -> None:
    assert_attention(tree_attention, make_step(MIXED, layout=layout, heads=heads))


def test_reference_on_half_precision() -> None:
    assert_attention(tree_attention, make_step(MIXED[:3], dtype=torch.bfloat16), atol=2e-2)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("heads", [(2, 2), (8, 1)])
def test_triton_on_mixed_steps(heads: tuple[int, int], num_splits: int, triton_device: str) -> None:
    step = make_step(MIXED, heads=heads, device=triton_device)
    assert_attention(tree_attention_triton, step, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("max_rows", [5, 8, 17, 65])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-6), (torch.float16, 3e-3)], ids=str)
def test_triton_gives_the_same_for_any_number_of_rows_that_holds_all(
    dtype: torch.dtype, atol: float, max_rows: int, num_splits: int, triton_device: str
) -> None:
    """The tiles follow from it: one to nine of 32 queries in fp32, one of 32 to three of 128 in fp16."""
    step = make_step([(37, 5), (90, 3), (3, 1)], dtype=dtype, heads=(4, 1), device=triton_device)
    step.arguments["max_rows"] = max_rows
    assert_attention(tree_attention_triton, step, atol, num_splits=num_splits)


def test_triton_merges_more_splits_than_tiles(triton_device: str) -> None:
    step = make_step([(37, 5), (90, 2)], device=triton_device)
    assert_attention(tree_attention_triton, step, num_splits=18)


@pytest.mark.parametrize("layout", ["pair NHD", "pair HND", "halves NHD"])
def test_triton_on_layouts(layout: str, triton_device: str) -> None:
    step = make_step([(37, 5), (3, 1)], layout=layout, heads=(4, 2), block_size=32, device=triton_device)
    assert_attention(tree_attention_triton, step, num_splits=2)


@pytest.mark.parametrize("size", [64, 80, 96, 112, 128, 192, 256])
def test_triton_on_head_sizes(size: int, triton_device: str) -> None:
    step = make_step([(37, 5), (70, 3)], size=size, device=triton_device)
    assert_attention(tree_attention_triton, step, atol=1e-5, num_splits=2)


@pytest.mark.parametrize("dtype, atol", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("num_splits", [1, 2])
def test_triton_on_half_precision(dtype: torch.dtype, atol: float, num_splits: int, triton_device: str) -> None:
    if (dtype, triton_device) == (torch.bfloat16, "cpu"):
        pytest.skip("the interpreter's tl.dot multiplies the bit patterns of bfloat16")
    step = make_step([(37, 33), (130, 3)], dtype=dtype, size=64, device=triton_device)
    assert_attention(tree_attention_triton, step, atol, num_splits=num_splits)


def causal_attention(step: Step) -> torch.Tensor:
    """The rows of one request whose tree is a chain, by torch's own attention over the whole sequence."""
    (root, num_rows), arguments = step.requests[0], step.arguments
    blocks = arguments["block_table"][0]
    length = root + num_rows
    key, value = (arguments[name][blocks].flatten(0, 1)[:length] for name in ("key_cache", "value_cache"))
    query = arguments["query"].new_zeros(length, *arguments["query"].shape[1:])
    query[root:] = arguments["query"][3:]
    q, k, v = (entries.transpose(0, 1)[None] for entries in (query, key, value))
    seen = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=arguments["scale"], enable_gqa=True
    )
    return seen[0].transpose(0, 1)[root:]


def assert_causal(run, device: str) -> None:
    step = make_step([(70, 65)], chains=True, device=device)
    run(**step.arguments)
    torch.testing.assert_close(step.arguments["output"][3:], causal_attention(step), atol=2e-6, rtol=0)


def test_reference_on_a_chain_is_causal() -> None:
    assert_causal(tree_attention, "cpu")


def test_triton_on_a_chain_is_causal(triton_device: str) -> None:
    assert_causal(tree_attention_triton, triton_device)


def test_triton_chooses_splits_from_shapes(triton_device: str) -> None:
    """A block table of 1024 positions for one request: four splits, three of them empty at this length."""
    step = make_step([(37, 5)], device=triton_device)
    table = torch.zeros(1, 64, dtype=torch.int32, device=triton_device)
    table[:, : step.arguments["block_table"].shape[1]] = step.arguments["block_table"]
    step.arguments["block_table"] = table
    assert_attention(tree_attention_triton, step)


def test_other_strides_are_refused() -> None:
    step = make_step([(3, 2)])
    step.arguments["key_cache"] = step.arguments["key_cache"].transpose(2, 3)
    with pytest.raises(ValueError, match="contiguous in their last dimension"):
        tree_attention_triton(**step.arguments)
