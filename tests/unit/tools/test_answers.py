"""The tables and figures of docs/results.md, compared with rows that are written out here."""

import csv
import re
import shutil
from dataclasses import replace

import answer_figures
import answer_rows
import answer_tables
import answers
import experiment_rows
import experiment_samples
import experiments
import norms
import numpy as np
import pytest
import times
from experiment_rows import AUTHORS, Run

PLAIN = Run()
ALL = replace(PLAIN, correction_steps="all")
IMAGES = np.linspace(0.8, 1.2, 16)  # each image's error, as a share of the mean
NOISE = 1 + 0.3 * np.random.default_rng(0).normal(size=16)
LOWER, HIGHER, UNSURE = (-0.02, -0.03, -0.01), (0.02, 0.01, 0.03), (0.01, -0.01, 0.03)


def columns_of(run, error, change=None, time=1.0, errors=None):
    """Return the columns of a row that the answers read.

    change: (value, low, high) of its distances. time: of a choice. errors: of the images.
    """
    error = None if run.exact is None else error
    is_itself = run.sampled == run.same_steps
    errors = error * IMAGES if errors is None and error is not None else errors
    numbers = {
        "error_exact": None if error is None else (error, error - 0.01, error + 0.01),
        "error_same_steps": (0, 0, 0) if is_itself else (0.1, 0.05, 0.15),
        "change_exact": change if error is not None else None,
        "change_imagenet_frechet": change,
        "change_imagenet_kernel": change,
        "imagenet_frechet": (50, 48, 52),
        "imagenet_kernel": (2.5, 2.25, 2.75),
    }
    texts = {"images": "16", "nfe": str(run.steps), "time": str(time)}
    for name, values in numbers.items():
        texts |= {name + end: str(value) for end, value in zip(("", "_low", "_high"), values or ("", "", ""))}
    each = {"errors_exact": [] if errors is None else errors, "errors_same_steps": (0 if is_itself else 0.1) * IMAGES}
    return texts | {name: ";".join(f"{value:.6g}" for value in values) for name, values in each.items()}


def found(**rows):
    """Return Found of runs, in their order: name=(run, further arguments of `columns_of`)."""
    return answer_rows.with_baselines({run: columns_of(run, *more) for run, *more in rows.values()})


def test_lower_errors_are_bold_and_higher_errors_in_italics():
    errors = {"lower": 0.05 * IMAGES, "higher": 0.15 * IMAGES, "unsure": 0.102 * IMAGES * NOISE}
    wanted = {"lower": "**0.070**", "higher": "*0.070*", "unsure": "0.070"}
    for name, each in errors.items():
        plain, corrected = found(plain=(PLAIN, 0.1), corrected=(ALL, 0.07, LOWER, 1.0, each))
        assert answer_tables.error(plain) == "0.100" and answer_tables.error(corrected) == wanted[name], name
    assert answer_tables.error(found(corrected=(ALL, 0.07))[0]) == "0.070"  # the uncorrected run is not there yet


def test_a_ratio_is_relative_to_the_run_without_a_correction():
    _, corrected = found(plain=(PLAIN, 0.2), corrected=(ALL, 0.1))
    assert corrected.ratio("exact") == pytest.approx((0.5, 0.5, 0.5), rel=1e-4)
    rows = found(plain=(PLAIN, 0.2), corrected=(ALL, 0.1, None, 1.0, 0.1 * IMAGES * NOISE))
    value, low, high = rows[1].ratio("exact")
    assert low < value < high and value == pytest.approx(0.5 * (IMAGES * NOISE).mean() / IMAGES.mean(), rel=1e-4)
    line = answer_figures.ratios(rows).axes[0].containers[0].lines
    assert line[0].get_xdata() == pytest.approx([value])
    assert line[2][0].get_segments()[0][:, 0] == pytest.approx([low, high])
    assert answer_figures.ratios(rows[:1]) is None


def test_a_correction_of_an_exact_run_counts_as_an_error():
    plain, corrected = found(plain=(PLAIN, 0.1), corrected=(ALL, 0.1))
    assert answer_tables.error(corrected, "same_steps") == "*0.100*"
    nothing = replace(corrected, columns=plain.columns)  # corrected nothing
    assert answer_tables.error(nothing, "same_steps") == "0.000"


def test_more_steps_are_compared_to_the_exact_solution_only():
    more = replace(PLAIN, steps=40, instead_of=20)
    _, instead = found(plain=(PLAIN, 0.2), more=(more, 0.1))
    assert answer_tables.both(instead) == "**0.100** (0.000)"


def test_distances_and_their_changes():
    (lower,) = found(run=(ALL, 0.1, LOWER))
    assert answer_tables.change(lower, "imagenet_frechet") == "**-0.02 (-0.03 to -0.01)**"
    assert answer_tables.change(found(run=(ALL, 0.1, HIGHER))[0], "imagenet_frechet") == "*+0.02 (+0.01 to +0.03)*"
    assert answer_tables.change(found(run=(ALL, 0.1, UNSURE))[0], "imagenet_frechet") == "+0.01 (-0.01 to +0.03)"
    assert answer_tables.change(found(run=(PLAIN, 0.1))[0], "imagenet_frechet") == "-"
    assert answer_tables.distance(lower, "imagenet_frechet") == "50 ± 2"


def test_a_run_with_its_own_noise_has_no_error_to_an_exact_solution():
    (row,) = found(run=(Run(sampler="euler_ancestral"), 0.1))
    assert answer_tables.both(row) == "- (0.000)" and row.ratio("exact") is None


def test_a_figure_of_changes_has_one_panel_per_kind():
    noise = replace(PLAIN, sampler="euler_ancestral")
    for plain, panels in ((PLAIN, 2), (noise, 1)):
        rows = found(plain=(plain, 0.1), corrected=(replace(plain, correction_steps="all"), 0.1, LOWER))
        assert len(answer_figures.changes(rows).axes) == panels


def test_a_table_has_a_line_for_each_subject_and_a_column_for_each_rule():
    quantized, corrected = (replace(run, quantization="W8A8") for run in (PLAIN, ALL))
    instead = replace(PLAIN, steps=40, instead_of=20)
    rows = found(a=(PLAIN, 0.1), b=(ALL, 0.2), c=(quantized, 0.3), d=(corrected, 0.25), e=(instead, 0.05))
    assert answer_tables.by_rule(rows).splitlines() == [
        "| precision | none | all, paper | 40 steps |",
        "| --- | --- | --- | --- |",
        "| full precision | 0.100 (0.000) | *0.200* (*0.100*) | **0.050** (0.000) |",
        "| W8A8 | 0.300 (0.100) | **0.250** (0.100) | - |",
    ]


def test_distances_are_listed_by_precision():
    quantized, shrunk = replace(AUTHORS, quantization="W8A8"), replace(AUTHORS, control="shrunk")
    table = answer_tables.by_distance(found(a=(AUTHORS, 0.1), b=(quantized, 0.1), c=(shrunk, 0.1, UNSURE))).splitlines()
    assert table[0] == (
        "| precision | corrected | evaluations | Fréchet | its change | kernel | its change | same steps | exact |"
    )
    assert [line.split(" | ")[:2] for line in table[2:]] == [
        ["| full precision", "none"],
        ["| full precision", "shrunk"],
        ["| W8A8", "none"],
    ]
    assert table[3].endswith("| 50 ± 2 | +0.01 (-0.01 to +0.03) | 2.5 ± 0.25 | +0.01 (-0.01 to +0.03) | *0.100* | 0.100 |")


def test_schedules_and_dampings():
    ahead, normal = replace(ALL, evaluation_point="ahead"), {"scheduler": "normal"}
    rows = found(
        a=(PLAIN, 0.1), b=(ahead, 0.05), c=(replace(PLAIN, **normal), 0.2), d=(replace(ahead, **normal), 0.2),
        e=(replace(PLAIN, steps=10), 0.4), f=(replace(ahead, steps=10), 0.5),
    )  # fmt: skip
    assert answer_tables.by_steps(rows).splitlines() == [
        "| schedule | 20 steps | 10 steps |",
        "| --- | --- | --- |",
        "| karras | 0.100 → **0.050** (*0.100*) | 0.400 → *0.500* (*0.100*) |",
        "| normal | 0.200 → 0.200 (*0.100*) | - |",
    ]
    rows = found(plain=(PLAIN, 0.1), a=(replace(ALL, lambda_=0.9), 0.9), b=(replace(ALL, lambda_=0.1), 0.2))
    assert answer_tables.by_damping(rows).splitlines()[::2] == [
        "| precision | evaluated | none | 0.1 | 0.9 |",
        "| full precision | paper | 0.100 (0.000) | *0.200* (*0.100*) | *0.900* (*0.100*) |",
    ]


def test_the_front_has_all_runs_that_are_not_dominated():
    points = [(0.25, 0.5), (0.12, 0.9), (0.2, 0.9), (0.5, 0.4), (0.53, 0.45), (0.25, 0.6)]
    runs = {str(place): (replace(PLAIN, steps=place + 1), *points[place][::-1]) for place in range(len(points))}
    rows = found(**{name: (run, error, None, time) for name, (run, error, time) in runs.items()})
    expected = {one for one in points if not any(a <= one[0] and b <= one[1] and (a, b) != one for a, b in points)}
    assert [answer_rows.place_of(one) for one in answer_rows.front(rows)] == sorted(expected)
    lines = answer_tables.by_choice(rows).splitlines()[2:]
    assert lines[0] == "| U-Net | euler | 2 | none | none | 2 | 0.12 | 0.900 (0.000) |" and len(lines) == 3


def test_tables_replace_their_places_on_the_page():
    page = "# A\n<!-- table rules -->\nold\n<!-- end -->\nB\n<!-- table steps -->\n<!-- end -->\n"
    tables = {"rules": "| 1 |", "steps": "| 2 |"}
    once = answers.with_tables(page, tables)
    assert once == "# A\n<!-- table rules -->\n\n| 1 |\n\n<!-- end -->\nB\n<!-- table steps -->\n\n| 2 |\n\n<!-- end -->\n"
    assert answers.with_tables(once, tables) == once


@pytest.mark.parametrize(
    "page, sentence",
    [
        ("<!-- table rule -->\n<!-- end -->", "rule: there is no such table; the page can have rules, steps."),
        (
            "<!-- table rules -->\nprose\n<!-- table steps -->\n<!-- end -->",
            "rules: the table's place has no end; write <!-- end --> below it.",
        ),
        (
            "<!-- table steps -->\n<!-- end -->",
            "rules: the page has no place for this table; write <!-- table rules --> and its end.",
        ),
    ],
)
def test_a_page_without_the_right_places_is_refused(page, sentence):
    with pytest.raises(ValueError) as refused:
        answers.with_tables(page, {"rules": "| 1 |", "steps": "| 2 |"})
    assert str(refused.value) == sentence


@pytest.fixture
def results(written_results, tmp_path):
    """Return the test's own folder with every declared row."""
    return shutil.copytree(written_results, tmp_path / "results")


@pytest.fixture(scope="module")
def written_results(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("results"), {}
    for name, rows in experiment_rows.declared().items():
        changes = [None if row.run.baseline == row.run else LOWER for row in rows]
        lines[name] = [
            {"key": row.key, "digest": experiment_samples.row_digest(row)} | columns_of(row.run, 1 / row.run.steps, change)
            for row, change in zip(rows, changes)
        ]
    for name, rows in norms.declared().items():
        lines[name] = [{"key": row.key, "digest": norms.digest(row), **texts_of(row.step)} for row in rows]
    seconds = {row: [row.run.evaluations] for row in times.declared()["times"]}
    lines["times"] = [times.columns(row, seconds) for row in seconds]
    for name, rows in lines.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    return folder


def texts_of(step, more=0.0, converged=True):
    """Return the norms of a step, as texts of a row."""
    values = {"growth": 1 + step / 10 + more, "true_growth": 1 + step / 5}
    for number in range(1, 10):
        values |= {f"contraction_0.{number}": 1 - number / 20, f"true_contraction_0.{number}": 1 - number / 40}
    values |= {f"residual_{number}": 0.1**number for number in range(1, 4)}
    return {name: f"{value:.4g}" for name, value in values.items()} | {"converged": str(converged)}


LABELS = {"face": 0.1, "flag": 0.0}


@pytest.mark.parametrize("converged, bound", [(True, ""), (False, "≥ ")])
def test_norms_are_the_largest_of_the_images(converged, bound):
    cases = [norms.Case("unet", "W8A8", label) for label in ("face", "flag")]
    texts = [texts_of(4, 0.1, converged), texts_of(4, 0.3) | {"true_contraction_0.9": ""}]  # one that was not finite
    rows = [(case.rows[1], columns) for case, columns in zip(cases, texts)]
    numbers = [f"{bound}{number}" for number in ("1.700", "1.800", "0.750", "0.875", "0.550", "nan")]
    assert answer_tables.by_norm(rows).splitlines()[2:] == [f"| U-Net | W8A8 | 4 | {' | '.join(numbers)} |"]


def test_norms_and_residuals_are_listed_per_weights():
    rows = [(norms.TunedCase("unet", "none", label, "smooth").rows[1], texts_of(4, more)) for label, more in LABELS.items()]
    numbers = " | ".join(("1.500", "1.800", "0.750", "0.1000", "0.0100", "0.0010"))
    assert answer_tables.by_weights(rows).splitlines()[2:] == [f"| smooth | full precision | 4 | {numbers} |"]


def test_the_repository_has_every_row_and_the_page_their_tables():
    """The rows must belong to the current weights and settings: if these change, run `make experiments` and similar targets."""
    sources = [(experiment_rows, experiment_samples.row_digest), (norms, norms.digest), (times, times.digest)]
    for source, digest in sources:
        files = source.declared()
        found = experiments.Results(experiments.RESULTS, files, digest)
        assert [row.key for rows in files.values() for row in rows if found.get(row) is None] == []
    page = answers.PAGE.read_text()
    rows = answer_rows.read() | answer_rows.read_norms()
    assert answers.with_tables(page, answers.tables_of(rows)) == page
    figures = set(re.findall(r"\]\(results/(\w+)\.png\)", page))
    assert figures == set(answers.FIGURES) and all((experiments.RESULTS / f"{name}.png").exists() for name in figures)


def test_every_question_has_its_table_and_its_figure(results):
    page, names = results / "page.md", [*experiment_rows.declared(), *norms.declared()]
    written = answers.write(results, page)
    text = page.read_text()
    assert {path.stem for path in written} == {"page", *names}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    for name in names:
        assert f"<!-- table {name} -->\n\n| " in text and f"(results/{name}.png)" in text
    assert "No row is there yet." not in text and "nan" not in text
    found = answer_rows.read(results)
    assert all(len(rows) == len(found[name]) for name, rows in experiment_rows.declared().items())


def test_a_runs_time_is_relative_to_the_plain_run_of_the_same_round():
    plain, slow = (times.TimeRow(Run(steps=steps)) for steps in (20, 30))
    known, calls = iter([9, 1, 3, 2, 4, 1, 1.8]), []

    def sample(run):
        calls.append(run.steps)
        return next(known)

    cached = times.TimeRow(Run(steps=30, interval=2))
    assert slow.plain == cached.plain == plain
    told = times.columns(slow, times.measured([plain, slow], sample))
    assert calls == [20, *(20, 30) * 3]
    assert (told["time"], told["time_low"], told["time_high"], told["rounds"]) == ("2", "1.8", "3", "3")


def test_a_choice_without_a_time_is_omitted(results):
    (results / "times.csv").unlink()
    assert answer_rows.read(results)["choices"] == []


def test_missing_rows_are_omitted(tmp_path):
    page = tmp_path / "page.md"
    assert answers.write(tmp_path, page) == [page]
    assert page.read_text().count("No row is there yet.") == len(answers.TABLES)


def test_a_file_of_runs_without_a_correction_has_a_table_and_no_figure(results):
    for name in experiment_rows.declared():
        with (results / f"{name}.csv").open(newline="") as file:
            plain = [row for row in csv.DictReader(file) if " all " not in row["key"] and " instead" not in row["key"]]
        with (results / f"{name}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, plain[0])
            table.writeheader()
            table.writerow(plain[0])
    written = answers.write(results, results / "page.md")
    assert {path.stem for path in written} == {"page", "choices", *norms.declared()}


def test_the_page_asks_the_questions_of_the_experiments():
    page = " ".join(answers.PAGE.read_text(encoding="utf-8").split())
    assert [question.asked for question in experiment_rows.QUESTIONS if f"*{question.asked}*" not in page] == []
