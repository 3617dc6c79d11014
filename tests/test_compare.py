"""Comparison of a suite: planted effects are found and absent ones are not, protocols do not mix, the paper's page is true."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest

from evaluation.compare import compare, flat, items_difference, main, ranking, rising
from evaluation.grid import LEVELS, Selector, read_grid
from evaluation.paper import disagreements, findings, ruler_rows, tables
from hybrid_models.results import metric, result, write
from hybrid_models.suite import MIXERS, cell_names, parse_cell

PAGE = Path(__file__).resolve().parent.parent / "model_cards/paper"
SIZE = "nano-7M"
LOSS, RECALL = Selector.parse("training/held-out/loss_nats"), Selector.parse("ruler/mean/strict,length=1024")


def plant(folder, loss=lambda level, noise: 2.5 + noise, recall=lambda level, noise: 0.2 + 0.1 * level + noise):
    """Results of all 36 cells; ``level`` is 0 (pure) to 4 (3-1), 5 the Transformer; noise is a few thousandths."""
    rng = np.random.default_rng(0)
    for name in cell_names(SIZE):
        cell = parse_cell(name)
        level = LEVELS.index(cell.level) if cell.mixer else 5
        noise = rng.normal(0, 0.004, 3) + 0.02 * (list(MIXERS).index(cell.mixer) if cell.mixer else 0)
        held_out = metric("held-out", "loss_nats", loss(level, noise[0]), stderr=0.01)
        write(result("training", name, "python -m training.train", [held_out], protocol={"text": "a"}), folder)
        rows = [
            metric(task, "strict", recall(level, noise[1]) / (1 + i), length=length)
            for i, task in enumerate(("mean", "niah", "vt"))
            for length in (512, 1024)
        ]
        write(result("ruler", name, "python -m evaluation.ruler", rows, protocol={"version": 1}), folder)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    plant(folder)
    return folder


def test_a_grid_holds_every_cell(planted):
    grid = read_grid(planted, SIZE, LOSS)
    assert list(grid.cells) == list(MIXERS) and len(grid.transformers) == 6 and len(grid.sources) == 36
    mixers, values = grid.complete(LEVELS)
    assert values.shape == (6, 5) and mixers == list(MIXERS)
    low, high = grid.cells["GLA"]["3-1"][1:]
    assert high - low == pytest.approx(2 * 1.96 * 0.01)


def test_planted_effects_are_found(planted):
    loss, recall = read_grid(planted, SIZE, LOSS), read_grid(planted, SIZE, RECALL)
    assert max(pair.adjusted for pair in flat(loss, 0.02)) < 0.01
    assert rising(recall).p < 1e-6 and rising(loss, rises=False).p > 0.05
    found = ranking(recall)
    assert found.mixers[0] == "RetNet" and found.mixers[-1] == "DeltaNet" and found.p < 0.01
    assert ("RetNet", "DeltaNet") in [pair[:2] for pair in found.separated]


def test_absent_effects_are_not(tmp_path):
    plant(tmp_path, loss=lambda level, noise: 2.5 - 0.05 * level + noise, recall=lambda level, noise: 0.3 + noise)
    loss, recall = read_grid(tmp_path, SIZE, LOSS), read_grid(tmp_path, SIZE, RECALL)
    assert min(pair.adjusted for pair in flat(loss, 0.02)) > 0.5
    assert rising(recall).p > 0.05 and rising(loss, rises=False).p < 1e-6


def test_less_loss_is_better():
    assert not LOSS.rises and RECALL.rises and not Selector.parse("recall/far_rare/loss_nats").rises


def test_the_page_has_tables_tests_and_pictures(planted, tmp_path):
    path = compare(planted, SIZE, tmp_path, loss=LOSS, recall=RECALL)
    text = path.read_text()
    assert "it is flat within 0.02" in text and "Page's test" in text and "Friedman" in text and "36 result" not in text
    assert "72 result files" in text and "Transformer, 6 seeds" in text
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "loss.svg", "recall.svg", "memory.svg", "tasks.svg"}
    for name in ("loss.svg", "recall.svg", "memory.svg", "tasks.svg"):
        assert f"({name})" in text and "<svg" in (tmp_path / name).read_text()


def test_what_was_not_measured_says_so(planted, tmp_path):
    shutil.copytree(planted, tmp_path / "results")
    shutil.rmtree(tmp_path / "results/nano-7M-GLA-pure")
    text = compare(tmp_path / "results", SIZE, tmp_path / "page", loss=LOSS).read_text()
    assert "| GLA | not evaluated |" in text


def test_protocols_do_not_mix(planted, tmp_path):
    shutil.copytree(planted, tmp_path, dirs_exist_ok=True)
    other = metric("held-out", "loss_nats", 2.5)
    write(result("training", "nano-7M-GLA-pure", "x", [other], protocol={"text": "b"}), tmp_path)
    with pytest.raises(ValueError, match="text: 'a' and 'b'|text: 'b' and 'a'"):
        read_grid(tmp_path, SIZE, LOSS)


def test_what_makes_a_cell_may_differ(planted, tmp_path):
    shutil.copytree(planted, tmp_path, dirs_exist_ok=True)
    other = metric("held-out", "loss_nats", 2.5)
    tuned = {"text": "a", "learning_rate": 0.01, "seed": 3}
    write(result("training", "nano-7M-GLA-pure", "x", [other], protocol=tuned), tmp_path)
    assert read_grid(tmp_path, SIZE, LOSS).cells["GLA"]["pure"].value == 2.5


def test_a_cell_trained_twice_counts_with_mean_and_range(planted, tmp_path):
    shutil.copytree(planted, tmp_path, dirs_exist_ok=True)
    for label, value in ((None, 2.4), ("seed2", 2.6)):
        numbers = [metric("held-out", "loss_nats", value)]
        one = result("training", "nano-7M-GLA-pure", "x", numbers, protocol={"text": "a"}, weights=str(value))
        write(one, tmp_path, label)
    assert read_grid(tmp_path, SIZE, LOSS).cells["GLA"]["pure"] == pytest.approx((2.5, 2.4, 2.6))
    write({**one, "command": "again"}, tmp_path, "copy")
    with pytest.raises(ValueError, match="same weights"):
        read_grid(tmp_path, SIZE, LOSS)


@pytest.mark.parametrize(
    "text, message",
    [
        ("ruler/mean/strict", "length=1024"),
        ("ruler/mean/official", "there are ruler/mean/strict"),
        ("ruler-mean", "does not name a number"),
        ("ruler/mean/strict,length", "does not name a number"),
    ],
)
def test_a_selector_that_does_not_name_one_number_is_refused(planted, text, message):
    with pytest.raises(ValueError, match=message):
        read_grid(planted, SIZE, Selector.parse(text))


def test_two_models_are_compared_item_by_item(tmp_path):
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    for name, gain in (("a", 0.0), ("b", 0.1)):
        items = {"far_rare": (hard + gain + rng.normal(0, 0.01, 200)).tolist()}
        write(result("recall", name, "x", [], details={"items": items}), tmp_path)
    value, low, high = items_difference(tmp_path, "b", "a", "recall", "far_rare")
    # Paired, the interval is that of the noise, .01 sqrt(2 / 200) x 1.96 = .002 to a side; unpaired it would be .06.
    assert low < 0.1 < high and high - low < 0.006 and value == pytest.approx(0.1, abs=0.003)
    with pytest.raises(ValueError, match="'c' has no|c has no"):
        items_difference(tmp_path, "c", "a", "recall", "far_rare")


# ------------------------------------------------------------------------------------------------------ the paper's tables


def by_claim(data, word):
    (found,) = [one for one in findings(data) if word in one.claim]
    return found


def test_figures_of_the_papers_tables():
    data = tables()
    rows = {row.name: row for row in ruler_rows(data)}
    assert round(rows["1.3B Transformer"].recomputed, 3) == 0.390 and rows["1.3B Transformer"].printed == 0.423
    assert (
        "p = .0002" in by_claim(data, "more attention layers").why
        and "p = .004" in by_claim(data, "more attention").why
    )
    assert "p = .14" in by_claim(data, "stable").why
    assert "+17%" in by_claim(data, "doubles").why and by_claim(data, "doubles").verdict == "does not hold"
    assert (
        by_claim(data, "RULER average is").verdict == "does not hold"
        and ".033 lower" in by_claim(data, "average is").why
    )
    assert len(disagreements(data)) == 5


def test_verdicts_follow_the_figures():
    data = copy.deepcopy(tables())
    data["ruler_tasks"]["rows"][-1]["printed_average"] = 390
    assert by_claim(data, "RULER average is").verdict == "holds"
    for mixer, row in data["ruler_by_ratio"]["rows"].items():
        row[1:] = [500, 600, 800, 1000] if mixer != "GLA" else [400, 500, 600, 950]
    assert by_claim(data, "doubles").verdict == "holds"
    for row in data["ruler_by_ratio"]["rows"].values():
        row.reverse()
    assert by_claim(data, "more attention layers").verdict == "does not hold"


def test_the_committed_page_is_what_the_command_writes(tmp_path, capsys):
    assert main(["--paper", "--check", "--out", str(PAGE)]) == 0
    shutil.copytree(PAGE, tmp_path / "page")
    for name in ("README.md", "memory.svg"):
        path = tmp_path / "page" / name
        text = path.read_text()
        path.write_text(text[:-20] + "~" + text[-19:])
    (tmp_path / "page" / "stale.svg").write_text("")
    assert main(["--paper", "--check", "--out", str(tmp_path / "page")]) == 1
    assert "README.md, memory.svg, stale.svg" in capsys.readouterr().out


def test_errors_are_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--size", SIZE, "--results", str(tmp_path), "--loss", "training/held-out/loss_nats"])
    assert stop.value.code == 2 and "no cell of nano-7M has a result there" in capsys.readouterr().err
