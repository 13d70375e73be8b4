"""What one sampling run did and cost."""

from dataclasses import dataclass, field

import torch


@dataclass
class RunReport:
    """Filled by the corrected sampler while it runs.

    label: the run's name in tables and plots. correction: which steps, and where they are evaluated again. sigmas: the
    schedule, n + 1 values. nfe: evaluations of the denoiser. seconds: wall time of the sampler function. latents: with
    `keep_latents`, the latent at the start of every step and the final one, n + 1 float32 CPU tensors [B, ...]; a sampler
    that does not evaluate at a step's own sigma leaves None in its place. They are in the network's coordinates; `result`
    is the run's output as the host hands it on, which is what a VAE decodes.
    """

    label: str
    correction: str
    keep_latents: bool = False
    sigmas: list[float] = field(default_factory=list)
    nfe: int = 0
    seconds: float = 0.0
    latents: list[torch.Tensor | None] = field(default_factory=list)
    result: torch.Tensor | None = None

    def start(self, sigmas):
        """Begin a run over `sigmas` (n + 1 floats); whatever an earlier run left is dropped."""
        self.sigmas = list(sigmas)
        self.nfe = 0
        self.latents = [None] * len(self.sigmas)

    def keep(self, step, latent):
        """Keep the latent at the start of `step` (n for the final one), if latents are asked for."""
        if self.keep_latents:
            self.latents[step] = latent.detach().to("cpu", torch.float32, copy=True)
