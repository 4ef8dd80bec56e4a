"""Recipes: what runs, what is skipped, what goes on; tables and claims from JSON of known figures."""

import json
import re
import shlex

import pytest

import claims
import evaluate
import reproduce
import train_causal
import train_stage1
import train_stage2
from common import parse

TODAY = {module.__name__ + ".py": module for module in (train_stage1, train_stage2, train_causal, evaluate)}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A table of two rows whose commands are small scripts: `work` logs each start, and fails while `bad` exists."""
    work, judge = tmp_path / "work.py", tmp_path / "judge.py"
    work.write_text(f"import sys, pathlib\nwith open({str(tmp_path / 'log')!r}, 'a') as f:\n"
                    f"    f.write(' '.join(sys.argv[1:]) + '\\n')\n"
                    f"sys.exit(pathlib.Path({str(tmp_path / 'bad')!r}).exists() and 'two' in sys.argv[1])\n")
    made = {"commit": "c", "device": "d", "weights": {}}
    figures = {**made, "seeds": [{"student": {"frechet": [0.123456789, 0.1, 0.2]}}]}
    judge.write_text("import sys, pathlib\n"
                     f"pathlib.Path(sys.argv[1], 'figures.json').write_text({json.dumps(figures)!r})\n")
    recipes = {name: (f"{work} {{run}} --steps 60", f"{judge} {{run}}") for name in ("one", "two")}
    monkeypatch.setattr(reproduce, "RECIPES", recipes)
    monkeypatch.setattr(reproduce, "TABLES", {"1": ("Title", ("frechet", "motion"), {"first": "one", "second": "two"})})
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    started = lambda: (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
    return tmp_path, started


def go(folder, *flags, table="1"):
    reproduce.main(parse(reproduce.Config, [table, "--runs", str(folder / "runs"), *flags]))


def test_rows_are_skipped_once_finished_and_go_on_when_interrupted(bench, capfd):
    folder, started = bench
    (folder / "bad").touch()
    with pytest.raises(SystemExit, match="row two failed"):
        go(folder)
    assert [line.split("/")[-1] for line in started()] == ["one --steps 60", "two --steps 60"]
    result = json.loads((folder / "results" / "one.json").read_text())
    assert result["recipe"] == "one" and result["training_seed"] == 0 and len(result["minutes"]) == 2
    assert result["seeds"][0]["student"]["frechet"][0] == 0.12346                       # five digits
    assert not (folder / "results" / "two.json").exists()
    (folder / "bad").unlink()
    go(folder)
    assert len(started()) == 3 and (folder / "results" / "two.json").exists()           # the same command, once more
    ledger = json.loads((folder / "runs" / "two" / "ledger.json").read_text())
    spent = next(iter(ledger.values()))
    assert spent["code"] == 0 and spent["seconds"] > 0.01                               # both attempts
    go(folder)
    assert len(started()) == 3 and "skipped" in capfd.readouterr().out
    (folder / "results" / "two.json").unlink()                                          # the ledger knows all else
    go(folder, "--row", "two")
    assert len(started()) == 3 and (folder / "results" / "two.json").exists()


def test_a_dry_run_prints_the_commands_and_a_small_one_stays_out_of_the_results(bench, capfd):
    folder, started = bench
    go(folder, "--dry_run", "--scale", "0.1")
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 4 and "--steps 6" in lines[0] and not started() and not (folder / "runs").exists()
    go(folder, "--scale", "0.01", "--row", "one")
    assert started()[0].endswith("--steps 2") and not (folder / "results").exists()
    assert (folder / "runs" / "one.json").exists()


def test_several_training_seeds_become_one_row(bench):
    folder, _ = bench
    for seed, value in enumerate((1.0, 2.0, 6.0)):
        go(folder, "--row", "one", "--seeds", str(seed + 1))
        file = folder / "results" / ("one.json" if not seed else f"one-seed{seed}.json")
        report = json.loads(file.read_text())
        assert report["training_seed"] == seed
        report["seeds"][0]["student"]["frechet"] = [value, value - 0.1, value + 0.1]
        file.write_text(json.dumps(report))
    text = reproduce.table_of("1", reproduce.results())
    assert "| first, 3 training seeds | 3 ±2.5 |" in text and "commit c" in text
    assert "Not run: second (`python reproduce.py 1 --row two`)." in text
    assert "motion" not in text                                                         # a column that nobody has


def test_report_fills_what_stands_between_markers(bench, monkeypatch):
    folder, _ = bench
    go(folder, "--row", "one")
    monkeypatch.setattr(reproduce, "blocks", lambda: {"table 1": reproduce.table_of("1", reproduce.results())})
    text = reproduce.fill("before\n<!-- table 1 -->\nold\n<!-- end -->\nbetween\n<!-- other -->\nkept\n<!-- end -->\n")
    assert text.startswith("before\n<!-- table 1 -->\n**Table 1. Title**") and "old" not in text
    assert text.endswith("<!-- end -->\nbetween\n<!-- other -->\nkept\n<!-- end -->\n")
    assert "| first | 0.123 ±0.05 |" in text
    assert reproduce.fill(text) == text


@pytest.mark.parametrize("name", reproduce.RECIPES)
def test_every_command_of_a_recipe_can_be_said(name, monkeypatch):
    """To a machine with a GPU; nothing is said twice."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for line in reproduce.RECIPES[name]:
        script, *words = reproduce.command(line, "runs/x", 1, 1)
        config = parse(TODAY[script].Config, words)
        assert (config.seed == 1) == script.startswith("train")
        flags = [word for word in words if word.startswith("--")]
        assert len(flags) == len(set(flags)), line
        assert not {"--compile", "--past"} <= {*flags}                  # each length of a past would be compiled anew
    assert name in reproduce.recipes_of("all")


def test_tables_name_recipes_and_figures_that_there_are():
    assert [*reproduce.TABLES] == [str(n) for n in range(1, 10)]
    for claim in claims.CLAIMS:
        _, columns, rows = reproduce.TABLES[claim.table]
        assert claim.figure in columns and {claim.ours[0], claim.other[0]} <= {*rows.values()}, claim
    smaller = reproduce.command(reproduce.RECIPES["small"][0], "r", 0, 0.01)
    assert "--compile" not in smaller and int(smaller[smaller.index("--steps") + 1]) == 90


@pytest.mark.parametrize("sign, better, ours, expected", [
    (-1, True, 1.0, "holds"), (-1, True, 1.8, "does not"), (-1, True, 2.5, "does not"),
    (-1, False, 2.2, "holds"), (-1, False, 2.5, "does not"), (1, True, 2.5, "holds"), (1, False, 1.0, "does not")])
def test_a_verdict_weighs_the_difference_against_both_intervals(sign, better, ours, expected):
    """Half-widths of 0.18 and 0.24 leave 0.3 of a difference to chance."""
    claim = claims.Claim("words", "says", "1", "x", (), (), sign, better)
    result, verdict = claims.verdict(claim, [ours, ours - 0.18, ours + 0.18], [2.0, 1.76, 2.24])
    assert verdict == expected and result == f"{ours:.3g} against 2 (±0.3)"


def test_claims_are_not_run_until_both_rows_are():
    last = lambda figures, reports: [line.split(" | ")[-1].removesuffix(" |") for line in
                                     claims.claims(figures, reports).splitlines()[2:]]
    empty = last({}, {})
    assert set(empty) == {"not run", "not testable here"} and empty.count("not testable here") == len(claims.ELSEWHERE)
    figures = {name: {"student": {"frechet": [value, value, value]}} for name, value in (("default", 1), ("causal", 2))}
    reports = {name: [{"minutes": {"a": 1.0, "b": 0.5}, "device": "GPU"}] for name in figures}
    assert last(figures, reports).count("holds") == 1                                   # only what those two decide
    line = next(line for line in claims.claims(figures, reports).splitlines() if line.endswith("holds |"))
    assert re.search(r"`python reproduce.py 2` \| GPU \| 3.0 \| frechet \| 1 against 2 \(±0\) \| holds", line)


@pytest.mark.slow
def test_a_whole_table_at_tiny_size(tmp_path):
    go(tmp_path, "--scale", "0.01", table="7")
    reports = {name: json.loads((tmp_path / "runs" / f"{name}.json").read_text()) for name in reproduce.recipes_of("7")}
    for name, report in reports.items():
        row = report["seeds"][0]["student, 4 steps"]
        assert {"frechet", "full turn: recognised", "ms a chunk"} <= row.keys()
        assert report["settings"]["student"].endswith(f"{name}/stage2/student.safetensors") and report["minutes"]
    assert shlex.split(next(iter(reports["lora-8"]["minutes"])))[0] == "train_stage2.py"
