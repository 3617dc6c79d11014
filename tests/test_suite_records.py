"""Records of the suite: facts follow from configurations, numbers from files, and what does not fit together is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hybrid_models import HybridLinearForCausalLM, results
from hybrid_models.results import metric, result, write
from hybrid_models.suite import cell_config, cell_names, parse_cell
from training.recipes import recipe
from upload.suite import RECIPES, SUITE, aliases, load, read_recipes, record, records

ROOT = Path(__file__).resolve().parent.parent
CELL = "nano-7M-GLA-hybrid-3-1"


@pytest.fixture(scope="module")
def recipes():
    return {one["cell"]: one for one in read_recipes(ROOT / RECIPES)}


def planted(folder, *, weights="a" * 64, label=None, evaluation="training", name=CELL, **fields):
    metrics = [metric("held-out", "loss_nats", 2.5, n=100, stderr=0.01)]
    one = result(evaluation, name, "python -m training.train", metrics, weights=weights, **fields)
    return write(one, folder / results.FOLDER, label), one


def measured(folder):
    return list(results.read_all(folder / results.FOLDER))


def test_the_committed_records_are_all_cells_with_their_facts():
    found = load(ROOT / SUITE)
    assert len(found) == 144
    assert set(found) == {n for size in ("340M-20B", "1.3B-100B", "nano-7M", "nano-22M") for n in cell_names(size)}
    six = found["1.3B-100B-GatedDeltaNet-hybrid-6-1"]
    assert six["attention_layers"] == [5, 11, 17, 23] and six["linear_to_full"] == "5:1"
    assert found["340M-20B-HGRN2-hybrid-3-1"]["linear_to_full"] == "2:1"
    # Published sizes of this cell: 1,449,336,128 parameters; 32 KiB a token, 40 MiB of states, 1065 MiB at 32k.
    assert six["parameters"] == 1_449_336_128 and six["kv_bytes_per_token"] == 32 * 1024
    assert round(six["cache_bytes"]["32768"]["total"] / 2**20) == 1065
    assert six["transformer_cache_bytes"]["32768"] == 6144 * 2**20
    assert six["suite"] == "paper" and six["recipe"]["tokens"]["source"] == "stated"
    assert all(
        len(one["layers"]) == 24 and one["layers"].count("A") == len(one["attention_layers"]) for one in found.values()
    )


def test_a_record_is_the_model_that_is_built(recipes):
    one = record(recipes[CELL], [])
    model = HybridLinearForCausalLM(cell_config(CELL))
    assert one["parameters"] == sum(p.numel() for p in model.parameters())
    linear = [i for i, layer in enumerate(model.model.layers) if hasattr(layer, "linear_attn")]
    assert one["attention_layers"] == [i for i in range(24) if i not in linear]
    state = one["cache_bytes"]["2048"]["state"]
    with torch.no_grad():
        cache = model(torch.ones(1, 4, dtype=torch.long), use_cache=True).past_key_values
    recurrent = [x for layer in cache.layers for x in getattr(layer, "recurrent_states", {}).values()]
    assert state == one["state_bytes"] == sum(x.numel() * 4 for x in recurrent)


def test_numbers_come_with_file_digest_and_command(recipes, tmp_path):
    path, _ = planted(tmp_path, protocol={"learning_rate": 0.002})
    one = record(recipes[CELL], measured(tmp_path), tmp_path)
    (found,) = one["results"]
    assert (
        found["file"] == f"model_cards/results/{CELL}/training.json" and found["command"] == "python -m training.train"
    )
    assert found["metrics"][0]["value"] == 2.5 and len(found["sha256"]) == 64
    assert one["provenance"]["status"] == "trained" and one["provenance"]["weights_sha256"] == "a" * 64
    assert one["provenance"]["deviations"] == {"learning_rate": {"recipe": 0.003, "run": 0.002}}
    path.write_text(path.read_text() + "\n")
    assert record(recipes[CELL], measured(tmp_path), tmp_path)["results"][0]["sha256"] != found["sha256"]


def test_without_a_training_run_a_cell_is_not_trained(recipes, tmp_path):
    planted(tmp_path, evaluation="cost", weights=None)  # which needs no training
    one = record(recipes[CELL], measured(tmp_path), tmp_path)
    assert one["provenance"]["status"] == "not trained" and "weights_sha256" not in one["provenance"]
    for name, line in recipes.items():
        statement = record(line, [])["provenance"]["statement"] if name.endswith("-pure") else "Not trained"
        assert statement.startswith("Not trained")
        if name.startswith("340M") and name.endswith("-pure"):
            assert "The paper's own weights" in statement and "not republished here" in statement


@pytest.mark.parametrize("name", [CELL, "340M-20B-GatedDeltaNet-hybrid-6-1", "1.3B-100B-Transformer-seed2"])
def test_a_run_by_the_recipe_does_not_deviate_from_it(recipes, tmp_path, name):
    """The protocol as training writes it (run.json): the recipe's own fields and the configuration."""
    one = recipe(name)
    fields = {field.name: getattr(one, field.name) for field in dataclasses.fields(one) if field.name != "config"}
    planted(tmp_path, name=name, protocol={**fields, "config": one.config.to_dict()})
    assert record(recipes[name], measured(tmp_path), tmp_path)["provenance"]["deviations"] == {}


def test_repeats_are_kept_apart(recipes, tmp_path):
    planted(tmp_path)
    planted(tmp_path, weights="b" * 64, label="seed2")
    planted(tmp_path, weights="b" * 64, evaluation="lm", label="seed2")
    one = record(recipes[CELL], measured(tmp_path), tmp_path)
    assert one["provenance"]["weights_sha256"] == "a" * 64 and len(one["results"]) == 3


@pytest.mark.parametrize(
    "plant, message",
    [
        (lambda f: planted(f, evaluation="lm"), "no training|which no training"),
        (lambda f: (planted(f), planted(f, evaluation="lm", weights="b" * 64)), "measured weights bbb"),
        (lambda f: planted(f, weights=None), "does not say which weights"),
        (lambda f: planted(f, protocol={"config": {"hidden_size": 64}}), "another config .hidden_size"),
    ],
)
def test_results_of_other_weights_are_refused(recipes, tmp_path, plant, message):
    plant(tmp_path)
    with pytest.raises(ValueError, match=message):
        record(recipes[CELL], measured(tmp_path), tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r["config"].update(hidden_size=256), "not the cell's"),
        (lambda r: r["config"].update(rms_norm_eps=1e-5), "not the cell's"),
        (lambda r: r.update(parameters=r["parameters"] + 1), "parameters="),
    ],
)
def test_a_recipe_that_is_not_the_cell_is_refused(recipes, change, message):
    changed = json.loads(json.dumps(recipes[CELL]))
    change(changed)
    with pytest.raises(ValueError, match=message):
        record(changed, [])


def test_a_broken_line_of_the_recipes_is_named(tmp_path):
    path = tmp_path / RECIPES
    path.parent.mkdir(parents=True)
    for text, message in (
        ("{\n", "line 1"),
        ('{"cell": "gpt2"}\n', "gpt2"),
        (2 * f'{{"cell": "{CELL}"}}\n', "line 2.*already"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(records(tmp_path))


def test_published_names_are_those_that_were_seen():
    def names(cell):
        return [(one["repo"], one["seen"]) for one in aliases(parse_cell(cell))]

    assert names("340M-20B-GLA-pure") == [("m-a-p/340M-20B-GLA-pure-baseline", True)]
    assert names("340M-20B-RetNet-pure") == [("m-a-p/340M-20B-RetNet-pure", True)]
    assert names("340M-20B-GatedDeltaNet-hybrid-24-1")[1] == ("m-a-p/340M-20B-GatedDeltaNet-New-hybrid-24-1", True)
    assert names("1.3B-100B-HGRN-pure") == [("m-a-p/1.3B-100B-HGRN-pure", False)]
    assert names("1.3B-100B-Transformer-seed1") == [("m-a-p/transformer_1.3B_baseline", True)]
    assert names("340M-20B-Transformer-seed1") == [("m-a-p/transformer_340M_baseline", True)]
    assert names("340M-20B-Transformer-seed2") == names("nano-7M-GLA-pure") == []


def test_defects_stand_with_the_cells_they_concern(recipes):
    def told(cell):
        return " ".join(one["what"] for one in record(recipes[cell], [])["known_defects"])

    assert "attn.D" in told("340M-20B-GatedDeltaNet-pure") and "378" in told("340M-20B-GatedDeltaNet-pure")
    assert "378" not in told("340M-20B-GatedDeltaNet-hybrid-3-1")
    assert "last tap" in told("340M-20B-DeltaNet-pure") and "last tap" not in told("340M-20B-GLA-pure")
    assert "wrong rotary" in told("1.3B-100B-HGRN-hybrid-3-1") and "wrong rotary" not in told("1.3B-100B-HGRN-pure")
    assert told("nano-7M-GatedDeltaNet-pure") == ""
