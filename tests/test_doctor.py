"""The doctor finds what is wrong with a checkpoint, and nothing where nothing is."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file

from hybrid_models import HybridLinearForCausalLM, doctor
from hybrid_models.conv_taps import losses, repair_last_tap_conv, taps_verdict
from hybrid_models.convert import convert
from hybrid_models.doctor import parameter_count
from hybrid_models.fla_config import config_from_fla
from hybrid_models.fla_format import from_fla, native_shapes

from .common import ARCHITECTURES, tiny_config, tiny_model
from .fla import CASES, FIXTURES, add_tokenizer, copy_of, shard

GDN, DELTA = "gated_deltanet-hybrid", "delta_net-pure"


def rows(report, subject):
    return [(level, what) for level, name, what in report.rows if name == subject]


def untrained(weights):
    """Conv taps as flame left them in March 2025: noise as at initialisation, and a live tap hardly larger."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if "conv1d" in name:
            weight[..., :-1] = 0.02 * torch.randn(weight[..., :-1].shape, generator=generator)
            weight[..., -1] = 0.035 * torch.randn(weight[..., -1].shape, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_healthy(tmp_path, name):
    for folder in (FIXTURES / name, convert(FIXTURES / name, tmp_path / "native")):
        report = doctor.doctor(folder)
        assert report.status == 0, str(report)
        assert str(report).endswith("healthy")


@pytest.mark.parametrize(
    "raw, count",
    [
        (dict(model_type="hgrn", hidden_size=1024), 373_916_672),
        (dict(model_type="hgrn", hidden_size=2048), 1_364_396_032),
        (dict(model_type="retnet", hidden_size=1024), 380_165_120),
        (dict(model_type="retnet", hidden_size=1024, num_heads=4), 380_171_264),
        (dict(model_type="retnet", hidden_size=2048), 1_351_727_104),
        (dict(model_type="gla", hidden_size=1024), 374_475_776),
        (dict(model_type="gla", hidden_size=2048), 1_365_514_240),
        (dict(model_type="hgrn2", hidden_size=1024), 373_916_672),
        (dict(model_type="hgrn2", hidden_size=2048), 1_364_396_032),
        (dict(model_type="delta_net", hidden_size=1024, num_heads=8), 374_362_112),
        (dict(model_type="delta_net", hidden_size=2048, num_heads=16), 1_365_677_056),
        (dict(model_type="gated_deltanet", hidden_size=1024, num_heads=4, num_hidden_layers=24, expand_v=1), 399_531_200),
        (dict(model_type="gated_deltanet", hidden_size=2048, num_heads=8, num_hidden_layers=24, expand_v=1), 1_466_343_808),
    ],
)  # fmt: skip
def test_parameter_count_of_the_published_sizes(raw, count):
    """Totals that fla itself counts."""
    assert parameter_count(config_from_fla(raw)) == count


@pytest.mark.parametrize("mixer, level", ARCHITECTURES)
def test_parameter_count_is_what_the_model_has(mixer, level):
    config = tiny_config(mixer, level, attention_bias=True, linear_use_short_conv=mixer != "retnet")
    assert parameter_count(config) == sum(shape.numel() for shape in native_shapes(config).values())


# ------------------------------------------------------------------------------------------------------------- damage


def test_nan_in_A_log(tmp_path):
    def damage(weights):
        weights["model.layers.1.attn.A_log"][0] = float("nan")

    report = doctor.doctor(copy_of(GDN, tmp_path, {}, damage))
    assert report.status == 2
    assert "A_log has 1 values" in rows(report, "tensors")[0][1]
    assert rows(report, "NaN or Inf")[0][0] == rows(report, "half-lives")[0][0] == "error"


def test_nan_in_a_projection(tmp_path):
    def damage(weights):
        weights["model.layers.1.mlp.down_proj.weight"][3, 4:6] = float("inf")

    report = doctor.doctor(copy_of(GDN, tmp_path, {}, damage))
    assert rows(report, "NaN or Inf") == [("error", "in 1 tensors: model.layers.1.mlp.down_proj.weight (2 of 1024)")]


def test_missing_and_unexpected_tensors(tmp_path):
    def damage(weights):
        weights["model.extra"] = weights.pop("model.layers.3.attn.o_proj.weight")

    report = doctor.doctor(copy_of(GDN, tmp_path, {}, damage))
    assert report.status == 2
    assert [what for _, what in rows(report, "tensors")] == [
        "1 tensors are missing: model.layers.3.attn.o_proj.weight.",
        "1 tensors are not expected: model.extra.",
    ]
    assert rows(report, "parameters")[0][1].endswith("by the closed form (-2,048)")


def test_files_that_cannot_be_read(tmp_path):
    folder = shard(copy_of(GDN, tmp_path / "x"))
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    report = doctor.doctor(folder)
    assert report.status == 2 and file.name in rows(report, "files")[0][1]
    report = doctor.doctor(tmp_path / "absent")
    assert report.status == 2 and "absent" in str(report)
    report = doctor.doctor(copy_of(GDN, tmp_path / "y", {"norm_eps": 0}))
    assert report.status == 2 and "rms_norm_eps=0.0 must be positive" in str(report)


def test_dead_tensors_and_zero_decay_parameters(tmp_path):
    def damage(weights):
        for name in ("o_proj.weight", "A_log", "dt_bias"):
            weights[f"model.layers.0.attn.{name}"].zero_()

    report = doctor.doctor(copy_of(GDN, tmp_path, {}, damage))
    assert report.status == 1
    assert rows(report, "dead") == [
        ("warning", "1 tensors are zero throughout: model.layers.0.linear_attn.o_proj.weight")
    ]
    assert "zero in 1 layers" in rows(report, "half-lives")[0][1]
    assert report.numbers["half_lives"][0] == [1.0, 1.0]  # ln 2 / softplus(0): one token


def test_half_lives():
    report = doctor.doctor(FIXTURES / "gated_deltanet-pure")
    weights = load_file(FIXTURES / "gated_deltanet-pure" / "model.safetensors")
    decay = torch.exp(
        -weights["model.layers.2.attn.A_log"].exp()
        * torch.nn.functional.softplus(weights["model.layers.2.attn.dt_bias"])
    )
    half_lives = torch.tensor(report.numbers["half_lives"][2])
    torch.testing.assert_close(decay**half_lives, torch.full_like(decay, 0.5), rtol=1e-3, atol=0)
    assert report.numbers["half_lives"].keys() == {0, 1, 2, 3}


def test_lower_bounds_that_never_moved(tmp_path):
    report = doctor.doctor(
        copy_of("hgrn2-pure", tmp_path, {}, lambda w: w | {"model.lower_bounds": torch.zeros(4, 64)})
    )
    assert rows(report, "lower bounds") == [("warning", "zero throughout: as initialised, never trained")]


def test_rounded_decay_parameters(tmp_path):
    def halve(weights):
        return {name: weight if "A_log" in name else weight.bfloat16() for name, weight in weights.items()}

    report = doctor.doctor(copy_of(GDN, tmp_path, {}, halve))
    assert rows(report, "decay dtypes")[0][1].startswith("4 tensors, such as model.layers.0.attn.dt_bias")


# ---------------------------------------------------------------------------------------------------------- conv taps


def test_taps_verdict():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3000, 4, generator=generator)
    assert taps_verdict(noise) == "trained"  # alike, but so is the last: nothing says that it was trained differently
    for ratio in (0.6, 0.3, 0.01):
        assert taps_verdict(noise * torch.tensor([ratio, ratio, ratio, 1.0])) == "untrained"
    assert taps_verdict(noise * torch.tensor([0.1, 0.2, 0.4, 1.0])) == "trained"
    related = noise * torch.tensor([0.3, 0.3, 0.3, 1.0])
    related[:, 1] += 0.1 * noise[:, 0]
    assert taps_verdict(related) == "trained"
    assert taps_verdict(noise * torch.tensor([0.0, 0.0, 0.0, 1.0])) == "last tap only"


@pytest.mark.parametrize("name", [GDN, DELTA, "gla-hybrid"])
@pytest.mark.parametrize("layout", ["fla", "native"])
def test_untrained_taps_are_found_and_repaired(tmp_path, name, layout):
    source = copy_of(name, tmp_path / "src", {}, untrained)
    if layout == "native":
        source = convert(source, tmp_path / "native")
    report = doctor.doctor(source)
    assert report.status == 1
    assert report.numbers["conv_verdict"] == "untrained" and 0.4 < report.numbers["conv_ratio"] < 0.8

    before = {path.name: path.read_bytes() for path in source.iterdir()}
    repaired = repair_last_tap_conv(source, tmp_path / "repaired")
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}
    config, provenance = (json.loads((repaired / f"{file}.json").read_text()) for file in ("config", "provenance"))
    assert config["repairs"] == provenance["repairs"] == ["last-tap-conv"]
    report = doctor.doctor(repaired)
    assert report.status == 0 and report.layout == layout, str(report)
    assert rows(report, "repairs") == [("note", "last-tap-conv")]
    weights, original = load_file(repaired / "model.safetensors"), load_file(source / "model.safetensors")
    for key, weight in weights.items():
        if "conv1d" in key:
            assert not weight[..., :-1].any() and torch.equal(weight[..., -1], original[key][..., -1])
        else:
            assert torch.equal(weight, original[key])
    # And the record travels on.
    assert doctor.doctor(convert(repaired, tmp_path / "again")).status == 0
    load = from_fla if layout == "fla" else HybridLinearForCausalLM.from_pretrained
    assert load(repaired).config.repairs == ["last-tap-conv"]


def test_zero_taps_without_a_record(tmp_path):
    def zero(weights):
        for name, weight in weights.items():
            if "conv1d" in name:
                weight[..., :-1] = 0

    report = doctor.doctor(copy_of(GDN, tmp_path, {}, zero))
    assert rows(report, "conv taps")[0][1].endswith("no repair is recorded")


def test_nothing_to_repair(tmp_path):
    with pytest.raises(ValueError, match="no short convolutions"):
        repair_last_tap_conv(FIXTURES / "retnet-pure", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_loss_both_ways():
    """The model's loss on a text, then with the last taps alone."""
    model = tiny_model("gated_delta_net", "pure", dtype=torch.float32)
    ids = torch.randint(3, 101, (1500,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = [(float(model(w[None], labels=w[None]).loss), len(w) - 1) for w in (ids[:1024], ids[1024:])]
    found = losses(model, ids)
    assert found["whole"] == pytest.approx(sum(loss * n for loss, n in parts) / sum(n for _, n in parts), rel=1e-6)
    assert found["last_tap_only"] != found["whole"]
    assert not any(module.conv1d.weight[..., :-1].any() for module in model.modules() if hasattr(module, "conv1d"))
    assert losses(tiny_model("retnet", "pure", dtype=torch.float32), ids[:100]).keys() == {"whole"}


# --------------------------------------------------------------------------------------------------- tokenizer, command


def with_vocabulary(size):
    def change(weights):
        untrained(weights)
        for name in ("model.embeddings.weight", "lm_head.weight"):
            weights[name] = weights[name].repeat(size // 101 + 1, 1)[:size].contiguous()

    return change


def test_tokenizer(tmp_path):
    source = copy_of(GDN, tmp_path / "src", {"vocab_size": 400}, with_vocabulary(400))
    add_tokenizer(source, 400, llama=True)
    found = [what for _, what in rows(doctor.doctor(source), "tokenizer")]
    assert any("no pad token" in what for what in found) and any(
        "other ids than tokenizer.json" in what for what in found
    )
    ((level, what),) = rows(doctor.doctor(convert(source, tmp_path / "native")), "tokenizer")
    assert level == "ok" and "pad '<unk>'" in what

    add_tokenizer(source, 450)
    assert ("error", "has 450 tokens, the model only 400: it belongs to another") in rows(
        doctor.doctor(source), "tokenizer"
    )
    (source / "tokenizer.json").write_text("{}")
    assert rows(doctor.doctor(source), "tokenizer")[0][0] == "error"


def command(*arguments):
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(list(map(str, arguments))))


def test_command(tmp_path, capsys):
    assert command(FIXTURES / GDN) == 0
    assert "healthy" in capsys.readouterr().out
    source = copy_of(GDN, tmp_path / "src", {"vocab_size": 400}, with_vocabulary(400))
    add_tokenizer(source, 400)
    text = tmp_path / "text.txt"
    text.write_text("Some text to be read. " * 20)
    assert command(source, "--json", "--text", text, "--max-tokens", 100) >= 1
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] in ("warnings", "errors") and report["numbers"]["conv_verdict"] == "untrained"
    loss = report["numbers"]["loss"]
    assert loss.keys() == {"whole", "last_tap_only"} and loss["whole"] > 0
    (tmp_path / "empty").mkdir()
    assert command(tmp_path / "empty") == 2
    assert command(source, "--repair", "last-tap-conv") == 0
    assert (tmp_path / "src-last-tap-conv" / "config.json").exists()
