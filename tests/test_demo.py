"""`make demo`, cut short: what it prints, saves and returns."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training import demo


def test_two_steps_leave_a_whole_checkpoint(tmp_path, capsys):
    result = demo.run(tmp_path, max_steps=2, max_bytes=150_000, max_new_tokens=8, prompt="def f(x):")

    assert result.steps == 2
    assert result.loss_after < result.loss_before < 8.5  # log(2048) is 7.6
    assert result.text.startswith("def f(x):") and len(result.text) > len("def f(x):")
    assert result.tokens_per_second > 0
    assert result.measured == result.expected

    printed = capsys.readouterr().out
    for expected in (
        "LLALLA",
        "trained for 2 steps;",
        result.text,
        f"measured at 2,048 tokens: {result.measured.kv:,} +",
    ):
        assert expected in printed, expected
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_hybrid_linear.py"} <= {
        path.name for path in tmp_path.iterdir()
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("import os\n", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == model.config.bos_token_id == tokenizer.bos_token_id
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "import os\n"
    assert torch.isfinite(model(ids).logits).all()


def test_training_ends_when_time_is_up(tmp_path, capsys):
    result = demo.run(tmp_path, max_steps=50, max_seconds=0.0, max_bytes=150_000, max_new_tokens=2)
    assert result.steps == 1
    assert "trained for 1 of 50 steps (time is up)" in capsys.readouterr().out


def test_text_is_bounded_and_the_same_every_time():
    texts = demo.stdlib_files(100_000)
    assert texts == demo.stdlib_files(100_000)
    assert 0 < sum(map(len, texts)) <= 100_000
