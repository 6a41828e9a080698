"""Which rule is followed, what is refused of its settings, what is said of a window, and what vLLM is told."""

import functools
import json
import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_ctc_spec.accept.exact import Exact
from vllm_ctc_spec.accept.fly import Fly
from vllm_ctc_spec.accept.pivot import Pivot
from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.serving import acceptance
from vllm_ctc_spec.serving.acceptance import Drafts, choose_rule, told_to_vllm

from ..oracle.pivot import save_pivots

CHAIN, TREE = Drafts("chain", 8, None), Drafts("tree", 8, [(1, 1, 31), (2, 4, 15), (5, 2**20, 0)])
FLY = {"rejection_sample_method": "fly"}
TARGET = SimpleNamespace(model=str(Path(__file__).parents[2] / "assets/target"), get_hidden_size=lambda: HIDDEN)
HIDDEN = 192
rule_for = functools.partial(choose_rule, target=TARGET)


@pytest.fixture(params=[False, True], ids=["0.32", "0.33"])
def knows_fly(request, monkeypatch) -> bool:
    """vLLM before and since it has FLy."""
    monkeypatch.setattr(acceptance, "vllm_knows_fly", lambda: request.param)
    return request.param


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("drafts", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("method", [None, "standard", "block"])
def test_the_exact_rule_is_the_default(drafts, method):
    given = {"method": "ctc", "rejection_sample_method": method}
    assert rule_for(given, drafts) == rule_for({}, drafts) == Exact()
    assert told_to_vllm(given, Exact(), drafts.kind) == given


@pytest.mark.parametrize("drafts", [CHAIN, TREE], ids=["chain", "tree"])
def test_the_settings_are_vllms_and_so_are_their_defaults(drafts, warnings):
    assert rule_for(FLY, drafts) == Fly(6, 0.3, 3)
    assert rule_for({**FLY, "fly_window_size": None}, drafts._replace(depth=4, schedule=None)) == Fly(3, 0.3, 3)
    given = {**FLY, "fly_window_size": 2, "fly_entropy_threshold": 1, "fly_entropy_top_k": 5}
    assert rule_for(given, drafts) == Fly(2, 1, 5)
    assert rule_for({**FLY, "fly_entropy_threshold": math.inf}, drafts).entropy_threshold == math.inf
    assert warnings() == []


@pytest.mark.parametrize(("options", "says"), [
    ({"fly_window_size": 2}, 'fly_window_size is a setting of "rejection_sample_method": "fly"; add that'),
    ({**FLY, "fly_window_size": 0}, "fly_window_size must be a whole number, 1 or more, not 0"),
    ({**FLY, "fly_window_size": True}, "fly_window_size must be a whole number"),
    ({**FLY, "fly_window_size": 2.5}, "fly_window_size must be a whole number"),
    ({**FLY, "fly_entropy_top_k": "all"}, "fly_entropy_top_k must be a whole number, 1 or more, not 'all'"),
    ({**FLY, "fly_entropy_threshold": -1}, "fly_entropy_threshold must be a number of nats, 0 or more, not -1"),
    ({**FLY, "fly_entropy_threshold": math.nan}, "fly_entropy_threshold must be a number of nats"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("drafts", [CHAIN, TREE], ids=["chain", "tree"])
def test_settings_that_are_refused(drafts, options, says):
    with pytest.raises(DrafterConfigError, match=says):
        rule_for(options, drafts)


def test_drafts_of_one_label_have_nothing_after_it():
    with pytest.raises(DrafterConfigError, match="drafts have one label here; set num_speculative_tokens to 2 or more"):
        rule_for(FLY, CHAIN._replace(depth=1))
    with pytest.raises(DrafterConfigError, match="set num_speculative_tokens and ctc_tree_depth to 2"):
        rule_for(FLY, TREE._replace(depth=1))


def test_a_window_that_no_chain_fills_is_refused_as_vllm_refuses_it():
    rule_for({**FLY, "fly_window_size": 7}, CHAIN)
    with pytest.raises(DrafterConfigError, match="drafts of 8 labels never fill: fly_window_size 7 would do"):
        rule_for({**FLY, "fly_window_size": 8}, CHAIN)


def test_a_window_that_no_tree_fills_is_said_with_the_number_that_would_do(warnings):
    assert rule_for({**FLY, "fly_window_size": 7}, TREE) == Fly(7)
    assert warnings() == []
    assert rule_for({**FLY, "fly_window_size": 8}, TREE) == Fly(8)
    (said,) = warnings()
    assert "trees of depth 8 never fill" in said and "fly_window_size 7 would do" in said and said.endswith(".")


@pytest.mark.parametrize(("schedule", "says"), [
    ([(1, 2, 31), (3, 4, 15), (5, 2**20, 0)], None),
    ([(1, 2, 31), (3, 4, 3), (5, 2**20, 0)], "batches from 3 requests on never fill, since they have 3 tokens: fly_wi"),
    ([[1, 2, 31], [3, 4, 1]], "batches from 3 requests on never fill, since they have 1 tokens: no window would do"),
    ([(1, 2, 31), "a schedule that vLLM refuses"], None),
    ({"1-2": 31}, None),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_batches_whose_drafts_are_too_small_for_the_window_are_said(kind, schedule, says, warnings):
    rule_for({**FLY, "fly_window_size": 4}, Drafts(kind, 8, schedule))
    assert len(warnings()) == (says is not None)
    assert all(says in said and said.endswith(".") for said in warnings())


@pytest.mark.parametrize("drafts", [CHAIN, TREE], ids=["chain", "tree"])
def test_vllm_is_told_where_it_applies_the_rule_itself(drafts, knows_fly):
    given = {"method": "ctc", "num_speculative_tokens": 8, **FLY, "fly_entropy_threshold": 0.7}
    rule = rule_for(given, drafts)
    told = told_to_vllm(given, rule, drafts.kind)
    others = {"method": "ctc", "num_speculative_tokens": 8}
    its_own = {**FLY, "fly_window_size": 6, "fly_entropy_threshold": 0.7, "fly_entropy_top_k": 3}
    assert told == (others | its_own if knows_fly and drafts is CHAIN else others)
    assert given[acceptance.METHOD] == "fly"  # the user's own words stay


def test_sampled_chains_need_a_vllm_that_knows_the_rule(knows_fly):
    given = {**FLY, "draft_sample_method": "probabilistic"}
    if knows_fly:
        assert rule_for(given, CHAIN) == Fly(6)
        return
    with pytest.raises(DrafterConfigError, match="of sampled drafts needs vLLM 0.33; set draft_sample_method"):
        rule_for(given, CHAIN)


@pytest.fixture(scope="module")
def pivots(tmp_path_factory) -> Path:
    return save_pivots(tmp_path_factory.mktemp("pivots"), TARGET.model, HIDDEN)


@pytest.mark.parametrize("drafts", [CHAIN, TREE], ids=["chain", "tree"])
def test_pivots_are_asked_for_by_name(drafts, pivots):
    given = {"ctc_acceptance": "pivot", "ctc_pivots": str(pivots)}
    rule = rule_for(given, drafts)
    assert isinstance(rule, Pivot) and rule.threshold == 0.3 and rule.min_probability == 1e-4
    assert torch.equal(rule.classifier.out, load_file(pivots / "pivots.safetensors")["out"])
    given |= {"ctc_pivot_threshold": 0.7, "rejection_sample_method": "standard"}
    assert rule_for(given, drafts).threshold == 0.7
    assert told_to_vllm({"method": "ctc"}, rule, drafts.kind) == {"method": "ctc"}


@pytest.mark.parametrize(("options", "says"), [
    ({"ctc_acceptance": None}, 'ctc_pivots is a setting of "ctc_acceptance": "pivot"; add that'),
    ({"ctc_acceptance": None, "ctc_pivots": None, "ctc_pivot_threshold": 0.3}, "ctc_pivot_threshold is a setting of"),
    ({"ctc_acceptance": "fly"}, 'ctc_acceptance must be "pivot", not \'fly\'; leave it out for exact'),
    (FLY, "are two rules of acceptance; remove one"),
    ({"rejection_sample_method": "block"}, "are two rules of acceptance; remove one"),
    ({"draft_sample_method": "probabilistic"}, "needs drafts that are not sampled; remove draft_sample_method"),
    ({"ctc_pivots": None}, 'needs "ctc_pivots", the folder that `vllm-ctc pivots` wrote'),
    ({"ctc_pivots": 3}, "ctc_pivots is 3; give the folder"),
    ({"ctc_pivots": "/does/not/exist"}, "is no folder of `vllm-ctc pivots` .FileNotFoundError.; give the one"),
    *(
        ({"ctc_pivot_threshold": value}, "ctc_pivot_threshold must be a number between 0 and 1, not")
        for value in (0, 1, -0.1, 1.5, math.nan, True, "0.3")
    ),
], ids=str)  # fmt: skip
def test_settings_of_pivots_that_are_refused(options, says, pivots):
    given = {"ctc_acceptance": "pivot", "ctc_pivots": str(pivots), **options}
    with pytest.raises(DrafterConfigError, match=says) as refused:
        rule_for(given, CHAIN)
    assert str(refused.value).endswith(".")


def test_pivots_of_another_target_are_refused(pivots, tmp_path):
    given = {"ctc_acceptance": "pivot", "ctc_pivots": str(pivots)}
    larger = SimpleNamespace(model=TARGET.model, get_hidden_size=lambda: 256)
    with pytest.raises(DrafterConfigError, match="reads states of the hidden size 192, and the target has 256; train"):
        choose_rule(given, TREE, larger)
    hub = SimpleNamespace(model="a/name", get_hidden_size=lambda: HIDDEN)
    with pytest.raises(DrafterConfigError, match="compared with a target in a folder only, and a/name is none"):
        choose_rule(given, TREE, hub)
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    other = SimpleNamespace(model=str(tmp_path), get_hidden_size=lambda: HIDDEN)
    with pytest.raises(DrafterConfigError, match="was trained for another target .weights [0-9a-f]{16}, not [0-9a-f]"):
        choose_rule(given, TREE, other)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DrafterConfigError, match="The weights in .* cannot be read"):
        choose_rule(given, TREE, other)


@pytest.mark.parametrize(("parts", "record", "says"), [
    ({"out": torch.ones(3, dtype=torch.float64)}, {}, "not finite numbers in torch.float32"),
    ({"out": torch.tensor([1.0, math.nan, 0])}, {}, "not finite numbers in torch.float32"),
    ({"out": torch.ones(4)}, {}, "tensors of the shapes .* make no classifier"),
    ({"hidden": torch.tensor(1.0)}, {}, "tensors of the shapes .* make no classifier"),
    ({"hidden": torch.ones(5000, 194)}, {}, "tensors of the shapes .* make no classifier"),
    ({"more": torch.ones(1)}, {}, "holds the tensors .* not"),
    ({}, {"min_probability": 0.0}, "min_probability 0.0; write it again"),
    ({}, {"min_probability": "0.1"}, "min_probability '0.1'"),
    ({}, {"target_weights": 3}, "target_weights 3"),
], ids=str)  # fmt: skip
def test_broken_classifiers_are_refused(pivots, tmp_path, parts, record, says):
    folder = shutil.copytree(pivots, tmp_path / "broken")
    save_file({**load_file(pivots / "pivots.safetensors"), **parts}, folder / "pivots.safetensors")
    known = json.loads((pivots / "pivots.json").read_text())
    (folder / "pivots.json").write_text(json.dumps({**known, **record}))
    with pytest.raises(DrafterConfigError, match=says):
        rule_for({"ctc_acceptance": "pivot", "ctc_pivots": str(folder)}, CHAIN)


@pytest.mark.parametrize("change", [
    lambda f: (f / "pivots.json").write_text("{"), lambda f: (f / "pivots.json").write_text("[]"),
    lambda f: (f / "pivots.json").write_text("{}"), lambda f: (f / "pivots.safetensors").write_bytes(b"no tensors" * 9),
    lambda f: (f / "pivots.safetensors").unlink(),
])  # fmt: skip
def test_folders_that_hold_no_classifier_are_refused(pivots, tmp_path, change):
    folder = shutil.copytree(pivots, tmp_path / "broken")
    change(folder)
    with pytest.raises(DrafterConfigError, match="is no folder of `vllm-ctc pivots`"):
        rule_for({"ctc_acceptance": "pivot", "ctc_pivots": str(folder)}, CHAIN)


def test_rules_of_other_weights_differ(pivots, tmp_path):
    """vLLM names a configuration by what it says of itself."""
    given = {"ctc_acceptance": "pivot", "ctc_pivots": str(pivots)}
    other = save_pivots(tmp_path / "other", TARGET.model, HIDDEN, out_bias=1.0)
    assert rule_for(given, TREE) == rule_for(given, TREE)
    assert rule_for(given, TREE) != rule_for({**given, "ctc_pivots": str(other)}, TREE)
