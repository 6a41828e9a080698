"""One tiny target and its rows for all tests of a session."""

import pytest
import torch

from vllm_ctc_spec.training.target import Target

from .tiny import make_target, write_rows


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def target(target_folder):
    return Target.load(str(target_folder), torch.device("cpu"), torch.float32)
