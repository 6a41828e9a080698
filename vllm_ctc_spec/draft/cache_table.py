"""The frozen table of the cache: what commonly follows each token in a corpus. A safetensors file with one tensor,
`followers [rows, F, FL] int32`: by the id of the leader, the most frequent followers first, -1 behind their ends."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_ctc_spec.errors import DrafterConfigError, path_given
from vllm_ctc_spec.kernels.history_tree import NO_TOKEN

NAME, VERSION = "followers", {"vllm_ctc_cache": "1"}


class CacheTable(NamedTuple):
    path: Path
    followers: Tensor

    @classmethod
    def load(cls, path: Any) -> "CacheTable":
        """The table that `save` wrote (DrafterConfigError)."""
        path = path_given("ctc_cache_table", path, "the file that `vllm-ctc cache` wrote")
        try:
            with safe_open(path, "pt") as file:
                followers = file.get_tensor(NAME)
        except (SafetensorError, OSError) as error:
            raise DrafterConfigError(
                f"{path} is no table of `vllm-ctc cache` ({type(error).__name__}); give the file that it wrote."
            ) from error
        if followers.dtype != torch.int32 or followers.dim() != 3 or not followers.numel():
            raise DrafterConfigError(
                f"{path} holds followers of the shape {tuple(followers.shape)} in {followers.dtype}, not [tokens, "
                "followers, length] in torch.int32; write it again with `vllm-ctc cache`."
            )
        return cls(path, followers)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse tokens that the target does not have (DrafterConfigError)."""
        if len(self.followers) > vocab_size or not NO_TOKEN <= int(self.followers.min()) or (
            int(self.followers.max()) >= vocab_size
        ):  # fmt: skip
            raise DrafterConfigError(
                f"{self.path} holds token ids that the target's vocabulary of {vocab_size} does not have; make a table "
                "from this target's own answers with `vllm-ctc cache`."
            )

    def save(self) -> None:
        save_file({NAME: self.followers.contiguous()}, self.path, VERSION)
