"""A sound drafter in a folder full of traps, copies of it to spoil, and what the config boundary makes of them."""

import json
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from vllm_ctc_spec.drafter.config import CONFIG_NAME, WEIGHTS_NAME, DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.serving.options import parse

CONFIG = DrafterConfig(
    hidden_size=8, vocab_size=11, target_num_layers=3, aux_hidden_state_layer_ids=(1, 2), num_frames=4, num_labels=3,
    markov_rank=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4, intermediate_size=16, target="a/target",
)  # fmt: skip
MAX_SECONDS = 5.0  # of processor time, for one refusal
PICKLES = ("pytorch_model.bin", "model.pt", "training_args.bin", "consolidated.00.pth", "adapter_model.bin")
MODULES = ("ctc.py", "modeling_ctc.py", "configuration_ctc.py", "tokenization_ctc.py", "__init__.py", "setup.py")


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        import os

        return os.mkdir, (self.marker,)


def lay_traps(folder: Path, marker: Path) -> None:
    """Files that make the folder `marker` when one is ever executed or unpickled."""
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps({"weight": Trap(marker)}))
    for name in MODULES:
        (folder / name).write_text(f"import os\n\nos.mkdir({str(marker)!r})\n")
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_ctc.CTCTokenizer", None]}, "trust_remote_code": True}
    for name in ("tokenizer_config.json", "generation_config.json", "processor_config.json"):
        (folder / name).write_text(json.dumps(auto))


class Checkpoints:
    def __init__(self, folder: Path):
        self.sound, self.marker = folder / "sound", folder / "executed"
        torch.manual_seed(0)
        self.tables = torch.randn(2, CONFIG.vocab_size, CONFIG.hidden_size)
        CTCDrafter(CONFIG, *self.tables).save(self.sound)
        lay_traps(self.sound, self.marker)
        self.config = json.loads((self.sound / CONFIG_NAME).read_text())
        self.weights = (self.sound / WEIGHTS_NAME).read_bytes()

    @contextmanager
    def copy(self) -> Iterator[Path]:
        """A copy of the sound checkpoint that the caller may spoil."""
        with tempfile.TemporaryDirectory(dir=self.sound.parent) as folder:
            yield Path(shutil.copytree(self.sound, Path(folder) / "drafter"))

    def refusal(self, folder: Path | object, **options) -> str | None:
        """The sentence with which the checkpoint is refused; None: it is taken, and then it can be loaded and used."""
        target = SimpleNamespace(
            model=str(self.sound.parent / "target"),
            get_hidden_size=lambda: CONFIG.hidden_size,
            get_vocab_size=lambda: CONFIG.vocab_size,
            get_total_num_hidden_layers=lambda: CONFIG.target_num_layers,
        )
        model = str(folder) if isinstance(folder, Path) else folder
        started, text = time.process_time(), None
        try:
            parse({"method": "ctc", "model": model, **options}, target)
        except DrafterConfigError as error:
            text = str(error)
        assert time.process_time() - started < MAX_SECONDS
        if text is None:
            self.use(folder)
        else:
            assert is_one_sentence(text), text
        assert not self.marker.exists(), "something in the checkpoint was executed"
        return text

    def use(self, folder: Path) -> None:
        drafter = CTCDrafter.load(folder, *self.tables)
        states = torch.zeros(1, 5, CONFIG.hidden_size * len(drafter.config.aux_hidden_state_layer_ids))
        frames = drafter(states, torch.tensor([[3]]), torch.tensor([[5]]))
        assert frames.logits.shape == (1, 1, drafter.config.num_frames, CONFIG.vocab_size)


def is_one_sentence(text: str) -> bool:
    return text.endswith(".") and text.isprintable() and len(text) < 1000
