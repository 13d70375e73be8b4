"""Make the tables and figures of docs/results.md from the rows in docs/results, in seconds: nothing is sampled.

    python tools/answers.py

In docs/results.md a table stands between `<!-- table NAME -->` and `<!-- end -->`; only the text between them is replaced. If
the page does not exist, it starts as the list of the questions. A figure is docs/results/NAME.png. A missing row is left out,
and so is a figure without rows.
"""

import pathlib
import re
import sys

import comfyui
import experiment_rows
import experiments
from answer_figures import FIGURES
from answer_rows import read, read_norms
from answer_tables import TABLES

PAGE = comfyui.ROOT / "docs/results.md"
NORMS_ASKED = {
    "norms": "By how much does a step multiply an error, and does the correction contract?",
    "smoothness_norms": "Does a smaller Jacobian let errors grow less, and iterations contract more?",
}


def frame():
    """Return a page of all questions, with a place for each question's table and figure."""
    asked = {question.file: question.asked for question in experiment_rows.QUESTIONS} | NORMS_ASKED
    parts = [
        f"## {text}\n\n<!-- table {name} -->\n<!-- end -->\n\n![{text}](results/{name}.png)\n" for name, text in asked.items()
    ]
    return "\n".join(["# Results\n", *parts])


def with_tables(text, tables):
    """Return a page with the tables, {name: Markdown}, put at their places.

    Raises ValueError for a place that has no table, a place without an end, or a table without a place.
    """
    places = re.findall(r"<!-- table (\S+) -->\n(?:(?!<!-- table ).)*?<!-- end -->", text, re.DOTALL)
    begun = re.findall(r"<!-- table (\S+) -->", text)
    if wrong := [name for name in begun if name not in tables]:
        raise ValueError(f"{', '.join(wrong)}: there is no such table; the page can have {', '.join(tables)}.")
    if wrong := [name for name in begun if name not in places]:
        raise ValueError(f"{', '.join(wrong)}: the table's place has no end; write <!-- end --> below it.")
    if wrong := [name for name in tables if name not in places]:
        raise ValueError(
            f"{', '.join(wrong)}: the page has no place for this table; write <!-- table {wrong[0]} --> and its end."
        )
    for name, table in tables.items():
        place = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = place.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
    return text


def tables_of(rows):
    """Return {name: Markdown} of all tables; rows: {name: the rows that are there}."""
    return {name: table(rows[name]) if rows[name] else "No row is there yet." for name, table in TABLES.items()}


def write(results=experiments.RESULTS, page=PAGE):
    """Put the tables into the page, and write the figures next to the rows; return the paths that were written."""
    results, page = pathlib.Path(results), pathlib.Path(page)
    rows = read(results) | read_norms(results)
    page.write_text(with_tables(page.read_text() if page.exists() else frame(), tables_of(rows)))
    figures = {name: draw(rows[name]) for name, draw in FIGURES.items() if rows[name]}
    drawn = {results / f"{name}.png": figure for name, figure in figures.items() if figure}
    for path, figure in drawn.items():
        figure.savefig(path, metadata={"Software": None})
    return [page, *drawn]


if __name__ == "__main__":
    try:
        print(*write(), sep="\n")
    except (OSError, ValueError) as failure:
        sys.exit(str(failure))
