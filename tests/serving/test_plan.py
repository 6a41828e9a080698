"""`ctc_plan`: what a plan tells vLLM, what contradicts it, and where it does not fit."""

import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.plan.file import FIELDS, PLAN_NAME, Plan
from vllm_ctc_spec.plan.solve import Expected
from vllm_ctc_spec.serving.cpu import threads
from vllm_ctc_spec.serving.options import IN_A_PLAN, KEEP_LAST_BLOCK, SCHEDULE, parse
from vllm_ctc_spec.serving.plan import follow, served_here

ASSETS = Path(__file__).parents[2] / "assets"
CHAINS = [(1, 2, 6), (3, 4, 2), (5, 2**20, 0)]


@pytest.fixture
def drafter(tmp_path) -> Path:
    return Path(shutil.copytree(ASSETS / "drafter", tmp_path / "drafter", ignore=shutil.ignore_patterns(PLAN_NAME)))


@pytest.fixture
def target() -> SimpleNamespace:
    """What is read of vLLM's ModelConfig."""
    drafter = DrafterConfig.load(ASSETS / "drafter")
    return SimpleNamespace(
        model=str(ASSETS / "target"), dtype=torch.float32, get_hidden_size=lambda: drafter.hidden_size,
        get_vocab_size=lambda: drafter.vocab_size, get_total_num_hidden_layers=lambda: drafter.target_num_layers,
    )  # fmt: skip


@pytest.fixture
def save(drafter, target):
    """save(path, draft, schedule, **other values of what it was measured for): a plan that fits this machine."""

    def write(path: Path, draft: str = "chain", schedule=CHAINS, **made_for) -> Path:
        here = {"threads": 1, **served_here(target.model, drafter, "float32"), **made_for}
        path.write_text(Plan(draft, schedule, here).to_json())
        return path

    return write


@pytest.mark.parametrize(
    ("draft", "schedule", "told"),
    [
        ("chain", CHAINS, ("chain", 6)),
        ("tree", [(1, 1, 4), (2, 3, 32), (4, 2**20, 0)], ("tree", 32)),
        ("none", [(1, 2**20, 0)], ("chain", 1)),
    ],
)
def test_a_plan_tells_vllm_what_to_draft(draft, schedule, told, drafter, target, save, tmp_path):
    path = save(tmp_path / "p.json", draft, schedule)
    given = {"method": "ctc", "model": str(drafter), "ctc_plan": str(path)}
    options, _, for_vllm, *_ = parse(given, target)
    assert (options.draft, for_vllm["num_speculative_tokens"]) == told
    assert for_vllm == {
        "method": "dflash", "model": str(drafter), "num_speculative_tokens": told[1], SCHEDULE: schedule,
        KEEP_LAST_BLOCK: True,
    }  # fmt: skip
    assert given == {"method": "ctc", "model": str(drafter), "ctc_plan": str(path)}


def test_a_plan_is_found_from_here_and_in_the_drafters_folder(drafter, target, save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "here.json", "chain", [(1, 9, 3)])
    save(drafter / "there.json", "chain", [(1, 9, 5)])
    drafted = {
        name: parse({"model": str(drafter), "ctc_plan": name}, target).for_vllm["num_speculative_tokens"]
        for name in ("here.json", "there.json")
    }
    assert drafted == {"here.json": 3, "there.json": 5}
    with pytest.raises(DrafterConfigError, match=f"^There is no plan nowhere.json, here or in {drafter};"):
        parse({"model": str(drafter), "ctc_plan": "nowhere.json"}, target)
    for wrong in (3, "a\nb", ["p"]):
        with pytest.raises(DrafterConfigError, match="give the file that `vllm-ctc plan` wrote"):
            parse({"model": str(drafter), "ctc_plan": wrong}, target)


VALUES = {
    "ctc_draft": "chain", "num_speculative_tokens": 4, "ctc_tree_rows": 9, SCHEDULE: [(1, 9, 3)],
    "ctc_search": "prefix", "ctc_tree_width": 16, "ctc_tree_depth": 4, "draft_sample_method": "greedy",
    "rejection_sample_method": "standard", "ctc_sources": "ctc", "ctc_acceptance": "pivot",
}  # fmt: skip


@pytest.mark.parametrize("key", IN_A_PLAN)
def test_what_a_plan_says_is_not_said_twice(key, drafter, target, save, tmp_path):
    given = {"model": str(drafter), "ctc_plan": str(save(tmp_path / "p.json")), key: VALUES[key]}
    with pytest.raises(DrafterConfigError, match=f"^ctc_plan and {key} both say what to draft; remove one of them"):
        parse(given, target)


@pytest.mark.parametrize("field", FIELDS)
def test_a_plan_of_another_machine_or_model_is_refused(field, drafter, target, save, tmp_path, monkeypatch):
    monkeypatch.setenv(threads.VARIABLE, "0")
    path = save(tmp_path / "p.json", **{field: "another"})
    here = served_here(target.model, drafter, "float32")[field]
    sentence = f"The plan {path} is for {FIELDS[field]} 'another', and here it is {here!r}; measure one"
    with pytest.raises(DrafterConfigError, match=f"^{re.escape(sentence)}"):
        parse({"model": str(drafter), "ctc_plan": str(path)}, target)


def test_dtype_and_devices_are_the_servers(drafter, target, save, tmp_path):
    given = {"model": str(drafter), "ctc_plan": str(save(tmp_path / "p.json"))}

    def devices(tensor: int, data: int = 1) -> SimpleNamespace:
        return SimpleNamespace(tensor_parallel_size=tensor, data_parallel_size=data)

    parse(given, target, devices(1))
    with pytest.raises(DrafterConfigError, match="is for the tensor_parallel_size 1, and here it is 2"):
        parse(given, target, devices(2))
    with pytest.raises(DrafterConfigError, match="which vLLM does not with data parallelism"):
        parse(given, target, devices(1, 2))
    target.dtype = torch.bfloat16
    with pytest.raises(DrafterConfigError, match="is for the dtype 'float32', and here it is 'bfloat16'"):
        parse(given, target)
    target.model = "some/name"
    with pytest.raises(DrafterConfigError, match="some/name is none"):
        parse(given, target)


def test_another_drafter_of_the_same_shape_is_noticed(drafter, target, save, tmp_path):
    path = save(tmp_path / "p.json")
    weights = bytearray((drafter / "model.safetensors").read_bytes())
    header = int.from_bytes(weights[:8], "little")
    weights[8 + header : 8 + header + 4] = b"\0\0\0\0"
    (drafter / "model.safetensors").write_bytes(weights)
    with pytest.raises(DrafterConfigError, match="is for the drafter's weights"):
        parse({"model": str(drafter), "ctc_plan": str(path)}, target)


def test_the_drafters_own_plan_is_followed_unless_something_contradicts(drafter, target, save, caplog):
    alone = parse({"model": str(drafter)}, target)
    save(drafter / PLAN_NAME)
    options, _, for_vllm, *_ = parse({"model": str(drafter)}, target)
    assert (options.draft, for_vllm["num_speculative_tokens"], for_vllm[SCHEDULE]) == ("chain", 6, CHAINS)
    given = parse({"model": str(drafter), "num_speculative_tokens": 3}, target)
    assert given.for_vllm["num_speculative_tokens"] == 3
    for spoil in (lambda path: save(path, device="another"), lambda path: path.write_text("{")):
        spoil(drafter / PLAN_NAME)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "vllm.ctc_spec"):
            assert parse({"model": str(drafter)}, target) == alone
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "ignored" in caplog.text.lower() and caplog.text.count("\n") == 1


def test_a_plan_that_this_drafter_cannot_draft_is_refused(drafter, target, save, tmp_path):
    path = save(tmp_path / "p.json", "chain", [(1, 9, 60)])
    with pytest.raises(DrafterConfigError, match="num_speculative_tokens is 60"):
        parse({"model": str(drafter), "ctc_plan": str(path)}, target)


def test_a_scheduler_drafts_by_the_plan_and_what_it_counts_is_seen():
    class Scheduler:
        dynamic_sd_lookup = [0, 6, 6]
        counted: list[dict] = []

        def make_spec_decoding_stats(
            self, spec_decoding_stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
        ):
            self.counted.append({"drafted": num_draft_tokens, "accepted": num_accepted_tokens, "request": request_id})
            return "counts"

    scheduler = Scheduler()
    follow(scheduler, Plan("chain", CHAINS, {}, [Expected(1, 6, 4.0, 1.5)]))
    assert [scheduler.dynamic_sd_lookup[batch] for batch in (1, 2, 3, 5)] == [6, 6, 2, 0]
    for _ in range(2000):
        given = {"num_draft_tokens": 6, "num_accepted_tokens": 0, "num_invalid_spec_tokens": None, "request_id": "a"}
        assert scheduler.make_spec_decoding_stats(None, **given) == "counts"
    assert scheduler.counted == [{"drafted": 6, "accepted": 0, "request": "a"}] * 2000
    assert [scheduler.dynamic_sd_lookup[batch] for batch in (1, 2, 3, 5)] == [0, 6, 2, 0]  # one size was measured


@pytest.mark.parametrize(
    ("bound", "unbound", "expected"),
    [("auto", "4", None), ("0-3", "1", 4), ("0,2,5", "1", 3), ("0-1,4-7|8-15", "1", 6), ("nobind", "3", 3)],
)
def test_threads_that_the_environment_asks_for(bound, unbound, expected, monkeypatch):
    monkeypatch.setenv(threads.VARIABLE, bound)
    monkeypatch.setenv("OMP_NUM_THREADS", unbound)
    assert threads.threads_asked_for() == expected
