"""The runner of experiments, with synthetic images instead of sampled ones."""

import contextlib
import csv
import hashlib
from dataclasses import replace
from types import SimpleNamespace

import experiment_ray
import experiment_rows
import experiment_samples
import experiments
import norms
import numpy as np
import pytest
import sample_distance
import torch
import train_smooth
from experiment_rows import Chunk, Row, Run, TunedRun

PLAIN = Run(steps=4)
CORRECTED = replace(PLAIN, correction_steps="all")
COARSE = replace(PLAIN, quantization="W8A8")
ANCESTRAL = replace(PLAIN, sampler="euler_ancestral")
FILES = {"first": [CORRECTED, COARSE, PLAIN], "second": [ANCESTRAL]}


def declared(scale="small", chunk=8, images=16):
    return {name: [Row(name, run, images, chunk) for run in runs] for name, runs in FILES.items()}


def row_of(run, name="first"):
    return Row(name, run, 16)


def images_of(run, number, salt="", size=8):
    """Return synthetic latents of a chunk: the same content for all runs, plus noise that depends on the run."""
    shape = (size, 3, 32, 32)
    content = torch.randn(shape, generator=torch.Generator().manual_seed(number))
    seed = int(hashlib.sha256(f"{run.key} {number} {salt}".encode()).hexdigest()[:8], 16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return content.clamp(-1, 1) + (0.01 + 0.01 * len(run.key)) * noise


def features_of(latents):
    """Return synthetic features: 64 pixels of each image instead of the networks' features."""
    return {"emoji": latents[:, 0, 16, :].repeat(1, 2), "imagenet": latents[:, 1, 12:14, :].reshape(-1, 64).contiguous()}


class Fake:
    """Replace `experiment_samples.sampled`. told: the chunks that it was asked for; after `stop` chunks it is interrupted."""

    def __init__(self):
        self.told, self.stop, self.salt = [], None, ""

    def __call__(self, chunks, store, workers):
        for chunk in chunks:
            if self.stop is not None and len(self.told) == self.stop:
                raise KeyboardInterrupt
            self.told.append(chunk)
            images = images_of(chunk.run, chunk.number, self.salt, chunk.size)
            store.save(chunk, experiment_samples.content_of(chunk, images, chunk.run.steps, 1.0))
            yield chunk


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fake = Fake()
    monkeypatch.setattr(experiment_rows, "declared", declared)
    monkeypatch.setattr(experiment_samples, "features", features_of)
    monkeypatch.setattr(experiments, "sampled", fake)
    monkeypatch.setattr(experiments, "RESAMPLES", 20)
    few = {network: real[:100] for network, real in experiments.real_features().items()}
    monkeypatch.setattr(experiments, "real_features", lambda: few)
    monkeypatch.setattr(experiments, "CACHE", tmp_path / "cache")
    return fake


def run_all(folder, *more):
    return experiments.main(["--output", str(folder), "--workers", "1", *more])


def rows_of(folder, name="first"):
    with (folder / f"{name}.csv").open(newline="") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


def test_declared_rows_are_unique_and_have_their_baselines():
    files = experiment_rows.declared()
    for rows in files.values():
        assert len({row.key for row in rows}) == len(set(rows)) == len(rows)
        assert {row.baseline for row in rows} <= set(rows)
        assert all(row.images % row.chunk == 0 for row in rows)
    runs = {row.run for rows in files.values() for row in rows}
    assert len(runs) > 100 and len({experiment_samples.digest(run) for run in runs}) == len(runs)


def test_the_full_scale_has_the_same_runs_of_2048_images():
    small, full = experiment_rows.declared(), experiment_rows.declared("full", 256)
    assert [row.run for rows in full.values() for row in rows] == [row.run for rows in small.values() for row in rows]
    assert {(row.images, row.chunk) for rows in full.values() for row in rows} == {(2048, 256)}


def test_at_full_scale_the_sampling_backend_sets_the_chunk_size(monkeypatch):
    monkeypatch.setattr(experiment_ray, "at_once", lambda: 128)
    monkeypatch.setattr(experiment_samples, "at_once", lambda: 64)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert experiments.chunk_size("small") == 8 and experiments.chunk_size("full") == 64
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    assert experiments.chunk_size("small") == 8 and experiments.chunk_size("full") == 128


def test_the_smallest_gpu_of_a_cluster_sets_the_chunk_size(monkeypatch):
    """Ray is replaced, because there is no cluster with a GPU here."""
    found = iter([128, 64])
    workers = [SimpleNamespace(at_once=SimpleNamespace(remote=lambda: next(found))) for _ in range(2)]
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, "GPU": 2.0}, get=list)
    monkeypatch.setattr(experiment_ray, "_cluster", lambda: contextlib.nullcontext(ray))
    monkeypatch.setattr(experiment_ray, "_workers", lambda ray, most: workers)
    assert experiment_ray.at_once() == 64


def test_the_whole_list_takes_less_than_four_hours(tmp_path):
    rows = [row for rows in experiment_rows.declared().values() for row in rows]
    assert 10 < experiments.minutes(rows, experiment_samples.Store(tmp_path), workers=2) < 200
    longest = max(chunk.run.evaluations * chunk.size for row in rows for chunk in row.chunks)
    assert longest / experiments.SPEED < 60  # seconds that a kill may lose


@pytest.mark.parametrize(
    "run, evaluations",
    [
        (Run(), 40),
        (Run(cfg=1.0), 20),
        (Run(correction_steps="all"), 80),
        (Run(correction_steps="ends:1/10", max_iterations=3), 2 * (20 + 4 * 3)),
        (Run(sampler="heun"), 80),
        (Run(interval=5, correction_steps="full"), 2 * (20 * 0.28 + 4)),
        (Run(correction_steps="all", evaluation_point="ahead"), 40),
        (Run(control="averaged"), 80),
        (Run(control="last step alone"), 2 * (20 * 3 * 2)),  # except the last step, which is one evaluation
    ],
)
def test_costs_are_counted(run, evaluations):
    assert run.evaluations == pytest.approx(evaluations)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            {"control": "shrink"},
            "control: 'shrink' is none; name one of none, shrunk, epsilon1.005, averaged, last step alone.",
        ),
        ({"cache": "teacache", "interval": 2}, "cache: 'teacache' is none; name one of deepcache, calibrated."),
        ({"cache": "calibrated"}, "interval: at 1 there is no cache; leave cache and forecast out."),
        (
            {"control": "last step alone", "sampler": "heun"},
            "control: 'last step alone' works only with euler on a schedule of the host, without cache and correction.",
        ),
        ({"forecast": "linear"}, "interval: at 1 there is no cache; leave cache and forecast out."),
    ],
)
def test_meaningless_runs_are_refused(settings, sentence):
    with pytest.raises(ValueError) as refused:
        Run(**settings)
    assert str(refused.value) == sentence


def test_a_calibration_is_counted_once_per_worker(tmp_path):
    """Its eight runs have two images each, with guidance."""
    run = Run(interval=2, cache="calibrated", steps=10)
    row, store = Row("first", run, 16), experiment_samples.Store(tmp_path)
    of_images = sum(chunk.run.evaluations * 8 for chunk in row.chunks)
    for workers in (1, 2):
        expected = (of_images / workers + 8 * 2 * 10 * 2) / experiments.SPEED / 60
        assert experiments.minutes([row], store, workers) == pytest.approx(expected)


def test_references_are_full_precision_without_cache_and_correction():
    run = Run(quantization="W4A8", interval=3, forecast="linear", correction_steps="full", evaluation_point="next", lambda_=0.3)
    assert run.baseline == Run(quantization="W4A8", interval=3, forecast="linear")
    assert run.same_steps == Run() and run.exact == Run(sampler="heun", steps=experiment_rows.EXACT_STEPS)
    assert Run(architecture="transformer", scheduler="simple").exact.scheduler == "simple"
    controlled = Run(scheduler="quadratic", sampler="ddim", control="shrunk")
    assert controlled.baseline == controlled.same_steps == replace(controlled, control="none")
    assert controlled.exact == Run(scheduler="quadratic", sampler="heun", steps=2 * experiment_rows.EXACT_STEPS)
    assert Run(sampler="euler_ancestral").exact is None and list(Run(sampler="euler_ancestral").references) == ["same_steps"]
    assert list(run.references) == ["baseline", "same_steps", "exact"]


def relative(run, reference):
    """Return the relative error of every image, in float64, written out."""
    pairs = [(images_of(run, number).double(), images_of(reference, number).double()) for number in (0, 1)]
    return np.concatenate([((x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).numpy() for x, y in pairs])


def test_errors_agree_with_the_images(fake, tmp_path):
    assert run_all(tmp_path) == 0
    row, exact = rows_of(tmp_path)[CORRECTED.key], CORRECTED.exact
    each, before = relative(CORRECTED, exact), relative(PLAIN, exact)
    assert [float(value) for value in row["errors_exact"].split(";")] == pytest.approx(each.tolist(), rel=1e-3)
    assert float(row["error_exact"]) == pytest.approx(each.mean(), rel=1e-3)
    assert float(row["error_exact_low"]) < each.mean() < float(row["error_exact_high"])
    assert float(row["change_exact"]) == pytest.approx((each - before).mean(), rel=0.02)
    assert float(row["error_same_steps"]) == pytest.approx(relative(CORRECTED, PLAIN).mean(), rel=1e-3)
    # Two standard errors of the pairs: what the runs have in common cancels.
    width = float(row["change_exact_high"]) - float(row["change_exact_low"])
    assert width == pytest.approx(2 * 1.96 * (each - before).std() / 4, rel=0.3)
    assert (row["images"], row["chunk"]) == ("16", "8")
    assert (row["images"], row["nfe"], row["seconds"]) == ("16", "4", "2") and row["torch"] == torch.__version__


def test_more_steps_are_compared_with_the_fewer_that_they_replace(fake, tmp_path, monkeypatch):
    more = replace(PLAIN, steps=8, instead_of=4)
    rows = {"first": [row_of(run) for run in (PLAIN, replace(PLAIN, steps=8), more)]}
    monkeypatch.setattr(experiment_rows, "declared", lambda *_: rows)
    assert run_all(tmp_path) == 0
    assert {chunk.run for chunk in fake.told} == {PLAIN, replace(PLAIN, steps=8), PLAIN.exact}  # the same images for both
    row, itself = rows_of(tmp_path)[more.key], rows_of(tmp_path)[replace(PLAIN, steps=8).key]
    change = relative(replace(PLAIN, steps=8), PLAIN.exact) - relative(PLAIN, PLAIN.exact)
    assert float(row["change_exact"]) == pytest.approx(change.mean(), rel=0.02)
    assert row["change_same_steps"] == itself["change_exact"] == "" and float(row["error_same_steps"]) == 0
    assert row["error_exact"] == itself["error_exact"] and row["change_imagenet_frechet"] != ""


@pytest.mark.parametrize("network", ["emoji", "imagenet"])
def test_distances_agree_with_the_features(fake, tmp_path, network):
    run_all(tmp_path)
    row, real = rows_of(tmp_path)[CORRECTED.key], experiments.real_features()[network]

    def features(run):
        return np.concatenate([features_of(images_of(run, number))[network].double().numpy() for number in (0, 1)])

    own, before = features(CORRECTED), features(PLAIN)
    frechet, kernel = sample_distance.frechet_distance, sample_distance.kernel_distance
    for name, measure in {f"{network}_frechet": frechet, f"{network}_kernel": kernel}.items():
        assert float(row[name]) == pytest.approx(measure(own, real), rel=1e-3)
        change = measure(own, real) - measure(before, real)
        assert float(row[f"change_{name}"]) == pytest.approx(change, rel=0.02, abs=2e-3 * abs(measure(own, real)))
        assert float(row[f"{name}_low"]) < float(row[name]) < float(row[f"{name}_high"])
    assert rows_of(tmp_path)[PLAIN.key][f"change_{network}_frechet"] == ""


def test_a_baseline_has_no_change_and_a_stochastic_run_no_exact_solution(fake, tmp_path):
    run_all(tmp_path)
    plain, ancestral = rows_of(tmp_path)[PLAIN.key], rows_of(tmp_path, "second")[ANCESTRAL.key]
    assert float(plain["error_same_steps"]) == 0 and plain["change_exact"] == "" and float(plain["error_exact"]) > 0
    assert ancestral["error_exact"] == ancestral["errors_exact"] == ""


def test_existing_rows_are_not_computed_again(fake, tmp_path, capsys):
    run_all(tmp_path)
    assert list(rows_of(tmp_path)) == [run.key for run in FILES["first"]]  # the declared order
    before, told = (tmp_path / "first.csv").read_bytes(), len(fake.told)
    assert run_all(tmp_path) == 0 and "Nothing is missing" in capsys.readouterr().out
    assert (tmp_path / "first.csv").read_bytes() == before and len(fake.told) == told


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_a_stopped_run_continues_to_the_same_result(fake, tmp_path, stop):
    run_all(tmp_path / "whole")
    needed = len(fake.told)
    for path in experiments.CACHE.iterdir():
        path.unlink()
    fake.told, fake.stop = [], stop
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path / "stopped")
    fake.stop = None
    run_all(tmp_path / "stopped")
    assert len(fake.told) == len(set(fake.told)) == needed  # nothing was sampled twice
    for name in ("first.csv", "second.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_the_cheapest_row_comes_first(fake, tmp_path):
    fake.stop = 2 * len([COARSE, PLAIN, PLAIN.exact])
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path)
    assert list(rows_of(tmp_path)) == [COARSE.key, PLAIN.key]


def test_a_row_of_other_weights_counts_as_missing(fake, tmp_path, monkeypatch):
    run_all(tmp_path)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other weights")
    monkeypatch.setitem(experiment_samples.WEIGHTS, "unet", other)
    fake.told.clear()
    run_all(tmp_path)
    assert {chunk.run for chunk in fake.told} == {*FILES["first"], *FILES["second"], PLAIN.exact}
    assert rows_of(tmp_path)[PLAIN.key]["digest"] == experiment_samples.row_digest(row_of(PLAIN))


@pytest.mark.parametrize("name", ["images", "steps of the reference", "images at once"])
def test_a_row_of_other_images_or_another_reference_counts_as_missing(fake, tmp_path, monkeypatch, name):
    run_all(tmp_path)
    if name == "steps of the reference":
        monkeypatch.setattr(experiment_rows, "EXACT_STEPS", 7)
        expected = {Chunk(PLAIN.exact, 0, 8), Chunk(PLAIN.exact, 1, 8)}
    else:
        images, size = (24, 8) if name == "images" else (16, 4)
        monkeypatch.setattr(experiment_rows, "declared", lambda *_: declared(images=images, chunk=size))
        numbers = (2,) if name == "images" else range(4)
        runs = (CORRECTED, COARSE, PLAIN, ANCESTRAL, PLAIN.exact)
        expected = {Chunk(run, number, size) for run in runs for number in numbers}
    fake.told.clear()
    run_all(tmp_path)
    assert set(fake.told) == expected
    assert set(rows_of(tmp_path)) == {run.key for run in FILES["first"]}


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.write_bytes(b"")])
def test_a_damaged_chunk_is_sampled_again(fake, tmp_path, damage):
    run_all(tmp_path / "whole")
    damage(experiment_samples.Store(experiments.CACHE).path(Chunk(COARSE, 1, 8)))
    fake.told.clear()
    run_all(tmp_path / "again")
    assert fake.told == [Chunk(COARSE, 1, 8)]
    assert (tmp_path / "whole/first.csv").read_bytes() == (tmp_path / "again/first.csv").read_bytes()


def test_a_row_is_computed_again_on_request(fake, tmp_path, capsys):
    run_all(tmp_path)
    fake.told.clear()
    assert run_all(tmp_path, "--again", CORRECTED.key) == 0 and "the same digits" in capsys.readouterr().out
    assert {chunk.run for chunk in fake.told} == {CORRECTED, PLAIN, PLAIN.exact}
    fake.salt = "another machine's"
    assert run_all(tmp_path, "--again", CORRECTED.key) == 1 and "other digits in error_same_steps" in capsys.readouterr().out


def test_a_part_of_the_list(fake, tmp_path):
    assert run_all(tmp_path, "--only", "all paper") == 0
    assert list(rows_of(tmp_path)) == [CORRECTED.key, PLAIN.key]  # together with its baseline
    assert run_all(tmp_path / "none", "--minutes", "0") == 0 and not (tmp_path / "none").exists()
    assert run_all(tmp_path / "file", "--only", "first unet") == 0
    assert {path.stem for path in (tmp_path / "file").iterdir()} == {"first"}


def test_the_list_shows_missing_rows(fake, tmp_path, capsys):
    run_all(tmp_path, "--only", "ancestral")
    capsys.readouterr()
    assert run_all(tmp_path, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith("there")] == [f"second       {ANCESTRAL.key:60}  there"]
    assert lines[-1].startswith("3 of 4 rows are missing")


def test_images_of_a_row_are_drawn(fake, tmp_path):
    from PIL import Image

    assert run_all(tmp_path, "--images", COARSE.key, str(tmp_path / "a.png")) == 0
    drawn = np.asarray(Image.open(tmp_path / "a.png"))
    assert drawn.shape == (64, 256, 3)
    expected = ((images_of(COARSE, 1)[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(drawn[32:, :32] - expected).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--again", "faster"], "key: 'faster' is no row; --list has them all."),
        (["--images", "faster", "a.png"], "key: 'faster' is no row; --list has them all."),
        (["--again", PLAIN.key], f"again: the row '{PLAIN.key}' is not there yet; compute it first."),
        (["--only", "dpm"], "only: no row has 'dpm' in its file and key; --list has them all."),
        (["--workers", "0"], "workers: 0 is less than 1; one process at least samples."),
    ],
)
def test_wrong_arguments_end_in_a_sentence(fake, tmp_path, capsys, arguments, sentence):
    assert run_all(tmp_path / "rows", *arguments) == 2
    assert capsys.readouterr().err.strip() == sentence


def test_rows_without_their_weights_are_omitted_and_reported(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_smooth.comfyui, "CACHE", tmp_path)
    tuned = [Row("first", run, 16) for run in (TunedRun(steps=4), TunedRun(steps=4, weights="smooth"))]
    monkeypatch.setattr(experiment_rows, "declared", lambda *_: {"first": tuned})
    assert run_all(tmp_path) == 2 and {chunk.run.weights for chunk in fake.told} == {"built-in"}
    told = capsys.readouterr().err
    assert "weights: unet euler karras 4 cfg3 smooth weights needs weights that are not there; `make smooth`" in told
    assert list(rows_of(tmp_path)) == [tuned[0].key]


def test_norms_without_their_weights_are_omitted_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_smooth.comfyui, "CACHE", tmp_path)
    monkeypatch.setattr(norms, "results", lambda: experiments.Results(tmp_path, norms.declared(), norms.digest))
    measured = []
    monkeypatch.setattr(norms, "compute", lambda cases, *_: measured.extend(cases))
    (tuned,) = [case for case in norms.CASES if case.key == "unet W8A8 face longer weights"]
    for arguments in ([], ["--again", tuned.rows[0].key]):
        monkeypatch.setattr("sys.argv", ["norms.py", *arguments])
        assert norms.main() == 2
        assert "longer weights needs weights that are not there" in capsys.readouterr().err
    assert measured == [case for case in norms.CASES if case.run.weights == "built-in"]


def test_a_file_in_place_of_the_folder_is_refused(fake, tmp_path, capsys):
    (tmp_path / "rows").write_text("")
    assert run_all(tmp_path / "rows") == 2
    assert "is no folder" in capsys.readouterr().err


def test_norms_are_added_row_by_row_and_missing_for_other_settings(tmp_path, monkeypatch):
    case, other = norms.CASES[:2]
    found = norms.results(tmp_path)
    for row in case.rows:
        found.add(row, {"key": row.key, "digest": norms.digest(row), "growth": "1.5"})
    again = norms.results(tmp_path)
    assert all(again.get(row)["growth"] == "1.5" for row in case.rows) and again.get(other.rows[0]) is None
    monkeypatch.setitem(norms.SETTINGS, "seed", 8)
    assert again.get(case.rows[0]) is None
