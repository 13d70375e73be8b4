"""The tool that compares what a search finds with the best of all, on runs of four steps."""

import re

import found_settings
import pytest


@pytest.fixture(scope="module")
def settings(host, tmp_path_factory):
    """Return the Settings of the built-in U-Net, with rows of every number of steps on three runs; the search gets one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found_settings, "FILE", tmp_path_factory.mktemp("rows") / "rows.csv")
        for name, value in {
            "STEPS": 4, "TRIED": {"fewer_steps"}, "RUNS": range(3), "SEEN": 1, "TAKES": range(2), "DRAWS": 3, "LIMITS": (0.6,),
            "BUDGETS": (10,),
        }.items():  # fmt: skip
            patch.setattr(found_settings, name, value)
        made = found_settings.Settings(host.nodes, "unet")
        made.compute({}, end=float("inf"))
        yield made


def test_every_candidate_is_measured_and_no_row_twice(settings, monkeypatch):
    rows = found_settings.known_rows()
    assert len(rows) == 4 * 3 * 2 and not [row for row in rows.values() if row["reason"]]
    errors = [float(rows["unet", "none", "none", "none", str(level), "0", "0"]["error"]) for level in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True) and errors[3] == 0
    monkeypatch.setattr(settings, "measuring", lambda: pytest.fail("measured again"))
    settings.compute(rows, end=float("inf"))


def test_table_has_what_the_search_finds_next_to_the_best_of_all(settings, monkeypatch, capsys):
    """One step takes 1 s; a second time is longer by as much as it says here."""
    seconds = lambda row: int(row["level"]) * (1 if row["take"] == "0" else 1.2)  # noqa: E731
    rows = {key: row | {"seconds": str(seconds(row))} for key, row in found_settings.known_rows().items()}
    monkeypatch.setattr(found_settings, "known_rows", lambda: rows)
    found_settings.print_table([settings])
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].strip("|").split("|")]
    error = float(rows["unet", "none", "none", "none", "2", "0", "0"]["error"])
    assert cells[:7] == ["unet", "0.6", "10", f"2 steps: {error:.4f}", "2 steps", "1.00", "1.00"]
    assert re.fullmatch(r"1\.00 \(1\.00 to 1\.00\)", cells[7]) and cells[8] == "0.50 (0.50 to 0.50)"
