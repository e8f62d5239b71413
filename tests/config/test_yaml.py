"""YAML as configurations want it: version 1.2's scalars, bounds, errors with their places, and dumps that read back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from starling.orchestrator.config.schema import parse
from starling.orchestrator.config.yaml_io import read, split
from starling.orchestrator.config.yaml_loader import Loader, dump
from starling.orchestrator.errors import ConfigError
from tests.config_mutations import BOMB


def loaded(text: str) -> object:
    return yaml.load(text, Loader)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("0123", 123), ("-07", -7), ("1_000", 1000), ("0x1f", 31), ("0o17", 15), ("+3", 3),
        ("1e-3", 0.001), ("1.", 1.0), (".5", 0.5), ("-.inf", float("-inf")), ("1_0.5", 10.5),
        ("no", "no"), ("Yes", "Yes"), ("on", "on"), ("true", True), ("FALSE", False), ("~", None), ("", None),
        ("2024-01-01", "2024-01-01"), ("2024-13-01", "2024-13-01"), ("1:30", "1:30"), ("25:61:00", "25:61:00"),
        ("0x", "0x"), ("²", "²"), ("0b11", "0b11"), ("<<", "<<"), ("=", "="), ("'7'", "7"), ("!!str 7", "7"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object):
    assert loaded(text) == value
    assert type(loaded(text)) is type(value)


def test_sections_are_shared_by_aliases_and_merges():
    text = "base: &b {lr: 0.5, momentum: 0.9}\nown:\n  <<: *b\n  lr: 0.7\nboth: {<<: [{a: 1}, {a: 2, b: 3}]}\n"
    data = loaded(text)
    assert isinstance(data, dict)
    assert data["own"] == {"lr": 0.7, "momentum": 0.9}
    assert data["both"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 6, column 5: .*more than 50,000 values, with each alias unfolded"),
        ("a: &a [*a]", "line 1, column 4: .*an alias stands inside of what it names"),
        ("a: " + "[" * 500 + "]" * 500, "line 1, column 53: .*more than 50 levels"),
        ("[" * 100_000, "more than 50 levels"),
        ("a:\n  b: !!bool maybe", "line 2, column 6: .*'maybe' cannot be read as bool; put it in quotes"),
        ("a: !!float abc", "line 1, column 4: .*'abc' cannot be read as float"),
        ("a: !!int x", "'x' cannot be read as int"),
        ("a: " + "9" * 5000, "line 1, column 4: .*99…' cannot be read as int"),
        ("a: " + "9" * 25, "is too large for a number"),
        ("a: !!set {x}", "line 1, column 4: .*the tag 'tag:yaml.org,2002:set' has no place here"),
        ("a: !!python/object:os.system x", "has no place here"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: .*'a' is there twice"),
        ("a: *b", "line 1, column 4: .*undefined alias"),
        ("a: \0", "special characters are not allowed"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: " + "x" * 300_000, "it is larger than 256 kB"),
        ("- a", "must be a mapping of keys .* it is a list"),
    ],
    ids=lambda value: value[:20] if len(value) < 100 else "long",
)
def test_an_error_is_one_line_with_its_place(text: str, message: str, tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path: Path):
    os.mkfifo(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="it is no file"):
        read(tmp_path / "c.yaml")


def test_an_override_has_the_same_bounds():
    assert split("a=010") == (("a",), 10)
    assert split("a=[") == (("a",), "[")
    for text in ("a=" + "[" * 200 + "]" * 200, ".".join("a" * 60) + "=1", "a=" + "x" * 300_000, "=3", "a..b=1"):
        with pytest.raises(ConfigError, match="--set"):
            split(text)


def test_a_mapping_that_holds_itself_is_refused():
    raw: dict[str, object] = {"algorithm": "fedavg", "task": "digits"}
    raw["data"] = raw
    with pytest.raises(ConfigError, match="config: has more than 50 levels"):
        parse(raw)


def test_at_most_ten_lines_are_said():
    with pytest.raises(ConfigError) as caught:
        parse({"algorithm": "fedavg", "task": "digits", **{f"key{number}": 1 for number in range(40)}})
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1]) == (10, "config: … and 31 more of these")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), PLAIN, max_size=5))
def test_what_is_dumped_is_loaded_again(data: dict[str, object]):
    assert loaded(dump(data)) == data


@pytest.mark.parametrize(
    "text", ["010", "1e3", "0o17", "no", "2024-01-01", "1:30", "<<", "=", "~", "0x1f", ".5", "null"]
)
def test_texts_that_look_like_something_else_are_quoted(text: str):
    assert loaded(dump({"a": text})) == {"a": text}
    assert yaml.safe_load(dump({"a": text})) == {"a": text}
