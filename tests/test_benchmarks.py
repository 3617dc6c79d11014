"""What the benchmarks share: a peer that fails costs its own row and no other."""

import pytest

from benchmarks.common import rows_of


def test_a_case_that_fails_becomes_a_row_that_says_why(capsys):
    def measure(model, case):
        if case == 2048:
            raise RuntimeError("out of memory\nand a long story")
        return {"ms": model * case, "range": [1, 2]}

    rows = rows_of("fla tokens", lambda: 0.5, (512, 2048, 4096), measure)
    assert rows == {
        512: {"ms": 256.0, "range": [1, 2]},
        2048: {"error": "out of memory"},
        4096: {"ms": 2048.0, "range": [1, 2]},
    }
    assert capsys.readouterr().out.splitlines()[:2] == ["fla tokens 512: ms 256", "fla tokens 2048: out of memory"]


def test_a_model_that_cannot_be_built_is_one_error():
    def make():
        import a_package_that_nobody_has  # noqa: F401

    assert rows_of("fla tokens", make, (512,), None) == {"error": "No module named 'a_package_that_nobody_has'"}


def test_a_mistake_of_ours_is_not_a_row():
    def measure(model, case):
        raise KeyError("no such field")

    with pytest.raises(KeyError):
        rows_of("fla tokens", lambda: 1, (512,), measure)
