"""CTC speculative decoding on one screen: draft a chain from one forward, verify it with the target, keep what agrees.

    python examples/ctc_in_60_lines.py "A baker makes 12 loaves a day. How many loaves does he make in a week?"

Greedy, one request, no cache, plain torch. The other files add batches, trees, sampling and speed. Module and weights
are those that are served.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_ctc_spec.drafter.module import CTCDrafter

ASSETS = Path(__file__).resolve().parents[1] / "assets"


def draft(drafter: CTCDrafter, states: torch.Tensor, anchor: int, num_labels: int) -> list[int]:
    """states [1, S, A * H]: the target's auxiliary hidden states of all tokens before the anchor, which is at S."""
    hidden = drafter.forward_hidden(states, torch.tensor([[anchor]]), torch.tensor([[states.shape[1]]]))[0, 0]
    logits, lattice = drafter.frames(hidden)
    p = logits.softmax(-1)  # [T, V]: what each frame says
    steps = lattice.log_transitions.exp()  # [1 + T, T]: from the frame of one label to that of the next; row 0: anchor
    w_in, w_out = drafter.markov_tables
    labels, phi, last = [], steps[0], anchor  # phi [T]: probability that the next label stands at frame t
    while len(labels) < num_labels:
        q = phi @ p  # [V]: the exact law of the next label, given the labels so far, summed over all alignments
        label = int((q.log() + w_out @ w_in[last]).argmax())
        if q[label] < 1e-6:  # no frame is left
            break
        phi = (phi * p[:, label] / q[label]) @ steps[1:]
        labels.append(label)
        last = label
    return labels


@torch.no_grad()
def generate(target, drafter: CTCDrafter, tokens: list[int], max_new_tokens: int) -> tuple[list[int], int]:
    """The target's greedy tokens, and in how many of its forwards."""
    layers, eos = list(drafter.config.aux_hidden_state_layer_ids), target.generation_config.eos_token_id
    start, drafted, forwards = len(tokens), [], 0
    while len(tokens) < start + max_new_tokens:
        out = target(torch.tensor([tokens + drafted]), output_hidden_states=True)
        forwards += 1
        says = out.logits[0, len(tokens) - 1 :].argmax(-1).tolist()  # behind the last token and behind each drafted one
        agreed = next((k for k, label in enumerate(drafted) if label != says[k]), len(drafted))
        context = len(tokens) + agreed  # the next anchor's own hidden state does not exist yet
        tokens = tokens + drafted[:agreed] + [says[agreed]]
        if eos in tokens[start:]:
            return tokens[start : tokens.index(eos, start) + 1], forwards
        states = torch.cat([out.hidden_states[layer][:, :context] for layer in layers], -1)
        drafted = draft(drafter, states, tokens[-1], drafter.config.num_labels)
    return tokens[start : start + max_new_tokens], forwards


def main(question: str) -> tuple[str, float]:
    target = AutoModelForCausalLM.from_pretrained(ASSETS / "target", local_files_only=True).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "target", local_files_only=True)
    drafter = CTCDrafter.load(ASSETS / "drafter", target.get_input_embeddings().weight, target.lm_head.weight).eval()
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    tokens, forwards = generate(target, drafter, prompt, 128)
    return tokenizer.decode(tokens, skip_special_tokens=True), len(tokens) / forwards


if __name__ == "__main__":
    text, rate = main(sys.argv[1] if len(sys.argv) > 1 else "Tom has 3 bags with 4 apples each. How many apples?")
    print(f"{text}\n\n{rate:.2f} tokens per forward of the target")
