"""Validation of the two configs, and the round trip of `s2t_config.json`."""

import json
import re

import pytest

from transformers_s2t import FusionWeights, S2TDecodingConfig, SelectorConfig
from transformers_s2t.config import THRESHOLD_TRIGGERS, TRIGGERS


IDS = (90, 91, 92, 93)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_candidates", 0),
        ("num_candidates", 80),
        ("num_candidates", 8.0),
        ("num_candidates", True),
        ("num_candidates", "8"),
        ("min_prob_ratio", -0.1),
        ("min_prob_ratio", 1.5),
        ("min_prob_ratio", float("nan")),
        ("trigger_top_k", 1),
        ("warmup_tokens", -1),
        ("warmup_tokens", 2.5),
        ("trigger", "sometimes"),
        ("trigger", None),
    ],
)
def test_a_decoding_value_out_of_range_is_named_with_its_argument(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be .*{re.escape(repr(value))}"):
        S2TDecodingConfig(**{argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "shown"),
    [
        ("target_rate", 0, "got 0"),
        ("target_rate", 1.01, "got 1.01"),
        ("target_rate", -0.5, "got -0.5"),
        ("target_rate", True, "got True"),
        ("threshold", "high", "got 'high'"),
        ("threshold", float("nan"), "got nan"),
        ("threshold", True, "got True"),
    ],
)
def test_a_rate_or_threshold_out_of_range_is_named(argument, value, shown):
    with pytest.raises(ValueError, match=f"`{argument}` must be .*{re.escape(shown)}"):
        S2TDecodingConfig(trigger="entropy", **{argument: value})


@pytest.mark.parametrize("trigger", sorted(set(TRIGGERS) - set(THRESHOLD_TRIGGERS)))
@pytest.mark.parametrize("argument", ["threshold", "target_rate"])
def test_a_trigger_without_a_threshold_takes_none(trigger, argument):
    with pytest.raises(ValueError, match=f"trigger='{trigger}' takes neither"):
        S2TDecodingConfig(trigger=trigger, **{argument: 0.5})


def test_the_edges_of_the_ranges_are_legal():
    config = S2TDecodingConfig(num_candidates=64, min_prob_ratio=1, warmup_tokens=0, trigger_top_k=2)
    assert (config.num_candidates, config.min_prob_ratio) == (64, 1)
    assert S2TDecodingConfig(trigger="random", target_rate=1).resolve_threshold(None) == 0.0


def test_a_config_cannot_be_changed_after_it_was_validated():
    with pytest.raises(AttributeError):
        S2TDecodingConfig().num_candidates = 80


@pytest.mark.parametrize("trigger", ["always", "never"])
def test_no_threshold_is_resolved_for_triggers_that_have_none(trigger):
    assert S2TDecodingConfig(trigger=trigger).resolve_threshold({trigger: {0.1: 3.0}}) is None


def test_the_threshold_given_wins_over_the_rate():
    config = S2TDecodingConfig(trigger="kl", threshold=1, target_rate=0.1)
    assert config.resolve_threshold({"kl": {0.1: 3.0}}) == 1.0


def test_the_calibrated_threshold_of_the_rate_is_found():
    config = S2TDecodingConfig(trigger="entropy", target_rate=0.1)
    assert config.resolve_threshold({"entropy": {0.05: 4.0, 0.1: 3.0}, "kl": {0.1: 9.0}}) == 3.0


def test_random_needs_a_rate_but_no_calibration():
    assert S2TDecodingConfig(trigger="random", target_rate=0.25).resolve_threshold(None) == 0.75
    with pytest.raises(ValueError, match="target_rate"):
        S2TDecodingConfig(trigger="random").resolve_threshold(None)


@pytest.mark.parametrize("trigger", ["entropy", "margin", "kl"])
@pytest.mark.parametrize("table", [None, {}, {"other": {0.1: 3.0}}])
def test_a_trigger_that_was_never_calibrated_names_the_command_that_does_it(trigger, table):
    for config in (S2TDecodingConfig(trigger=trigger), S2TDecodingConfig(trigger=trigger, target_rate=0.1)):
        with pytest.raises(ValueError, match=rf"trigger='{trigger}'.*none.*s2t calibrate"):
            config.resolve_threshold(table)


def test_a_rate_that_was_not_calibrated_names_the_ones_that_were():
    config = S2TDecodingConfig(trigger="entropy", target_rate=0.2)
    with pytest.raises(ValueError, match=r"target_rate=0\.2 \(calibrated: 0\.05, 0\.1\).*s2t calibrate"):
        config.resolve_threshold({"entropy": {0.1: 3.0, 0.05: 4.0}})


def test_fusion_weights_come_from_numbers_mappings_and_themselves():
    expected = FusionWeights(1.0, 0.5, -0.2)
    assert FusionWeights.from_any((1.0, 0.5, -0.2)) == expected
    assert FusionWeights.from_any({"selector": 1.0, "logprob": 0.5, "switch": -0.2}) == expected
    assert FusionWeights.from_any(expected) is expected
    assert FusionWeights.from_any([2]) == FusionWeights(2, 0.0, 0.0, 0.0)
    assert FusionWeights.from_any((1.0, 0.5, -0.2, 0.7)) == FusionWeights(1.0, 0.5, -0.2, router=0.7)
    assert S2TDecodingConfig(fusion=(1.0, 0.5, -0.2)).fusion == expected
    assert SelectorConfig(IDS, fusion={"logprob": 0.5, "switch": -0.2}).fusion == expected


@pytest.mark.parametrize("name", ["selector", "logprob", "switch", "router"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True])
def test_a_fusion_weight_that_is_no_finite_number_is_named(name, value):
    with pytest.raises(ValueError, match=rf"`fusion\.{name}` must be a finite number, got {re.escape(repr(value))}"):
        FusionWeights(**{name: value})


@pytest.mark.parametrize("value", [(), (1, 2, 3, 4, 5), "paper", 1.0, {"bias": 1.0}])
def test_fusion_of_another_form_is_an_error(value):
    with pytest.raises(ValueError, match="`fusion`"):
        S2TDecodingConfig(fusion=value)


@pytest.mark.parametrize("ids", [(), (5,), (5, 5), (5, -1)])
def test_reserved_ids_must_be_two_or_more_different_ids(ids):
    with pytest.raises(ValueError, match=rf"`reserved_token_ids` must .*got {re.escape(repr(ids))}"):
        SelectorConfig(reserved_token_ids=ids)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("adapter_scope", "prefix"),
        ("proposals", "both"),
        ("score_head", "softmax"),
        ("num_candidates", 65),
        ("min_prob_ratio", 2.0),
    ],
)
def test_a_selector_value_out_of_range_is_named_with_its_argument(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be .*{re.escape(repr(value))}"):
        SelectorConfig(IDS, **{argument: value})


def test_adapted_proposals_need_the_sequence_scope():
    with pytest.raises(ValueError, match="adapter_scope='sequence'"):
        SelectorConfig(IDS, proposals="adapted")
    assert SelectorConfig(IDS, adapter_scope="sequence", proposals="adapted").proposals == "adapted"


def full_config(**changes):
    settings = {
        "reserved_token_ids": IDS,
        "adapter_scope": "sequence",
        "proposals": "adapted",
        "score_head": "linear",
        "num_candidates": 4,
        "min_prob_ratio": 0.1,
        "thresholds": {"entropy": {0.01: 3.25, 0.1: 1.5}, "margin": {0.05: -0.125}},
        "fusion": FusionWeights(1.0, 0.3, -0.1, 0.4),
        "base_model": "tiny/ä",
        "teacher_model": "big",
        "vocab_hash": "0123456789abcdef",
        "metrics": {"agree_at_1": 0.7},
    }
    return SelectorConfig(**(settings | changes))


def test_a_selector_config_survives_the_round_trip(tmp_path):
    config = full_config()
    file = config.save_pretrained(tmp_path / "new" / "folder")
    assert file.name == "s2t_config.json"
    assert SelectorConfig.from_pretrained(file.parent) == config
    assert [path.name for path in file.parent.iterdir()] == ["s2t_config.json"], "a temporary file was left behind"


def test_the_defaults_survive_the_round_trip(tmp_path):
    config = SelectorConfig(list(IDS))
    config.save_pretrained(tmp_path)
    assert SelectorConfig.from_pretrained(tmp_path) == config


def test_a_threshold_of_a_rate_with_many_digits_survives_the_round_trip(tmp_path):
    rate = 0.0123456789
    full_config(thresholds={"entropy": {rate: 2.0}}).save_pretrained(tmp_path)
    thresholds = SelectorConfig.from_pretrained(tmp_path).thresholds
    assert S2TDecodingConfig(trigger="entropy", target_rate=rate).resolve_threshold(thresholds) == 2.0


def test_an_unknown_field_is_an_error_that_names_it(tmp_path):
    file = full_config().save_pretrained(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rooter": 1}))
    with pytest.raises(ValueError, match="unknown fields.*rooter"):
        SelectorConfig.from_pretrained(tmp_path)


def test_an_illegal_field_in_the_file_is_an_error(tmp_path):
    file = full_config().save_pretrained(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_candidates": 100}))
    with pytest.raises(ValueError, match="`num_candidates` must be"):
        SelectorConfig.from_pretrained(tmp_path)


def test_a_file_without_reserved_ids_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "s2t_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"s2t_config\.json.*reserved_token_ids"):
        SelectorConfig.from_pretrained(tmp_path)


def test_a_folder_without_the_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path))} holds no s2t_config.json"):
        SelectorConfig.from_pretrained(tmp_path)


def test_a_path_that_is_nothing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a local folder nor a Hub repository"):
        SelectorConfig.from_pretrained(str(tmp_path / "missing"))


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    full_config().save_pretrained(tmp_path)
    with pytest.raises(TypeError):
        full_config(metrics={"agree_at_1": object()}).save_pretrained(tmp_path)
    assert SelectorConfig.from_pretrained(tmp_path) == full_config()
    assert len(list(tmp_path.iterdir())) == 1
