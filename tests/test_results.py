"""RESULTS.md and README.md say what the JSON in results/ says."""

import json
import re

import pytest

import reproduce
from common import ROOT


@pytest.mark.parametrize("name", ["RESULTS.md", "README.md"])
def test_what_stands_between_markers_is_made_from_the_json(name):
    text = (ROOT / name).read_text()
    assert reproduce.fill(text) == text, "run python reproduce.py report"


def test_every_table_has_its_place():
    text = (ROOT / "RESULTS.md").read_text()
    marks = re.findall("<!-- (.*?) -->", text)
    tables = [f"table {n}" for n in range(1, 10)]
    sweeps = [f"sweep {name}" for name in ("default", "terms", "control")]
    assert [mark for mark in marks if mark != "end"] == ["claims", *tables, *sweeps, *reproduce.SPEED, "sweep shards"]
    assert marks.count("end") == 20


def test_speed_names_the_commit_of_its_json():
    text = (ROOT / "RESULTS.md").read_text()
    for name in reproduce.SPEED:
        assert json.loads((ROOT / "results" / f"{name}.json").read_text())["commit"] in text


def test_results_carry_what_made_them():
    files = [file for file in (ROOT / "results").glob("*.json") if file.stem not in reproduce.SPEED]
    for file in files:
        report = json.loads(file.read_text())
        assert {"settings", "commit", "device", "weights", "minutes", "recipe", "training_seed"} <= report.keys(), file
        assert report["recipe"] in reproduce.RECIPES and all(len(sha) == 64 for sha in report["weights"].values())
        assert "dirty" not in report["commit"], f"{file} was made with code that was not committed"
