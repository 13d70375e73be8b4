"""Notes of the example workflows, and groups with the places of their nodes.

The nodes themselves are in `example_workflows/api/<name>.json`; here nodes are named by their titles. Notes contain no code in
backticks, because Nodes 2.0 does not show it legibly on a coloured note.
"""

from dataclasses import dataclass

BLUE, GREEN, ORANGE, PURPLE = "#3f789e", "#5a8a5a", "#b06634", "#8d4a8d"


@dataclass(frozen=True)
class Group:
    """A titled frame. columns: the titles of its nodes, as columns from left to right, each from top to bottom."""

    title: str
    color: str
    columns: tuple

    @property
    def nodes(self):
        """The titles of all its nodes."""
        return [title for column in self.columns for title in column]


@dataclass(frozen=True)
class Page:
    """A workflow's page. note: Markdown, to the left of everything else. columns: its groups, as columns from left to right,
    each from top to bottom.

    picture: the titles of the groups that its picture shows, default all. runs: whether it runs without a download. timed:
    whether it shows seconds, and therefore is run once before. after: the workflow whose files it reads.
    """

    note: str
    columns: tuple
    picture: tuple = ()
    runs: bool = False
    timed: bool = False
    after: str = ""

    @property
    def groups(self):
        """All its groups."""
        return [group for column in self.columns for group in column]


CACHED_RUN = """
- **DeepCache** evaluates the deep blocks on half of the steps only: those where reuse would cost most.
- **KSampler (IEC)** takes as many evaluations as the stock sampler. It corrects each step right before a fully evaluated
  step with that full step's evaluation (correction_steps auto).
"""

MEASURED = """
**Measure it on your model.** Caches and corrections were measured on the pack's small models only. There the correction
lowered the error, and the cache kept more of the image than half as many steps without one. *compare_and_plot* has the nodes
for it.
"""


def checkpoint_page(title, model, size):
    """Return the page of a text-to-image workflow with a one-file checkpoint."""
    note = f"""## {title}: quantized, cached, corrected

Text to image with half of the steps evaluated in full. Made for {size} pixels.

**You need** the checkpoint **{model}** in models/checkpoints.

- **Quantize Model** makes Linear and Conv2d layers compute with 8-bit integers, in about half the memory.
{CACHED_RUN.strip()}

To save the quantized model in a file, put **Save Quantized Model (IEC)** after Quantize Model and all LoRAs.
{MEASURED}"""
    model = (("Checkpoint", "Image size"), ("Quantize to 8 bits",), ("Cache half of the steps",))
    columns = (
        (Group(FASTER, BLUE, model), Group("2. Prompt", GREEN, (("Prompt",), ("Negative prompt",)))),
        (Group("3. Corrected sampling", ORANGE, (("Sample, corrected at no cost",),)),),
        (Group("4. Image", PURPLE, (("Decode", "Save"),)),),
    )
    return Page(note, columns)


FASTER = "1. Model, made faster and less exact"
BUILTIN = (("Built-in model", "Pixels, no VAE"), ("Quantize to 8 bits",), ("Cache half of the steps",))

QUICK_START = Page(
    note=f"""## Quick start

Text to image that runs everywhere: the model comes with the pack and draws emoji of 32 x 32 pixels. **Run** takes some
seconds on a CPU.

- **Quantize Model** makes its layers compute with 8-bit integers.
{CACHED_RUN.strip()}
- **IEC Report** shows which steps were corrected, and how far that moved the result.

**To try**

- other labels, listed on Class Label's help page
- interval 3 and 5, which are faster and less exact
- correction_steps none
- correction_steps ends:1/10, the paper's own rule: the node says how far this correction itself moves the result
""",
    columns=(
        (
            Group(FASTER, BLUE, BUILTIN),
            Group("2. What to draw", GREEN, (("Four images of 32 x 32 pixels",), ("What to draw", "No label, for guidance"))),
        ),
        (Group("3. Corrected sampling", ORANGE, (("Sample, corrected at no cost",),)),),
        (Group("4. Images", PURPLE, (("Decode", "Enlarge, pixel by pixel", "Save"),)),),
        (Group("5. What the run did", PURPLE, (("What the run did",),)),),
    ),
    runs=True,
)

FLUX = Page(
    note="""## Flux: quantized, corrected at no cost

Text to image with FLUX.1 dev. The model's own guidance is in Flux Guidance; cfg stays at 1, which evaluates the prompt alone.

**You need**

- **flux1-dev.safetensors** in models/diffusion_models, in 16 bits: files in fp8 are quantized already and stay unchanged
- **clip_l.safetensors** and **t5xxl_fp16.safetensors** in models/text_encoders
- **ae.safetensors** in models/vae

**What happens**

- **Quantize Model** makes the Linear layers compute with 8-bit integers, in about half the memory.
- **KSampler (IEC)** takes as many evaluations as the stock sampler, and corrects each step by the next one's
  (correction_steps auto). On the schedule simple (W8A8, 20 steps) this lowered the error of the pack's small transformer,
  relative to the exact solution, from 0.157 to 0.102; nothing has been measured with Flux.
- For a cache put **DeepCache (IEC)** after the quantization.
""",
    columns=(
        (
            Group("1. Model, made smaller and less exact", BLUE, (("Diffusion model", "VAE"), ("Quantize to 8 bits",))),
            Group("2. Prompt", GREEN, (("Text encoders", "Image size"), ("Prompt",))),
        ),
        (Group("Guidance", GREEN, (("Guidance of the model itself", "Not used at cfg 1"),)),),
        (Group("3. Corrected sampling", ORANGE, (("Sample, corrected at no cost",),)),),
        (Group("4. Image", PURPLE, (("Decode", "Save"),)),),
    ),
)

SD15_INPAINT = Page(
    note=f"""## In-painting with a corrected sampler

Draws a part of an image again. Right-click the image, choose **Open in MaskEditor**, paint over that part and save. Outside
the mask the result equals the stock sampler's, bit for bit.

**You need** the checkpoint **v1-5-pruned-emaonly-fp16.safetensors** in models/checkpoints, and an image of about 512 x 512
pixels.

- **Set Latent Noise Mask** says where to draw. A lower denoise keeps more of the old image.
- **Quantize Model** makes Linear and Conv2d layers compute with 8-bit integers, in about half the memory.
{CACHED_RUN.strip()}
{MEASURED}""",
    columns=(
        (
            Group(FASTER, BLUE, (("Checkpoint",), ("Quantize to 8 bits",), ("Cache half of the steps",))),
            Group(
                "2. Image, mask, prompt",
                GREEN,
                (
                    ("Image, with the mask painted on it",),
                    ("Prompt for the masked part", "Negative prompt"),
                    ("Encode", "Only the masked part"),
                ),
            ),
        ),
        (Group("3. Corrected sampling", ORANGE, (("Sample, corrected at no cost",),)),),
        (Group("4. Image", PURPLE, (("Decode", "Save"),)),),
    ),
)

BUILTIN_INPAINT = Page(
    note=f"""## In-painting that runs everywhere

This uses the model that comes with the pack. The first run draws hearts; the second draws the right half of each image
again, as a flower. The left half stays unchanged. **Run** takes some seconds on a CPU.

- **Set Latent Noise Mask** carries the mask. Where the mask is soft, the correction is multiplied by the mask.
{CACHED_RUN.strip()}

For your own image and mask, use *sd15_inpaint*.
""",
    columns=(
        (
            Group(FASTER, BLUE, BUILTIN),
            Group(
                "2. What to draw first",
                GREEN,
                (("Four images of 32 x 32 pixels",), ("First: a heart", "No label, for guidance")),
            ),
        ),
        (Group("3. First images", ORANGE, (("Sample the first image",),)),),
        (
            Group("Before", PURPLE, (("Decode the first", "Enlarge the first"), ("Before",))),
            Group(
                "4. Mask, and what to draw there",
                GREEN,
                (("Keep everything", "Half of it"), ("Mask: the right half",), ("Only the masked half", "Then: a flower")),
            ),
        ),
        (Group("5. Masked half", ORANGE, (("Sample the masked half anew",),)),),
        (Group("After", PURPLE, (("Decode the second", "Enlarge the second", "After"),)),),
    ),
    runs=True,
)

COMPARE_AND_PLOT = Page(
    note="""## Compare and plot

Coarse steps, rounded weights and reused features move a result away from the model's exact solution. This workflow shows how
far they move it, and how much of that distance a correction without additional evaluations takes back. Measure your own model
in the same way to see whether the correction helps it.

Eight runs of the model that comes with the pack, from the same noise. The first, the reference, takes the same steps with heun:
second order, twice the evaluations. **Run** takes about a minute on a CPU.

- Every sampler has keep_latents on, a label, and the seed of the node on the left.
- correction_steps **auto** corrects every step but the last with the next step's evaluation; with a cache it corrects only
  the steps right before a fully evaluated step.
- **Join Reports** puts the runs' reports in order. Table, plots and images use these.
- **Table**: evaluations, seconds, error of the final latent, PSNR.
- **Error per step** shows where in a run the error arises.
- **Error over cost** shows the cost of a lower error. The first run after a start takes longer: press Run twice, the second
  time with another seed.
- **Images and differences**: below each image is its difference from the reference, times eight.

For another model, replace loader, prompts, latent and VAE, and set the samplers' cfg for it.
""",
    columns=(
        (
            Group(
                "1. Model",
                BLUE,
                (
                    ("Built-in model", "Pixels, no VAE", "Seed of all runs"),
                    ("Quantize to 8 bits",),
                    ("Cache half of the steps", "Cache two thirds of the steps"),
                    ("Quantized, two thirds cached",),
                ),
            ),
            Group(
                "2. What to draw",
                GREEN,
                (("Four images of 32 x 32 pixels",), ("What to draw",), ("No label, for guidance",)),
            ),
        ),
        (
            Group(
                "3. Eight runs",
                ORANGE,
                (
                    ("1. Full precision with heun, the reference", "4. Cached, interval 2"),
                    ("2. Quantized", "3. Quantized, corrected at no cost"),
                    ("5. Cached, interval 3", "6. Cached, corrected at no cost"),
                    ("7. Quantized and cached", "8. Quantized and cached, corrected"),
                ),
            ),
        ),
        (Group("4. Table", BLUE, (("Runs in order", "Compare with run 1", "Table"),)),),
        (Group("5. Error", PURPLE, (("Error per step", "Error over cost"),)),),
        (Group("6. Images", PURPLE, (("Images and differences",),)),),
    ),
    picture=("4. Table", "5. Error", "6. Images"),
    runs=True,
    timed=True,
)

CALIBRATE_AND_SAVE = Page(
    note="""## Calibrate and save

This workflow finds once what a quantized and cached model needs, and keeps it in two files, which *load_and_sample* reads. It
uses the model that comes with the pack. Press **Run**; it takes one to two minutes on a CPU.

1. **Calibrate Quantization** finds the scales of the activations, one per layer and step.
2. **Calibrate CacheQuant** finds which steps to evaluate in full, and how to correct the reused features.
3. The model is written to models/diffusion_models, with its scales; the cache's profile to models/iec_profiles. Files of the
   same names are replaced.

Calibrate with prompts, size, steps, scheduler and cfg like those that you will sample with; more runs and prompts are better.
""",
    columns=(
        (
            Group("1. Model", BLUE, (("Built-in model",), ("Quantize to 8 bits",))),
            Group(
                "2. Prompts to calibrate on",
                GREEN,
                (("Two images of 32 x 32 pixels",), ("Prompt", "Another prompt", "No label, for guidance")),
            ),
        ),
        (Group("3. Activations", ORANGE, (("Find the scales of activations",),)),),
        (Group("4. Cache", ORANGE, (("Find the cache's schedule and maps",),)),),
        (Group("5. Files", PURPLE, (("Save the quantized model", "Save the cache profile"),)),),
    ),
    runs=True,
)

LOAD_AND_SAMPLE = Page(
    note="""## Load and sample

Samples with the two files that *calibrate_and_save* writes. Run that first, and then press **R** once, so that the loaders
know the files. Nothing is quantized or calibrated again.

- The model's file also has the scales of its activations.
- The cache's profile is for the saved model and for 20 steps on karras. Other seeds and prompts are fine.
- The calibration has chosen the steps that are evaluated in full. auto corrects the step right before each of them with that
  full step's evaluation, at no cost; set it to none for the cache alone.
""",
    columns=(
        (
            Group(
                "1. Files, put together",
                BLUE,
                (
                    ("Quantized model", "Cache profile"),
                    ("Calibrated cache", "Pixels, no VAE"),
                ),
            ),
            Group("2. What to draw", GREEN, (("Four images of 32 x 32 pixels",), ("What to draw", "No label, for guidance"))),
        ),
        (Group("3. Corrected sampling", ORANGE, (("Sample, corrected at no cost",),)),),
        (Group("4. Images", PURPLE, (("Decode", "Enlarge, pixel by pixel", "Save"),)),),
    ),
    runs=True,
    after="calibrate_and_save",
)

LESS_MEMORY = Page(
    note="""## 4 and 8 bits, mixed

Makes a model small: each layer gets 4 or 8 bits or stays unchanged, according to the error that this causes. It uses the
model that comes with the pack. Press **Run**; it takes about two minutes on a CPU.

1. **Calibrate Weights** runs the model on four prompts, rounds every layer to 4 and to 8 bits with the help of the layer's
inputs in these runs, and measures the error that each rounding alone causes. Then it chooses the bits with the least error at
5 bits per weight on average.
2. **Two runs** from the same noise, on prompts not used for calibration: full precision, and mixed. In both correction_steps is
none, so that they differ by the bits alone.
3. **Layers**: layers whose quantization costs the most error per saved byte come first; a layer that is not quantized has 32
bits on a CPU. The last line has the error expected of all together.
4. **File**: the mixed model goes to models/diffusion_models, where **Load Quantized Model (IEC)** finds it. A file of the same
name is replaced.
5. **Comparison**: the error of the final latent, about 0.03 on these four images. Mixed takes longer here: it saves memory,
and the model is too small to gain time. **Images**: next to the images is their difference, multiplied by eight.

**What was measured**, with the pack's small U-Net: 5 bits take 0.332 of float16's memory and have an error of 0.041, on 32
images of 20 steps. 8 bits have 0.026, and 4 bits throughout 0.097. For other models use this workflow.

**For your own model**

- Replace loader, prompts, latents and VAE, and set its steps, cfg, sampler and scheduler in Calibrate Weights and both
samplers.
- Calibrate on four different prompts like those you sample with. 2 runs of each are better, and take longer.
- average_bits 6 lowers the error, 4.5 the memory. With budget error you say instead how much a prediction may change.
- Measuring takes eight evaluations per layer, with SDXL some 6000: do it once, and load the file afterwards.
""",
    columns=(
        (
            Group("1. Model", BLUE, (("Built-in model",), ("Pixels, no VAE",))),
            Group(
                "2. Prompts to calibrate on",
                GREEN,
                (
                    ("Prompt", "Second prompt", "Third prompt", "Fourth prompt"),
                    ("No label, for guidance", "One image of 32 x 32 pixels"),
                ),
            ),
        ),
        (Group("3. Bits for each layer", ORANGE, (("4 and 8 bits, mixed",),)),),
        (
            Group(
                "4. Other prompts to draw",
                GREEN,
                (("What to draw", "Seed of both runs"), ("Four images of 32 x 32 pixels",)),
            ),
            Group("5. Two runs", ORANGE, (("1. Full precision, the reference",), ("2. Mixed",))),
        ),
        (
            Group("6. Layers", PURPLE, (("What each layer was given",),)),
            Group("7. File", PURPLE, (("Save the mixed model",),)),
        ),
        (Group("8. Comparison", BLUE, (("Runs in order", "Compare with run 1", "Table"),)),),
        (Group("9. Images", PURPLE, (("Images and differences",),)),),
    ),
    picture=("6. Layers", "7. File", "8. Comparison", "9. Images"),
    runs=True,
)

FIND_SETTINGS = Page(
    note="""## Find settings

Which steps, sampler, cache and bits make a model twice as fast at the least error? **Find Settings** measures it on your
machine, with your prompts. This uses the model that comes with the pack. Press **Run**; it takes one to two minutes on a CPU,
and the machine should do nothing else meanwhile.

- **Search**: Find Settings samples with the steps, cfg, sampler and scheduler that are set in it: the full run. Then it tries
what is turned on in it, and chooses the least error among what takes at most half of that time (limit 0.5). Effort quick takes
as long as about ten full runs. In the plot the ring marks what was chosen.
- **In half of the time**: a stock KSampler gets model, steps, sampler and scheduler over links. A cache, 8 bits or a
correction, if chosen, is in the model. Only cfg and denoise are set here: the same cfg as in Find Settings, and denoise 1.
- **In full**: the same noise and prompts, with the unchanged model and its own settings.
- **Verdict** says in words what was chosen, and **Table** lists everything that was tried. Errors are relative, of the final
latent; about 0.05 is hardly visible.

Prompts and seed of these two runs are not those of the search, so the images show whether what was found holds for others.
Change them and press Run again: the search is not repeated.

**For your own model**

- Replace loader, prompts, latent and VAE. The model must be in full precision, with its LoRAs, without a cache.
- Set its steps, cfg, sampler and scheduler in Find Settings and in Sample in full; in Sample with what was found, only cfg.
- Connect up to four prompts like those you sample with, and set effort to normal. With 30 seconds per run this takes about a
quarter of an hour, and is needed once.
""",
    columns=(
        (
            Group("1. Model", BLUE, (("Built-in model",), ("Pixels, no VAE",))),
            Group(
                "2. Prompts to measure on",
                GREEN,
                (("Prompt", "Second prompt"), ("No label, for guidance", "Four images of 32 x 32 pixels")),
            ),
            Group("3. Other prompts to draw", GREEN, (("What to draw",), ("Seed of both runs",))),
        ),
        (Group("4. Search", ORANGE, (("Half of the time, least error",),)),),
        (
            Group(
                "5. In half of the time",
                PURPLE,
                (("Sample with what was found", "Decode", "Enlarge, pixel by pixel"), ("Save",)),
            ),
            Group(
                "6. In full",
                BLUE,
                (("Sample in full", "Decode the full run", "Enlarge the full run"), ("Images of the full run",)),
            ),
        ),
        (Group("7. What was found, and what was tried", ORANGE, (("Verdict", "Table"),)),),
    ),
    picture=("4. Search", "5. In half of the time", "6. In full"),
    runs=True,
)

# In drawing order: a workflow that reads another workflow's files comes after it.
PAGES = {
    "quick_start": QUICK_START,
    "sd15_text_to_image": checkpoint_page("Stable Diffusion 1.5", "v1-5-pruned-emaonly-fp16.safetensors", "512 x 512"),
    "sdxl_text_to_image": checkpoint_page("SDXL", "sd_xl_base_1.0.safetensors", "1024 x 1024"),
    "flux_text_to_image": FLUX,
    "sd15_inpaint": SD15_INPAINT,
    "builtin_inpaint": BUILTIN_INPAINT,
    "compare_and_plot": COMPARE_AND_PLOT,
    "calibrate_and_save": CALIBRATE_AND_SAVE,
    "load_and_sample": LOAD_AND_SAMPLE,
    "less_memory": LESS_MEMORY,
    "find_settings": FIND_SETTINGS,
}
