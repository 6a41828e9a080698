"""One tiny target and its rows for all tests of a session."""

import pytest
import torch

from vllm_ctc_spec.training.answers import make_dataset
from vllm_ctc_spec.training.data_config import DataConfig
from vllm_ctc_spec.training.target import Target

from .tiny import by_transformers, make_target, write_rows


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def dataset_folder(target_folder, rows_file, tmp_path_factory):
    """The target's greedy responses to these rows, two of them held out, as `vllm-ctc data` would write them."""
    folder = tmp_path_factory.mktemp("dataset") / "data"
    asked = DataConfig(str(target_folder), str(rows_file), folder, max_new_tokens=20, held_out=2, dtype="float32")
    make_dataset(asked, overwrite=False, generate=by_transformers)
    return folder


@pytest.fixture
def target(target_folder):
    return Target.load(str(target_folder), torch.device("cpu"), torch.float32)
