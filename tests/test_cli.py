"""`hybrid-linear`: what it prints, what it refuses, and how an error looks to the person who caused it."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from hybrid_models import HybridLinearConfig, cli
from hybrid_models.info import cache_bytes, describe, expected_cache_bytes, human_bytes, transformer_of_same_size
from tests.common import ARCHITECTURES, tiny_config, tiny_model


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer of the 95 printable ASCII characters and three special tokens: 98 ids of the tiny models' 101."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny hybrid whose generation cannot leave the tokenizer's ids, with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(dtype=torch.float32, vocab_size=98)
    model.save_pretrained(folder)
    characters().save_pretrained(folder)
    return folder


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    return status, *capsys.readouterr()


# ------------------------------------------------------------------------------------------------------------------ info


def test_info_shows_versions_and_every_back_end(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith("back end"))
    assert rows["torch"] == torch.__version__
    assert {line.split()[2] for line in out.splitlines() if line.startswith("back end")} >= {"torch", "fla", "triton"}


def test_info_of_a_checkpoint(capsys, checkpoint):
    status, out, _ = run(capsys, "info", str(checkpoint))
    assert status == 0
    config = HybridLinearConfig.from_pretrained(checkpoint)
    for expected in (
        "gated_delta_net",
        "LLALLA",
        "4 linear, 2 full attention (linear:full = 2:1)",
        f"{tiny_model(vocab_size=98).num_parameters():,}",
        f"{config.kv_bytes_per_token(4):,} bytes per token",
        f"{config.state_bytes(4):,} bytes per sequence",
        "131,072",
    ):
        assert expected in out, expected


@pytest.mark.parametrize(("mixer", "level"), ARCHITECTURES)
def test_the_formulas_are_what_a_cache_measures(mixer, level):
    config = tiny_config(mixer, level)
    model = tiny_model(mixer, level, dtype=torch.float32)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.full((1, 17), 5), past_key_values=cache)
    assert cache_bytes(cache) == expected_cache_bytes(config, 17)
    assert describe(config, (17,)).cache[17] == cache_bytes(cache)
    assert describe(config).parameters == model.num_parameters()


def test_the_transformer_of_the_same_size_attends_everywhere():
    config = tiny_config("hgrn", "3-1")
    transformer = transformer_of_same_size(config)
    assert transformer.layer_picture() == "AAAAAA"
    assert (transformer.hidden_size, transformer.num_key_value_heads) == (32, 1)
    assert expected_cache_bytes(transformer, 10).kv == 3 * expected_cache_bytes(config, 10).kv
    assert config.layer_picture() == "LLALLA"  # unchanged


def test_ratios_in_lowest_terms():
    assert describe(tiny_config(level="24-1")).linear_to_full == "23:1"
    assert describe(tiny_config(level="6-1", num_hidden_layers=24)).linear_to_full == "5:1"


def test_sizes_are_for_the_dtype_of_the_checkpoint():
    single, half = describe(tiny_config()), describe(tiny_config(dtype="bfloat16"))
    assert (single.dtype, half.dtype) == ("float32", "bfloat16")
    assert half.kv_bytes_per_token * 2 == single.kv_bytes_per_token
    assert single.state_bytes > half.state_bytes > single.state_bytes / 2  # the state itself stays float32


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (67584, "66.0 KiB"), (4718592, "4.50 MiB"), (2**29, "512 MiB"), (2**50, "1024 TiB")],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


# -------------------------------------------------------------------------------------------------------------- generate


def test_generate_prints_prompt_and_continuation(capsys, checkpoint):
    status, out, err = run(capsys, "generate", str(checkpoint), "--prompt", "def f(x):", "--max-new-tokens", "12")
    assert status == 0
    assert out.startswith("def f(x):") and len(out.strip()) > len("def f(x):")
    assert "12 tokens in" in err and "tokens/s" in err

    tokenizer, model = characters(), tiny_model(dtype=torch.float32, vocab_size=98)
    ids = tokenizer("def f(x):", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert out.rstrip("\n") == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_sampling_depends_on_the_seed_alone(capsys, checkpoint):
    command = ["generate", str(checkpoint), "--prompt", "x", "--max-new-tokens", "20", "--temperature", "1.5"]
    first, again, other = (run(capsys, *command, "--seed", seed)[1] for seed in "001")
    assert first == again != other


# ---------------------------------------------------------------------------------------------------------------- errors


def damaged(folder, tmp_path, **fields):
    copy = tmp_path / "damaged"
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **fields}))
    return copy


def test_a_missing_path(capsys):
    status, out, err = run(capsys, "info", "./nowhere")
    assert (status, out) == (1, "")
    assert err == (
        "hybrid-linear info: error: ./nowhere does not exist. Give a checkpoint directory, or a repo id such as org/name.\n"
    )


def test_a_directory_without_a_checkpoint(capsys, tmp_path):
    status, _, err = run(capsys, "generate", str(tmp_path), "--prompt", "x")
    assert status == 1 and "holds no config.json" in err


def test_another_family(capsys, checkpoint, tmp_path):
    status, _, err = run(capsys, "info", str(damaged(checkpoint, tmp_path, model_type="gpt2")))
    assert status == 1 and "model_type='gpt2'" in err and "'hybrid_linear'" in err


def test_a_configuration_that_cannot_be(capsys, checkpoint, tmp_path):
    status, _, err = run(capsys, "info", str(damaged(checkpoint, tmp_path, num_hidden_layers=5)))
    assert status == 1 and "layer_types has 6 entries, but num_hidden_layers=5" in err


def test_truncated_weights(capsys, checkpoint, tmp_path):
    copy = damaged(checkpoint, tmp_path)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    status, _, err = run(capsys, "generate", str(copy), "--prompt", "x")
    assert status == 1 and err.count("error:") == 1


def test_traceback_on_request(checkpoint):
    with pytest.raises(FileNotFoundError):
        cli.main(["info", "./nowhere", "--traceback"])


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken():
        raise TypeError("a defect")

    monkeypatch.setattr(cli, "environment", broken)
    with pytest.raises(TypeError, match="a defect"):
        cli.main(["info"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["polish"],
        ["generate", "path"],
        ["generate", "path", "--prompt", "x", "--max-new-tokens", "0"],
        ["generate", "path", "--prompt", "x", "--temperature", "-1"],
        ["generate", "path", "--prompt", "x", "--temperature", "nan"],
    ],
)
def test_usage_errors(capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: hybrid-linear")


@pytest.mark.parametrize("command", [command.name for command in cli.COMMANDS])
def test_every_help_shows_an_example(capsys, command):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    assert f"example:\n  hybrid-linear {command} " in capsys.readouterr().out
