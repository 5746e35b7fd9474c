"""Levels are presets of fields; whatever cannot mean anything is refused with a text that helps."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest

from hf_actnn import ActNNConfig
from hf_actnn.errors import ActNNError, ConfigError


@pytest.mark.parametrize(
    "fields, bits, exact_norms",
    [
        ({"level": "L0"}, None, True),
        ({"level": "L1"}, 4, True),
        ({"level": "L2"}, 4, False),
        ({}, 4, False),  # what `bits="auto"` begins with
        ({"level": "L4"}, 2, False),
        ({"level": "L5"}, 2, False),
        ({"level": "L1", "bits": 2}, 2, True),  # a field beside a level replaces that field alone
        ({"level": "L2", "exact_norms": True}, 4, True),
        ({"level": "L1", "exact_norms": False}, 4, False),
        ({"level": "L0", "bits": 8}, 8, False),  # L0 asks for nothing of norms that were compressed
        *[({"bits": bits}, bits, False) for bits in range(1, 9)],
    ],
)
def test_levels_are_presets(fields, bits, exact_norms):
    config = ActNNConfig(**fields)
    assert (config.effective_bits, config.effective_exact_norms) == (bits, exact_norms)


@pytest.mark.parametrize(
    "fields, swaps, arena",
    [
        *[({"level": level}, False, False) for level in ("L0", "L1", "L2", "L2.5", "L3")],
        ({}, False, False),
        ({"bits": "auto"}, False, False),
        ({"level": "L4"}, True, False),
        ({"level": "L5"}, True, True),
        ({"level": "L5", "swap": False}, False, True),
        ({"level": "L5", "arena": False}, True, False),
        ({"level": "L0", "swap": True}, True, False),
        ({"bits": 4, "swap": True, "arena": True}, True, True),
    ],
)
def test_where_what_is_kept_waits(fields, swaps, arena):
    config = ActNNConfig(**fields)
    assert (config.swaps, config.uses_arena) == (swaps, arena)


def test_l4_and_l5_choose_bits_as_l3_does():
    for level in ("L4", "L5"):
        config = ActNNConfig(level=level)
        assert config.chooses_per_sample and config.chooses_per_tensor
        assert ActNNConfig(level=level, bits=3.5, overrides={"a": (2, 6)}).is_adaptive


BAD = {
    "unknown level": (
        {"level": "L7"},
        ConfigError,
        ["unknown level", "L0, L1, L2, L2.5, L3, L4, L5", "'L7'", "bits=2"],
    ),
    "level that is no text": ({"level": 2}, ConfigError, ["unknown level", "Received 2", "bits=2"]),
    "0 bits": ({"bits": 0}, ConfigError, ["at bits", "from 1 to 8", "Received 0", "the safe one"]),
    "9 bits": ({"bits": 9}, ConfigError, ["at bits", "from 1 to 8", "Received 9"]),
    "minus one bit": ({"bits": -1}, ConfigError, ["from 1 to 8", "Received -1"]),
    "bits as text": ({"bits": "4"}, ConfigError, ["from 1 to 8", "'4'"]),
    "bits as truth": ({"bits": True}, ConfigError, ["from 1 to 8", "True"]),
    "bits not a number": ({"bits": float("nan")}, ConfigError, ["from 1 to 8", "nan"]),
    "2.5 bits": ({"level": "L2", "bits": 2.5}, ConfigError, ["is an average", "2.5", "level='L3'", "round it"]),
    "auto with a typing error": ({"bits": "Auto"}, ConfigError, ["from 1 to 8 or 'auto'", "'Auto'"]),
    "9.5 bits on average": ({"level": "L3", "bits": 9.5}, ConfigError, ["from 1 to 8", "9.5"]),
    "a target beside bits": (
        {"bits": 2, "max_added_variance": 0.1},
        ConfigError,
        ["`max_added_variance`", 'bits="auto" beside it', "bits=2"],
    ),
    "a target for all tensors alike": (
        {"bits": "auto", "per_tensor": False},
        ConfigError,
        ["chosen per kept tensor", "per_tensor", "Leave per_tensor out"],
    ),
    "a target of nothing": ({"bits": "auto", "max_added_variance": 0}, ConfigError, ["out of range", "above 0", "0.1"]),
    "a range at a fixed level": (
        {"level": "L2", "overrides": {"a": (2, 6)}},
        ConfigError,
        ["overrides['a']", "not chosen", "(2, 6)", "level='L3'"],
    ),
    "a range the wrong way": (
        {"level": "L3", "overrides": {"a": (6, 2)}},
        ConfigError,
        ["overrides['a']", "(fewest, most)", "(6, 2)"],
    ),
    "per_sample": ({"per_sample": 1}, ConfigError, ["`per_sample`", "True, False or None", "Received 1"]),
    "half a bit": ({"bits": 0.5}, ConfigError, ["no allocation can meet", "at least one bit", "0.5", "1 bit or more"]),
    "override out of range": ({"overrides": {"a.*": 9}}, ConfigError, ["overrides['a.*']", "or 'exact'", "Received 9"]),
    "override of a word": ({"overrides": {"a": "full"}}, ConfigError, ["overrides['a']", "or 'exact'", "'full'"]),
    "overrides that are no mapping": ({"overrides": ["a"]}, ConfigError, ["`overrides`", "mapping", "['a']"]),
    "skip as one text": ({"skip": "classifier"}, ConfigError, ["`skip`", '("classifier",)', "Wrap"]),
    "skip of nothing": ({"skip": None}, ConfigError, ["`skip`", "None", "Wrap"]),
    "skip of a number": ({"skip": 5}, ConfigError, ["`skip`", "5", "Wrap"]),
    "overrides of numbers": ({"overrides": {1: 2}}, ConfigError, ["`overrides`", "{1: 2}"]),
    "skip of numbers": ({"skip": (1,)}, ConfigError, ["`skip`", "(1,)"]),
    "group of nothing": ({"group_size": 0}, ConfigError, ["`group_size`", "from 1 to 4096", "Received 0"]),
    "group too large": ({"group_size": 5000}, ConfigError, ["`group_size`", "from 1 to 4096", "Received 5000"]),
    "negative seed": ({"seed": -1}, ConfigError, ["`seed`", "Received -1"]),
    "negative min_numel": ({"min_numel": -1}, ConfigError, ["`min_numel`", "Received -1"]),
    "exact_norms": ({"exact_norms": 1}, ConfigError, ["`exact_norms`", "True, False or None", "Received 1"]),
    "no interval": ({"update_interval": 0}, ConfigError, ["`update_interval`", "from 1", "Received 0"]),
    "swap": ({"swap": "cpu"}, ConfigError, ["`swap`", "True, False or None", "'cpu'"]),
    "arena": ({"arena": 1}, ConfigError, ["`arena`", "True, False or None", "Received 1"]),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    fields, error, texts = BAD[name]
    with pytest.raises(error) as caught:
        ActNNConfig(**fields)
    assert isinstance(caught.value, ActNNError)
    text = str(caught.value)
    for part in [*texts, "Expected", "Received"]:
        assert part in text, text
    assert text.endswith((".", ")")) and ".." not in text


def test_frozen_and_independent():
    overrides = {"a": 2}
    config = ActNNConfig(overrides=overrides, skip=["b"])
    overrides["a"] = 8
    assert config.overrides == {"a": 2} and config.skip == ("b",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 3
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


FULL = ActNNConfig(
    level="L1",
    bits=3,
    group_size=128,
    skip=("a.*",),
    overrides={"b": 8, "c": "exact"},
    seed=7,
    min_numel=5,
    exact_norms=False,
    swap=True,
    arena=False,
)


@pytest.mark.parametrize("config", [ActNNConfig(), FULL], ids=["default", "full"])
def test_json_both_ways(config, tmp_path: Path):
    file = tmp_path / "actnn.json"
    file.write_text(config.to_json_string())
    assert ActNNConfig.from_json_file(file) == config
    assert ActNNConfig.from_dict(json.loads(config.to_json_string())) == config
    assert ActNNConfig.from_dict(config.to_dict()) == config
    for given in (config, config.to_dict(), file, str(file)):
        assert ActNNConfig.resolve(given) == config


def test_json_errors_name_the_file(tmp_path: Path):
    file = tmp_path / "actnn.json"
    cases = [
        ('{"bits": 2, "bitz": 3}', ["'bitz'", "bits", "correct its spelling"]),
        ("{", ["not JSON", "to_json_string"]),
        ("[1]", ["not a mapping", "list"]),
        ('{"bits": 9}', ["from 1 to 8", "Received 9"]),
    ]
    for text, parts in cases:
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            ActNNConfig.from_json_file(file)
        for part in parts if "from 1 to 8" in parts else [*parts, str(file)]:
            assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot be read.*nowhere\.json.*Check the path"):
        ActNNConfig.resolve(str(tmp_path / "nowhere.json"))


def test_resolve():
    assert ActNNConfig.resolve(None) == ActNNConfig()
    assert ActNNConfig.resolve("L1") == ActNNConfig(level="L1")
    assert ActNNConfig.resolve({"bits": 2}) == ActNNConfig(bits=2)
    with pytest.raises(ConfigError, match=r"not a configuration.*Received int 2.*bits=2"):
        ActNNConfig.resolve(2)


def test_replace():
    config = ActNNConfig(level="L1")
    assert config.replace(bits=2) == ActNNConfig(level="L1", bits=2)
    with pytest.raises(ConfigError, match=r"'bitz'.*keyword arguments"):
        config.replace(bitz=2)
    with pytest.raises(ConfigError, match="from 1 to 8"):
        config.replace(bits=0)


def test_what_nobody_named_follows_from_the_rest_for_good():
    """However often fields are replaced, and from JSON too."""
    config = ActNNConfig().replace(seed=3)
    assert (config.level, config.bits) == ("L3", "auto")
    for kept in (config, config.replace(seed=3), ActNNConfig.from_dict(config.to_dict())):
        assert kept == config
        assert (kept.replace(level="L2").bits, kept.replace(level="L2").effective_bits) == (None, 4)
        assert (kept.replace(bits=2).level, kept.replace(bits=2).is_adaptive) == ("L2", False)
    assert config.to_dict().keys().isdisjoint({"level", "bits"})
    assert ActNNConfig(level="L3", bits="auto").replace(level="L2").bits == "auto"  # named


def test_a_choice_alone_leaves_the_target():
    assert ActNNConfig(per_sample=False).bits == "auto"
    assert ActNNConfig(max_added_variance=0.02).allowed_variance == 0.02


def test_auto_as_a_level_is_what_nobody_naming_one_gets():
    config = ActNNConfig("auto")
    assert config == ActNNConfig() and config.bits == "auto"
    assert config.replace(level="L2") == ActNNConfig("L2")
    assert ActNNConfig("L3").replace(level="auto") == ActNNConfig.resolve("auto") == config
    assert ActNNConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="Leave `bits` out"):
        ActNNConfig("auto", bits=3)
    with pytest.raises(ConfigError, match="Did you mean 'L3'"):
        ActNNConfig("l3")
