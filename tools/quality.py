"""Measure how well an efficient variant of the built-in model keeps its images."""

import benchmark
import torch
from sample_distance import frechet_distance

COMPONENTS = 16


class Features:
    """The built-in network's features of images: the mean over all pixels of its innermost block's output."""

    def __init__(self, model):
        self._patcher, self._model = model, model.model

    def of(self, images):
        """Return float64 [N, C] for latents [N, 3, 32, 32]."""
        import comfy.model_management

        comfy.model_management.load_models_gpu([self._patcher], force_full_load=True)
        found, device = [], self._patcher.load_device
        hook = self._model.diffusion_model.middle_block[-1].register_forward_hook(
            lambda module, args, out: found.append(out.mean((2, 3)).double().cpu())
        )
        try:
            for part in images.split(32):
                label = torch.zeros(len(part), self._model.diffusion_model.label_emb[0][0].in_features, device=device)
                sigma = torch.full((len(part),), 0.3, device=device)
                self._model.apply_model(part.to(device), sigma, c_crossattn=label[:, None], y=label)
        finally:
            hook.remove()
        return torch.cat(found)


class Quality:
    """Measure variants of a built-in model against the model's own runs, eight images per seed.

    The U-Net is sampled with `ddim` on `normal`, a flow model with `euler` on `simple`. floor: the Fréchet distance of as many
    images of other seeds. Features are the U-Net's for both models.
    """

    def __init__(self, nodes, steps, seeds, architecture="unet"):
        self.builtin, self.steps, self.seeds = benchmark.Builtin(nodes, architecture), steps, range(2, 2 + seeds)
        self.sampling = ("simple", "euler") if self.builtin.is_flow else ("normal", "ddim")
        self._features = Features(benchmark.Builtin(nodes).model if self.builtin.is_flow else self.builtin.model)
        self._references = [self.sample(self.builtin.model, seed) for seed in self.seeds]
        features = self._features.of(torch.cat(self._references))
        self._basis = torch.linalg.svd(features - features.mean(0), full_matrices=False).Vh[:COMPONENTS].T
        self._reference_features = features @ self._basis
        self.floor = self._distance([self.sample(self.builtin.model, seed + 1000) for seed in self.seeds])

    def sample(self, model, seed, steps=None, **correction):
        return self.builtin.sample(model, seed, steps or self.steps, *self.sampling, **correction)

    def of(self, model, **settings):
        """Return (error, PSNR in dB, Fréchet distance); settings: `steps` if it differs, and inputs of IECKSampler."""
        latents = [self.sample(model, seed, **settings) for seed in self.seeds]
        error = benchmark.mean_error(latents, self._references)
        return error, self._psnr(latents), self._distance(latents)

    def _psnr(self, latents):
        """Return the mean PSNR over images, whose values are in -1..1."""
        noise = [(x.clamp(-1, 1) - y.clamp(-1, 1)).square().flatten(1).mean(1) for x, y in zip(latents, self._references)]
        return (10 * torch.log10(4 / torch.cat(noise).clamp(min=1e-12))).mean().item()

    def _distance(self, latents):
        return frechet_distance(self._features.of(torch.cat(latents)) @ self._basis, self._reference_features)
