"""The tool that compares caches at equal cost, on short runs of one seed."""

import cache_comparison
import pytest
from cache_comparison import METHODS, Comparison, operations

STEPS, SHARE = 8, 0.5


@pytest.fixture(scope="module")
def compared(host):
    """Return the Comparison of the built-in U-Net on one seed. Its exact solution is replaced by eight steps of heun."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_comparison, "SEEDS", (11,))
        patch.setattr(cache_comparison, "COMPONENTS", 4)
        found = Comparison(host.nodes, "unet", {})
        found.exact = found.sample(found.builtin.model, STEPS, "heun")
        yield found


@pytest.mark.parametrize("method", ["auto", "dps", "fewer"])
def test_each_method_costs_about_the_share_and_has_the_error_of_its_images(compared, method):
    model, steps, detail = compared.variant(method, STEPS, "euler", SHARE)
    run = operations(lambda: compared.builtin.sample(model, 11, steps, "karras", "euler"))
    full = operations(lambda: compared.builtin.sample(compared.builtin.model, 11, STEPS, "karras", "euler"))
    assert run / full == pytest.approx(SHARE, abs=0.6 / STEPS), detail
    row = compared.row(method, STEPS, "euler", SHARE)
    latents = compared.sample(model, steps, "euler")
    reference = compared.sample(compared.builtin.model, STEPS, "euler")
    for name, other in (("error", reference), ("exact", compared.exact)):
        distances = (latents - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)
        assert float(row[name]) == pytest.approx(distances.mean().item(), rel=1e-3)
        assert distances.min() < float(row[f"{name}_low"]) < float(row[name]) < float(row[f"{name}_high"]) < distances.max()
    assert float(row["frechet"]) > 0
    assert (row["method"], row["steps"], row["share"], row["images"]) == (method, str(STEPS), str(SHARE), "8")


def test_threshold_of_a_cache_of_the_host_is_the_nearest_to_the_share(compared):
    model, _, share = compared._at_threshold("LazyCache", STEPS, "euler", SHARE, 0.0, 1.0)
    full = operations(lambda: compared.builtin.sample(compared.builtin.model, 11, STEPS, "karras", "euler"))
    run = operations(lambda: compared.builtin.sample(model, 11, STEPS, "karras", "euler"))
    assert share == pytest.approx(SHARE, abs=1 / STEPS) and run / full == pytest.approx(share, abs=1e-6)


def test_fewer_steps_with_other_noise_have_no_error(compared):
    row = compared.row("fewer", STEPS, "er_sde", SHARE)
    assert row["error"] == row["exact"] == "" and float(row["frechet"]) > 0


def test_rows_are_kept_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache_comparison, "FILE", tmp_path / "rows.csv")
    assert cache_comparison.known_rows() == {}
    row = dict.fromkeys(cache_comparison.COLUMNS, "1") | {"model": "unet", "sampler": "euler", "steps": "20"}
    for number, method in enumerate(METHODS):
        for share in ("0.5", "0.35"):
            cells = {"method": method, "share": share, "error": f"0.{number + 1}1", "detail": "9 in full"}
            cache_comparison.add(row | cells)
    assert len(cache_comparison.known_rows()) == 2 * len(METHODS)
    cache_comparison.print_table()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "| unet | euler | 20 | 0.5 | 9 | **0.11**, **1** | **0.11**, **1** | 0.31, **1** |" in lines[2]
