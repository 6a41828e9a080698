"""Train the embedded default target: a small Llama with its own BPE tokenizer and chat template.

From one jsonl file of problems (`question`, `answer`) to one Hugging Face folder:

    python assets/build_target.py --text gsm8k_train.jsonl --output assets/target

Every problem is one chat: the question is the user's turn, the worked answer the assistant's. The run
writes a checkpoint every `--save-every` steps and continues from it when it is started again.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}" + ASSISTANT + "{% else %}" + USER + "{% endif %}"
    "{{ m['content'] }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)
IGNORE = -100
HELD_OUT = 200  # the last rows of the file measure the loss, and are never trained on


def read_problems(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [(row["question"].strip(), row["answer"].strip()) for row in rows]


def train_tokenizer(problems: list[tuple[str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stay single tokens, so that numbers have one spelling."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in problems for text in pair), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE, model_max_length=1024
    )


def encode(tokenizer, problems) -> list[list[int]]:
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in problems]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    return tokenizer(texts, add_special_tokens=False).input_ids


def batches(rows: list[list[int]], tokens_per_batch: int, rng: random.Random) -> list[list[list[int]]]:
    """Rows of like length together, at most `tokens_per_batch` with padding, in random order."""
    order = sorted(rows, key=lambda row: len(row) + rng.random() * 16)
    out, batch = [], []
    for row in order:
        if batch and max(len(row), len(batch[-1])) * (len(batch) + 1) > tokens_per_batch:
            out.append(batch)
            batch = []
        batch.append(row)
    out.append(batch)
    rng.shuffle(out)
    return out


def collate(batch: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, batch))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=device)
    labels = torch.tensor([row + [IGNORE] * (width - len(row)) for row in batch], device=device)
    return ids, labels


def loss_sum(model, batch) -> tuple[torch.Tensor, int]:
    """Next-token cross-entropy summed over the batch, and the number of tokens in the sum."""
    ids, labels = collate(batch, model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        logits = model(input_ids=ids).logits[:, :-1].float()
    loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, sum(len(row) - 1 for row in batch)


@torch.no_grad()
def evaluate(model, rows, tokens_per_batch) -> float:
    model.eval()
    sums = [loss_sum(model, b) for b in batches(rows, tokens_per_batch, random.Random(0))]
    model.train()
    return sum(s.item() for s, _ in sums) / sum(n for _, n in sums)


def make_optimizers(model, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int, lr: float, warmup: int = 40) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="jsonl with `question` and `answer`")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("target-training"), help="checkpoint and log")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tokens-per-batch", type=int, default=6144)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    problems = read_problems(args.text)
    train, held_out = problems[:-HELD_OUT], problems[-HELD_OUT:]
    tokenizer = train_tokenizer(train, args.vocab_size)
    rows, held_out_rows = encode(tokenizer, train), encode(tokenizer, held_out)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 64,
        head_dim=64,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")
    parameters = sum(p.numel() for p in model.parameters())
    optimizers = make_optimizers(model, args.lr)

    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint, first = args.work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first = state["step"]

    def epochs():
        epoch = 0
        while True:
            yield from batches(rows, args.tokens_per_batch, random.Random(args.seed + epoch))
            epoch += 1

    log = (args.work / "log.jsonl").open("a")
    bar = tqdm(total=args.steps, initial=first, desc="target")
    for step, batch in enumerate(epochs()):
        if step >= args.steps:
            break
        if step < first:
            continue
        started = time.perf_counter()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
        total, count = loss_sum(model, batch)
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        entry = {"step": step + 1, "loss": loss.item(), "tokens_per_s": count / (time.perf_counter() - started)}
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            entry["held_out_loss"] = evaluate(model, held_out_rows, args.tokens_per_batch)
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
        log.write(json.dumps(entry) + "\n")
        log.flush()
        bar.set_postfix({k: round(v, 3) for k, v in entry.items() if k != "step"})
        bar.update()
    bar.close()

    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    loss = evaluate(model.float(), held_out_rows, args.tokens_per_batch)
    print(f"{parameters / 1e6:.2f} M parameters, held-out loss {loss:.4f}")


if __name__ == "__main__":
    main()
