"""RESULTS.md says what the JSON beside it says."""

import json
from pathlib import Path

import pytest

import bench

ROOT = Path(bench.__file__).parent


@pytest.mark.parametrize("name", ["forward", "train"])
def test_tables_are_those_of_the_json(name):
    report = json.loads((ROOT / "results" / f"{name}.json").read_text())
    text = (ROOT / "RESULTS.md").read_text()
    assert "\n".join(bench.table(report["rows"])) in text and report["commit"] in text
