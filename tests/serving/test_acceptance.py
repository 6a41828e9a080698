"""Which rule is followed, what is refused of its settings, what is said of a window, and what vLLM is told."""

import logging
import math

import pytest

from vllm_ctc_spec.accept.exact import Exact
from vllm_ctc_spec.accept.fly import Fly
from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.serving import acceptance
from vllm_ctc_spec.serving.acceptance import Drafts, choose_rule, told_to_vllm

CHAIN, TREE = Drafts("chain", 8, None), Drafts("tree", 8, [(1, 1, 31), (2, 4, 15), (5, 2**20, 0)])
FLY = {"rejection_sample_method": "fly"}


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
    assert choose_rule(given, drafts) == choose_rule({}, drafts) == Exact()
    assert told_to_vllm(given, Exact(), drafts.kind) == given


@pytest.mark.parametrize("drafts", [CHAIN, TREE], ids=["chain", "tree"])
def test_the_settings_are_vllms_and_so_are_their_defaults(drafts, warnings):
    assert choose_rule(FLY, drafts) == Fly(6, 0.3, 3)
    assert choose_rule({**FLY, "fly_window_size": None}, drafts._replace(depth=4, schedule=None)) == Fly(3, 0.3, 3)
    given = {**FLY, "fly_window_size": 2, "fly_entropy_threshold": 1, "fly_entropy_top_k": 5}
    assert choose_rule(given, drafts) == Fly(2, 1, 5)
    assert choose_rule({**FLY, "fly_entropy_threshold": math.inf}, drafts).entropy_threshold == math.inf
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
        choose_rule(options, drafts)


def test_drafts_of_one_label_have_nothing_after_it():
    with pytest.raises(DrafterConfigError, match="drafts have one label here; set num_speculative_tokens to 2 or more"):
        choose_rule(FLY, CHAIN._replace(depth=1))
    with pytest.raises(DrafterConfigError, match="set num_speculative_tokens and ctc_tree_depth to 2"):
        choose_rule(FLY, TREE._replace(depth=1))


def test_a_window_that_no_chain_fills_is_refused_as_vllm_refuses_it():
    choose_rule({**FLY, "fly_window_size": 7}, CHAIN)
    with pytest.raises(DrafterConfigError, match="drafts of 8 labels never fill: fly_window_size 7 would do"):
        choose_rule({**FLY, "fly_window_size": 8}, CHAIN)


def test_a_window_that_no_tree_fills_is_said_with_the_number_that_would_do(warnings):
    assert choose_rule({**FLY, "fly_window_size": 7}, TREE) == Fly(7)
    assert warnings() == []
    assert choose_rule({**FLY, "fly_window_size": 8}, TREE) == Fly(8)
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
    choose_rule({**FLY, "fly_window_size": 4}, Drafts(kind, 8, schedule))
    assert len(warnings()) == (says is not None)
    assert all(says in said and said.endswith(".") for said in warnings())


@pytest.mark.parametrize("drafts", [CHAIN, TREE], ids=["chain", "tree"])
def test_vllm_is_told_where_it_applies_the_rule_itself(drafts, knows_fly):
    given = {"method": "ctc", "num_speculative_tokens": 8, **FLY, "fly_entropy_threshold": 0.7}
    rule = choose_rule(given, drafts)
    told = told_to_vllm(given, rule, drafts.kind)
    others = {"method": "ctc", "num_speculative_tokens": 8}
    its_own = {**FLY, "fly_window_size": 6, "fly_entropy_threshold": 0.7, "fly_entropy_top_k": 3}
    assert told == (others | its_own if knows_fly and drafts is CHAIN else others)
    assert given[acceptance.METHOD] == "fly"  # the user's own words stay


def test_sampled_chains_need_a_vllm_that_knows_the_rule(knows_fly):
    given = {**FLY, "draft_sample_method": "probabilistic"}
    if knows_fly:
        assert choose_rule(given, CHAIN) == Fly(6)
        return
    with pytest.raises(DrafterConfigError, match="of sampled drafts needs vLLM 0.33; set draft_sample_method"):
        choose_rule(given, CHAIN)
