"""IECCompare: table, grid and plot of runs with known differences."""

import csv
import math

import pytest
import torch
from matplotlib.axes import Axes
from toy import PixelVAE

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


def compare(host, reports):
    if len(reports) > 1:
        names = ["reports", "more", *(f"more_{number}" for number in range(2, len(reports)))]
        (reports,) = host.run("IECJoinReports", **{name: [report] for name, report in zip(names, reports)})
    return host.run("IECCompare", reports=reports, vae=PixelVAE())


def test_reports_are_joined_in_the_order_of_the_inputs(host, reports):
    a, b = reports
    (chained,) = host.run("IECJoinReports", reports=[a], more=[b, a])
    assert chained == [a, b, a]
    (joined,) = host.run("IECJoinReports", reports=[a], more_7=[a, b], more=[b], more_3=None, more_2=chained)
    assert joined == [a, b, a, b, a, a, b]


def test_table_has_the_measured_values(host, reports):
    grid, plot, table, drawn = compare(host, reports)
    header, full, other = csv.reader(table.splitlines())
    assert header == ["variant", "correction_steps", "NFE", "seconds", "relative_error", "PSNR"]
    assert full[:3] == ["full", "none", "4"] and full[4:] == ["0.00000", "inf"]
    a, b = (report.latents[-1].double() for report in reports)
    error = ((b - a).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)).mean().item()
    mse = (PixelVAE().decode(b) - PixelVAE().decode(a)).square().mean().item()
    assert other[:3] == ["other", "all", "8"]
    assert float(other[4]) == pytest.approx(error, abs=1e-5)
    assert float(other[5]) == pytest.approx(-10 * math.log10(mse), abs=0.01)
    for picture in (grid, plot, drawn):
        assert picture.ndim == 4 and picture.shape[-1] == 3 and 0 <= picture.min() < picture.max() <= 1


def test_drawn_table_has_the_texts_of_the_table(host, sample, model, reports, monkeypatch):
    steps, label = "steps:0,1,2,3,4,5,6,7", "a label that is cut off where the next column begins"
    sample(model, reports, label=label, correction_steps=steps, steps=9, evaluation_point="next", keep_latents=True)
    drawn = []
    text = Axes.text
    monkeypatch.setattr(Axes, "text", lambda axes, x, y, s, **look: drawn.append((y, x, s)) or text(axes, x, y, s, **look))
    table = list(csv.reader(compare(host, reports)[2].splitlines()))[1:]
    lines = [[s for row, _, s in sorted(drawn) if row == number] for number in range(len(table) + 1)]
    assert lines[0] == ["run", "IEC", "NFE", "seconds", "relative\nerror", "PSNR\n(dB)"]
    assert lines[1:3] == table[:2] and lines[3][2:] == table[2][2:]
    begin, end = lines[3][0][:-1], lines[3][0][-1]
    assert end == "…" and len(begin) > 25 and label.startswith(begin) and lines[3][1] == "steps:0…6,7 next"


def test_runs_of_other_schedules_keep_their_final_error(host, sample, model, reports):
    sample(model, reports, label="more steps", keep_latents=True, steps=5)
    rows = list(csv.reader(compare(host, reports)[2].splitlines()))
    assert rows[3][:3] == ["more steps", "none", "5"] and 0 < float(rows[3][4]) < 1


def test_report_without_latents_is_refused(host, sample, model, reports):
    sample(model, reports, label="bare")
    with pytest.raises(ValueError, match=r"^reports: the run 'bare' kept no latents; only KSampler"):
        compare(host, reports)


def test_a_run_without_steps_is_refused_with_its_name(host, sample, model, reports):
    sample(model, reports, label="still", keep_latents=True, denoise=0.0)
    with pytest.raises(ValueError, match=r"^reports: the run 'still' took no steps, as with denoise 0"):
        compare(host, reports)


def test_reports_of_later_runs_are_joined_after_the_runs(host, model, stock_sample, reports):
    """Apply IEC's report log is empty at first, and must not be copied as if there were no runs."""
    corrected, log = host.run("IECApply", model=model, correction_steps="all", lambda_=0.5, max_iterations=1, tolerance=0.0)
    with pytest.raises(
        ValueError, match=r"^more_2: its runs have not been sampled yet; connect the latent of the last sampler"
    ):
        host.run("IECJoinReports", reports=reports[:1], more=reports[1:], more_2=log)
    latent = {"samples": torch.zeros(1, 3, 32, 32)}
    with pytest.raises(ValueError, match=r"^reports: it has no run in this prompt"):
        host.run("IECJoinReports", reports=log, more=reports, after=latent)
    stock_sample(corrected, steps=3)
    joined = host.run("IECJoinReports", reports=log, more=reports, after=latent)[0]
    assert [run.label for run in joined] == ["run 1", "full", "other"] and len(joined[0].steps) == 3
    host.run("IECReport", report=joined)


def test_runs_of_other_shapes_are_refused(host, sample, model, reports):
    latent = {"samples": torch.zeros(2, 3, 64, 32)}
    sample(model, reports, label="tall", keep_latents=True, steps=1, latent_image=latent)
    with pytest.raises(ValueError, match=r"^reports: the run 'tall' has latents of shape \(2, 3, 64, 32\)"):
        compare(host, reports)
