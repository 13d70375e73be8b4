"""Measure how far the images of a built-in model are from the real ones, to decide whether to train it further.

    python tools/model_distance.py [--architecture transformer] [--model FILE] [--images N] [--cfg 1 3]

The Fréchet and kernel distances of images of 20 `euler` steps to all images of the training data, in the components of
`imagenet.py`. As a floor, the Fréchet distance of as many real images to all real images. Only distances of equally many images
are comparable.
"""

import argparse
import pathlib

import comfyui
import experiment_samples
import imagenet
import numpy as np
import sample_distance
import torch
from experiment_rows import CHUNK, EXACT_SCHEDULER, Row, Run


def components(sampler, run, images):
    """Return the components float64 [images, 64] of the images of a run."""
    parts = [sampler.chunk(chunk)[0] for chunk in Row("", run, images).chunks_of(run)]
    return imagenet.real().of(experiment_samples.pixels(torch.cat(parts))).numpy()


def floor(images):
    """Return the Fréchet distance of this many real images, drawn without replacement, to all real images."""
    real = imagenet.real().components.numpy()
    drawn = np.random.default_rng(0).permutation(len(real))[:images]
    return sample_distance.frechet_distance(real[drawn], real)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=EXACT_SCHEDULER, default="unet")
    parser.add_argument("--model", type=pathlib.Path, metavar="FILE", help="weights other than the built-in ones")
    parser.add_argument("--images", type=int, default=256, help=f"a multiple of {CHUNK}")
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 3.0])
    options = parser.parse_args()
    path = (options.model or experiment_samples.WEIGHTS[options.architecture]).resolve()
    nodes, real = comfyui.load_nodes(cpu=not torch.cuda.is_available()), imagenet.real().components.numpy()
    sampler = experiment_samples.Sampler(nodes, lambda run: path)
    print(f"{path.name}, {options.images} images, floor {floor(options.images):.1f}", flush=True)
    for cfg in options.cfg:
        run = Run(architecture=options.architecture, scheduler=EXACT_SCHEDULER[options.architecture], cfg=cfg)
        with torch.inference_mode():
            found = components(sampler, run, options.images)
        for kind in sample_distance.MEASURES:
            one, _ = sample_distance.measured(kind, found, real)
            print(f"cfg {cfg:g}: {kind} {one.value:.4g} ({one.low:.4g} to {one.high:.4g})", flush=True)


if __name__ == "__main__":
    main()
