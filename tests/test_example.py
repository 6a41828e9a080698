"""The example on one screen: the target's own greedy tokens, in fewer of its forwards."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_ctc_spec.drafter.module import CTCDrafter

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_says_what_the_target_says():
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples/ctc_in_60_lines.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    target = AutoModelForCausalLM.from_pretrained(ROOT / "assets/target").float().eval()
    drafter = CTCDrafter.load(ROOT / "assets/drafter", target.get_input_embeddings().weight, target.lm_head.weight)
    prompt = AutoTokenizer.from_pretrained(ROOT / "assets/target").apply_chat_template(
        [{"role": "user", "content": "Ann has 12 eggs and eats 5. How many are left?"}],
        add_generation_prompt=True, return_dict=False,
    )  # fmt: skip
    tokens, forwards = example.generate(target, drafter.eval(), prompt, 40)
    expected = target.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
    assert tokens == expected
    assert len(tokens) > 2 * forwards
