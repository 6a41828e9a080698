"""Peers of the CTC drafter, for the same target and on the same data: EAGLE-3, DFlash and DSpark drafters.

    pip install --no-deps -r requirements/peers.txt
    vllm-ctc data --target TARGET --prompts prompts.jsonl --output DATASET
    python benchmarks/peers.py --target TARGET --data DATASET --output FOLDER

The package `speculators` (https://github.com/vllm-project/speculators) trains them with its own losses, data path and
trainer. Its input is made of our dataset: the target's responses, and the target's hidden states after the layers that
a CTC drafter reads by default and after its last layer. A killed run continues when it is started again. Every method
leaves one folder:

    vllm serve TARGET --speculative-config '{"method": "dspark", "model": "FOLDER/dspark", "num_speculative_tokens": 8}'
"""

import argparse
import json
import shlex
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pair import add_pair_arguments, choose_pair, ready
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from vllm_ctc_spec.drafter.config import default_aux_layer_ids
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.dataset import Example, open_dataset, target_fingerprint
from vllm_ctc_spec.training.files import differing_settings, new_file, record_settings, write_atomically
from vllm_ctc_spec.training.target import AuxHiddenStates, Target, TargetText

METHODS = ("eagle3", "dflash", "dspark")
BLOCK_SIZE = 8
BATCH_SIZE = 16  # sequences of the target's forward
DATA_SETTINGS, METHOD_SETTINGS = "data.json", "peer.json"


def check_packages() -> None:
    missing = [name for name in ("speculators", "hs_connectors", "datasets") if find_spec(name) is None]
    if missing:
        raise TrainingError(
            f"The peers are trained by the package speculators, but {', '.join(missing)} cannot be imported; "
            "run `pip install --no-deps -r requirements/peers.txt`."
        )


def claim(path: Path, settings: dict[str, Any]) -> None:
    """Record these settings, or refuse to continue work of other settings."""
    differing = differing_settings(path, settings)
    if differing:
        raise TrainingError(
            f"{path.parent} was made with other settings ({', '.join(differing)}); use another --output."
        )
    record_settings(path, settings)


class PeerData:
    """Our dataset in the form that `speculators` reads: one table, and one file of hidden states a row.

    The held-out rows come last: the package takes its validation part from the end.
    """

    def __init__(self, folder: Path, target: Path, data: Path):
        num_layers = TargetText.load(str(target)).num_layers
        fingerprint = target_fingerprint(str(target))
        train, held_out = open_dataset(data, fingerprint)
        if not train or not held_out:
            raise TrainingError(f"{data} must hold training and held-out responses; repeat `vllm-ctc data`.")
        self.folder = folder
        self.target = target
        self.layer_ids = default_aux_layer_ids(num_layers)
        self.last_layer = num_layers
        self.examples = train + held_out
        self.train_share = (len(train) + 0.5) / len(self.examples)  # the package rounds down
        self.settings = {
            "target_weights": fingerprint,
            "layers": [*self.layer_ids, num_layers],
            "tokens": sum(map(len, self.examples)),
            "examples": len(self.examples),
        }

    def prepare(self) -> None:
        claim(self.folder / DATA_SETTINGS, self.settings)
        self.write_table()
        self.write_states()

    def write_table(self) -> None:
        from datasets import Dataset

        if (self.folder / "dataset_info.json").is_file():  # written last
            return
        rows = {
            "input_ids": [e.prompt + e.response for e in self.examples],
            "loss_mask": [[0] * len(e.prompt) + [1] * len(e.response) for e in self.examples],
            "seq_len": [len(e) for e in self.examples],
        }
        Dataset.from_dict(rows).with_format("torch").save_to_disk(self.folder)

    def states_path(self, row: int) -> Path:
        return self.folder / "hidden_states" / f"hs_{row}.safetensors"

    def write_states(self) -> None:
        missing = [row for row in range(len(self.examples)) if not self.states_path(row).is_file()]
        if not missing:
            return
        missing.sort(key=lambda row: len(self.examples[row]))  # like lengths together
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        target = Target.load(str(self.target), device, torch.float32)
        run = AuxHiddenStates(target, (*self.layer_ids, self.last_layer))
        done = len(self.examples) - len(missing)
        with tqdm(total=len(self.examples), initial=done, desc="hidden states", unit="sequence") as bar:
            for start in range(0, len(missing), BATCH_SIZE):
                rows = missing[start : start + BATCH_SIZE]
                self._write_batch(run, rows, device)
                bar.update(len(rows))

    def _write_batch(self, run: AuxHiddenStates, rows: Sequence[int], device: torch.device) -> None:
        token_ids = [token_tensor(self.examples[row]) for row in rows]
        states = run(pad_sequence(token_ids, batch_first=True).to(device)).bfloat16().cpu()
        states = states.unflatten(-1, (len(self.layer_ids) + 1, -1))  # [B, S, layers, H]
        for row, ids, padded in zip(rows, token_ids, states):
            with new_file(self.states_path(row)) as temporary:
                save_file({"token_ids": ids, "hidden_states": padded[: len(ids)].contiguous()}, temporary)


def token_tensor(example: Example) -> torch.Tensor:
    return torch.tensor(example.prompt + example.response)


def train_arguments(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Options of `speculators train` that define the drafter."""
    options: dict[str, Any] = {
        "speculator_type": method,
        "num_layers": 1 if method == "eagle3" else args.num_layers,
        "epochs": args.epochs,
        "lr": args.lr,
        "total_seq_len": args.batch_tokens,
        "seed": args.seed,
    }
    # Full attention in every layer, and within a block in both directions, as the methods were published; vLLM reads
    # the second from the second option.
    options["full_attention_indices"] = list(range(options["num_layers"]))
    if method == "eagle3":
        options["ttt_steps"] = args.ttt_steps
    else:
        options |= {"block_size": BLOCK_SIZE, "max_anchors": args.anchors, "sliding_window_non_causal": True}
    if method == "dspark":
        options["markov_rank"] = args.markov_rank
    return options


def command_line(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def train(options: dict[str, Any], data: PeerData, checkpoints: Path) -> None:
    """`speculators train`, which continues from its own checkpoints."""
    from speculators.train.cli import main
    from speculators.train.config import TrainConfig

    options = options | {
        "verifier_name_or_path": data.target,
        "target_layer_ids": list(data.layer_ids),
        "data_path": data.folder,
        "on_missing": "raise",
        "train_data_ratio": data.train_share,
        "save_path": checkpoints,
        "checkpoint_freq": 0.1,
        "log_freq": 20,
    }
    if not torch.accelerator.is_available():
        options |= train_on_cpu()
    main(TrainConfig.resolve(command_line(options)))


def train_on_cpu() -> dict[str, Any]:
    """Options for a machine without an accelerator; the package's trainer addresses one even there."""
    from speculators.train import checkpointer, cli, trainer

    class CPUTrainer(trainer.Trainer):
        def setup_trainer(self) -> None:
            super().setup_trainer()
            self.local_rank = self.device_type = "cpu"

    cli.Trainer = CPUTrainer
    checkpointer.get_current_device = lambda: "cpu"
    torch.accelerator.synchronize = lambda: None
    return {"draft_attn_impl": "sdpa", "loss_implementation": "eager", "num_workers": 0}


def check_complete(checkpoint: Path) -> None:
    """The package ends well on Ctrl-C and SIGTERM too; a checkpoint within an epoch says at which step it was made."""
    state = checkpoint / "training_state.json"
    if not state.is_file() or json.loads(state.read_text(encoding="utf-8"))["local_step"]:
        raise TrainingError("The training was interrupted; the same command continues it.")


def export(checkpoint: Path, folder: Path) -> None:
    """Keep the files that vLLM loads, and nothing else of the checkpoint."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["speculators_model_type"] == "eagle3":
        # vLLM builds the drafter for three layers unless its configuration names another number.
        config["transformer_layer_config"]["num_aux_hidden_states"] = len(config["eagle_aux_hidden_state_layer_ids"])
    shutil.copyfile(checkpoint / "model.safetensors", folder / "model.safetensors")
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")  # last: now the folder is complete


def serve_command(target: Path, folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokens = config["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    method = config["speculators_model_type"]
    speculative = {"method": method, "model": str(folder), "num_speculative_tokens": tokens}
    return shlex.join(["vllm", "serve", str(target), "--speculative-config", json.dumps(speculative)])


def make_peer(method: str, args: argparse.Namespace, data: PeerData) -> Path:
    folder = args.output / method
    options = train_arguments(method, args)
    claim(folder / METHOD_SETTINGS, options | data.settings)
    if not (folder / "config.json").is_file():
        checkpoints = args.output / "checkpoints" / method
        train(options, data, checkpoints)
        last = checkpoints / str(args.epochs - 1)
        check_complete(last)
        export(last, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_pair_arguments(parser, overrides=["target"])
    parser.add_argument("--data", type=Path, required=True, help="dataset that `vllm-ctc data` wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=1024, help="of the sequences packed into a step")
    parser.add_argument("--anchors", type=int, default=120, help="blocks a step, DFlash and DSpark")
    parser.add_argument("--num-layers", type=int, default=2, help="of DFlash and DSpark; EAGLE-3 has one")
    parser.add_argument("--markov-rank", type=int, default=64, help="of DSpark's label-conditional head")
    parser.add_argument("--ttt-steps", type=int, default=3, help="unrolled draft steps in EAGLE-3's training")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate, as the CTC drafter's")
    parser.add_argument("--seed", type=int, default=0)
    args = choose_pair(parser.parse_args())
    if args.epochs < 1:
        parser.error("--epochs must be 1 or more")
    try:
        check_packages()
        ready(args.pair, drafter=False)
        data = PeerData(args.output / "data", args.target, args.data)
        data.prepare()
        for method in args.methods:
            print(f"==> {serve_command(args.target, make_peer(method, args, data))}", flush=True)
    except TrainingError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
