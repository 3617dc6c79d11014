"""The recipes are complete, say what the paper states and what it does not, and the committed file is theirs."""

from __future__ import annotations

import json

import pytest
import torch

from hybrid_models import HybridLinearForCausalLM
from hybrid_models.suite import cell_config, cell_names
from training import recipes
from training.recipes import RECORDS, main, recipe, records

# What the paper gives (and the tokenizer's and optimiser's place among it); everything else is somebody's assumption.
STATED = {"dataset", "tokens", "batch_tokens", "sequence_length", "optimizer", "schedule"}


@pytest.fixture(scope="module")
def all_records():
    return list(records())


def test_the_committed_file_is_up_to_date(all_records, monkeypatch, capsys):
    lines = RECORDS.read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(all_records))
    assert all(line == json.dumps(json.loads(line), sort_keys=True) for line in lines)
    monkeypatch.setattr(recipes, "records", lambda: iter(all_records))
    assert main(["--check"]) == 0
    monkeypatch.setitem(recipes.PAPER, "learning_rate", recipes.Value(1e-3, "assumed", "test"))
    monkeypatch.setattr(recipes, "records", lambda: iter([recipes.record("340M-20B-GLA-pure"), *all_records[1:]]))
    assert main(["--check"]) == 1
    assert "--write" in capsys.readouterr().out


def test_all_cells_of_both_suites_in_order(all_records):
    expected = [name for size in ("340M-20B", "1.3B-100B", "nano-7M", "nano-22M") for name in cell_names(size)]
    assert [one["cell"] for one in all_records] == expected
    assert [one["suite"] for one in all_records] == ["paper"] * 72 + ["nano"] * 72
    full = [one["seed"] for one in all_records if one["level"] == "full"]
    assert full == [1, 2, 3, 4, 5, 6] * 4
    assert {one["mixer"] for one in all_records if one["level"] == "full"} == {None}


def test_what_the_paper_states_is_told_from_what_is_assumed(all_records):
    for one in all_records:
        stated = {name for name, value in one["recipe"].items() if value["source"] == "stated"}
        assert stated == (STATED if one["suite"] == "paper" else set())
        assert all(value["where"] for value in one["recipe"].values())
        for name in ("tokens", "sequence_length", "batch_tokens", "seed"):
            assert one[name] == one["recipe"][name]["value"]
    assert all_records[0]["recipe"]["learning_rate"]["where"] == "flame default (Mar 2025)"


def test_sizes_are_those_of_the_paper():
    small, large = recipe("340M-20B-GLA-pure"), recipe("1.3B-100B-GLA-pure")
    assert (small.tokens, large.tokens) == (20 * 10**9, 100 * 10**9)
    assert abs(small.batch_tokens / 50_000 - 1) < 0.02 and abs(large.batch_tokens / 1e6 - 1) < 0.05
    # The paper: about 400k and about 100k steps.
    assert abs(small.steps / 400_000 - 1) < 0.05 and abs(large.steps / 100_000 - 1) < 0.05


def test_parameters_and_configurations_are_the_models(all_records):
    by_cell = {one["cell"]: one for one in all_records}
    assert all(
        one["config"] == json.loads(json.dumps(cell_config(name).to_diff_dict())) for name, one in by_cell.items()
    )
    # Of the published file, less what it does not use, and of fla's own model at this shape.
    assert by_cell["1.3B-100B-GatedDeltaNet-pure"]["parameters"] == 1_466_343_808
    assert by_cell["340M-20B-GLA-pure"]["parameters"] == 374_475_776
    with torch.device("meta"):
        model = HybridLinearForCausalLM(cell_config("nano-22M-HGRN2-hybrid-3-1"))
    assert by_cell["nano-22M-HGRN2-hybrid-3-1"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_nano_run_is_short_enough(all_records):
    for one in all_records[72:]:
        assert one["steps"] * one["batch_tokens"] < 21e6 and one["steps"] <= 400


def test_any_field_can_be_changed():
    one = recipe("nano-7M-GLA-pure", learning_rate=1e-2, tokens=10**6, sequence_length=512, seed=None, boundaries=True)
    assert (one.learning_rate, one.tokens, one.sequence_length, one.seed, one.boundaries) == (
        1e-2,
        10**6,
        512,
        42,
        True,
    )
    assert one.steps == round(10**6 / 65_536)


@pytest.mark.parametrize("name", cell_names("nano-7M"))
def test_what_follows_from_a_changed_field_follows(name):
    """Twice the width of the smaller nano cells is the larger one, head widths and MLP included."""
    wider = recipe(name, config_fields={"hidden_size": 256, "num_attention_heads": 4}).config
    assert wider.to_dict() == cell_config(name.replace("7M", "22M")).to_dict()


def test_depth_and_layers_can_be_changed():
    assert recipe("nano-7M-GLA-hybrid-3-1", config_fields={"num_hidden_layers": 6}).config.layer_picture() == "LLALLA"
    kinds = ["full_attention"] + ["linear_attention"] * 2
    fields = {"num_hidden_layers": 3, "layer_types": kinds}
    assert recipe("nano-7M-GLA-hybrid-3-1", config_fields=fields).config.layer_types == kinds


@pytest.mark.parametrize("name", cell_names("tiny"))
def test_tiny_cells_have_a_recipe(name):
    one = recipe(name)
    assert one.config.layer_types == cell_config(name).layer_types
    assert one.config.mixers == cell_config(name).mixers
    assert one.config.vocab_size > 259


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_tokens": 1000}, "batch_tokens=1000 is not a multiple of sequence_length=1024: use 1024"),
        ({"learning_rat": 1.0}, "learning_rat=1.0 is not a field"),
        ({"sequence_length": 1, "batch_tokens": 1}, "sequence_length=1 leaves nothing"),
        ({"tokens": 0}, "tokens=0 must be a positive integer"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"adam_beta2": 1.5}, "adam_beta2=1.5 must be between 0 and 1"),
    ],
)
def test_nonsense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe("nano-7M-GLA-pure", **changes)


def test_the_command_shows_sources(capsys):
    assert main(["--cell", "1.3B-100B-HGRN-pure"]) == 0
    shown = capsys.readouterr().out
    assert "assumed: flame default (Mar 2025)" in shown and "stated: paper v1" in shown
    with pytest.raises(SystemExit) as stopped:
        main(["--cell", "nano-7M-HGRN3-pure"])
    assert stopped.value.code == 2
