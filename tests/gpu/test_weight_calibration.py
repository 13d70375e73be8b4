"""Weights that are calibrated on a GPU: the computation there, and a model through the node. Run with `make test-gpu`."""

import comfyui
import pytest
import torch

from iec_core.quantization.gptq import Metric, Moments, fitted, low_rank
from iec_core.quantization.packing import WeightFormat

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; run `make test-gpu` where there is one")


FORMATS = [WeightFormat("int4"), WeightFormat("int4", 32), WeightFormat("int4", 32, two_scales=True)]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_calibration_on_the_gpu_agrees_with_the_cpu(fmt):
    x, rows = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((4000, 256), (96, 256)))
    x = x @ (torch.eye(256) + 0.05 * torch.randn(256, 256, generator=torch.Generator().manual_seed(2)))
    found = {}
    for device in ("cpu", "cuda"):
        moments = Moments(256, 10**6, device)
        moments.take_up(x.to(device))
        metric = Metric(moments)
        values, scale = fitted(rows.to(device), fmt, metric)
        out, into = low_rank(rows.to(device), metric, 8)
        found[device] = values.cpu(), scale.cpu(), (out @ into).cpu()
    (values, scale, product), (expected, expected_scale, expected_product) = found["cuda"], found["cpu"]
    same = (scale == expected_scale).all(1)  # if two clipping ranges are equally good, the order of the sums may decide
    assert same.float().mean() > 0.9 and (values[same] == expected[same]).float().mean() > 0.99
    torch.testing.assert_close(product, expected_product, rtol=0, atol=1e-3 * expected_product.abs().max().item())


@torch.inference_mode()
def test_a_model_is_calibrated_and_sampled():
    nodes = comfyui.load_nodes(cpu=not torch.cuda.is_available())
    import nodes as host_nodes

    model = nodes["IECLoadBuiltinModel"].execute(precision="float16").result[0]
    positive, other, negative = (
        nodes["IECClassLabel"].execute(labels=text).result[0] for text in ("heart, person", "face, flag", "none")
    )
    sampling = {"steps": 6, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal"}
    latent = {"samples": torch.zeros(2, 3, 32, 32)}
    bits = {"weight_bits": "4", "activation_bits": "16", "keep_sensitive_layers": True}
    of_runs = {"positive": positive, "negative": negative, "latent_image": latent, "seed": 5, "runs": 2, **sampling}
    calibrated = nodes["IECCalibrateWeights"].execute(model=model, rank="auto", **bits, **of_runs).result[0]
    nearest = nodes["IECQuantizeModel"].execute(model=model, **bits).result[0]
    images = [
        host_nodes.common_ksampler(one, 31, *sampling.values(), other, negative, latent)[0]["samples"]
        for one in (calibrated, nearest, model)
    ]
    errors = [(image - images[2]).norm() / images[2].norm() for image in images]
    assert 0 < errors[0] < 0.7 * errors[1]
    layers = [layer for layer in calibrated.model.diffusion_model.modules() if hasattr(layer, "packing")]
    assert layers and all(layer.weight.dtype == torch.int8 for layer in layers)
