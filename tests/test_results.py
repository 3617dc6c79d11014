"""Result files: the schema keeps out what is not a measured number, and a file is written whole or not at all."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from hybrid_models.results import metric, read_all, result, this_command, weights_sha256, write


def one(**fields):
    return result("lm", "nano-GLA-pure", "python -m evaluation.lm x", [metric("held-out", "loss_nats", 2.5)], **fields)


def test_round_trip(tmp_path):
    written = one(seeds=[3], protocol={"length": 128})
    path = write(written, tmp_path, label="short")
    assert path == tmp_path / "nano-GLA-pure" / "lm-short.json"
    assert list(read_all(tmp_path)) == [(path, written)]
    assert written["versions"]["torch"] == torch.__version__ and written["commit"]


def test_a_second_run_replaces_the_file_and_leaves_nothing_else(tmp_path):
    write(one(), tmp_path)
    write(one(seeds=[1]), tmp_path)
    [(path, found)] = read_all(tmp_path)
    assert found["seeds"] == [1] and [p.name for p in path.parent.iterdir()] == ["lm.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = write(one(), tmp_path)
    with pytest.raises(ValueError):
        write(one(details={"loss": math.nan}), tmp_path)
    assert json.loads(path.read_text())["details"] == {}
    assert [p.name for p in path.parent.iterdir()] == ["lm.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, True])
def test_only_finite_numbers_are_metrics(value):
    with pytest.raises(ValueError, match="held-out loss"):
        metric("held-out", "loss", value)


@pytest.mark.parametrize("text, message", [("{", "not JSON"), ("{}", "lacks command"), ("[]", "lacks command")])
def test_what_is_not_a_result_is_named(tmp_path, text, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "lm.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_all(tmp_path))


def test_another_schema_is_refused(tmp_path):
    path = write(one(), tmp_path)
    path.write_text(json.dumps({**one(), "schema": 99}))
    with pytest.raises(ValueError, match="schema 99"):
        list(read_all(tmp_path))


def test_weights_digest_sees_contents_and_names(tmp_path):
    assert weights_sha256(tmp_path) is None
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    first = weights_sha256(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    second = weights_sha256(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    assert len({first, second, weights_sha256(tmp_path)}) == 3


def test_the_command_can_be_pasted():
    assert this_command("evaluation.lm", ["a b", "--n", "1"]) == "python -m evaluation.lm 'a b' --n 1"
