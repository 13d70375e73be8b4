"""What is drawn around the example workflows: notes, and groups with the places of the nodes.

The nodes themselves are in `example_workflows/api/<name>.json`; here they are named by their titles. Notes contain no code in
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
- **DeepCache** evaluates the deep blocks on every second step only.
- **KSampler (IEC)** takes as many evaluations as the stock sampler, and corrects the steps before the full ones by these
  (correction_steps auto).
"""

MEASURED = """
**Measure it on your model.** What caches and corrections do to images was measured on the pack's small models only. There
the correction lowered the error, and half as many steps without a cache were about as good as the cache. The workflow
*compare_and_plot* has the nodes to measure with.
"""


def checkpoint_page(title, model, size):
    """Return the page of a text-to-image workflow with a one-file checkpoint."""
    note = f"""## {title}: quantized, cached, corrected

Text to image with half of the steps evaluated in full. Made for {size} pixels.

**You need** the checkpoint **{model}** in models/checkpoints.

- **Quantize Model** makes Linear and Conv2d layers compute with 8-bit integers, in about half the memory.
{CACHED_RUN.strip()}

To keep the quantized model in a file, put **Save Quantized Model (IEC)** behind Quantize Model; LoRAs stand before it.
{MEASURED}"""
    model = (("Checkpoint", "Image size"), ("Quantize to 8 bits",), ("Cache every second step",))
    columns = (
        (Group(FASTER, BLUE, model), Group("2. Prompt", GREEN, (("Prompt",), ("Negative prompt",)))),
        (Group("3. Corrected sampling", ORANGE, (("Sample, corrected at no cost",),)),),
        (Group("4. Image", PURPLE, (("Decode", "Save"),)),),
    )
    return Page(note, columns)


FASTER = "1. Model, made faster and less exact"
BUILTIN = (("Built-in model", "Pixels, no VAE"), ("Quantize to 8 bits",), ("Cache every second step",))

QUICK_START = Page(
    note=f"""## Quick start

Text to image that runs everywhere: the model comes with the pack, and draws emoji of 32 x 32 pixels. Press **Run**; it takes
some seconds on a CPU.

- **Quantize Model** makes its layers compute with 8-bit integers.
{CACHED_RUN.strip()}
- **IEC Report** shows which steps were corrected, and by how much that moved them.

**To try**

- other labels: the help page of Class Label lists them
- interval 3 and 5, which are faster and less exact
- correction_steps none
- correction_steps ends:1/10, the paper's own rule: the node says what it does by itself
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

- **flux1-dev.safetensors** in models/diffusion_models, in 16 bits: files in fp8 are quantized already and stay as they are
- **clip_l.safetensors** and **t5xxl_fp16.safetensors** in models/text_encoders
- **ae.safetensors** in models/vae

**What happens**

- **Quantize Model** makes the Linear layers compute with 8-bit integers, in about half the memory.
- **KSampler (IEC)** takes as many evaluations as the stock sampler, and corrects each step by the next one's own
  (correction_steps auto). On the schedule simple that lowered the error of the pack's small transformer to the exact
  solution from 0.140 to 0.088; with Flux nothing has been measured.
- For a cache put **DeepCache (IEC)** behind the quantization.
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

Draws a part of an image anew. Right-click the image, choose **Open in MaskEditor**, paint over that part and save. What is
outside the mask stays as the stock sampler leaves it, bit for bit.

**You need** the checkpoint **v1-5-pruned-emaonly-fp16.safetensors** in models/checkpoints, and an image of about 512 x 512
pixels.

- **Set Latent Noise Mask** says where to draw. A lower denoise keeps something of what was there.
- **Quantize Model** makes Linear and Conv2d layers compute with 8-bit integers, in about half the memory.
{CACHED_RUN.strip()}
{MEASURED}""",
    columns=(
        (
            Group(FASTER, BLUE, (("Checkpoint",), ("Quantize to 8 bits",), ("Cache every second step",))),
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

With the model that comes with the pack: hearts are drawn first, and then the right half of each anew, as a flower. The left
half stays as it was. Press **Run**; it takes some seconds on a CPU.

- **Set Latent Noise Mask** carries the mask. Where a mask is soft, the correction is weaker by as much.
{CACHED_RUN.strip()}

With your own image and mask it goes as in *sd15_inpaint*.
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

Coarse steps, rounded weights and reused features move a result away from the solution that the model stands for. Here it is
seen by how much, and what a correction that costs no evaluation takes back of it. Whether it helps yours is measured like this.

Eight runs of the model that comes with the pack, from the same noise. The first takes the same steps with heun, of second order
and twice the evaluations, and is the reference of the others. Press **Run**; it takes about a minute on a CPU.

- Every sampler has keep_latents on, a label, and the seed of the node on the left.
- correction_steps **auto** corrects every step but the last by the next one's evaluation; with a cache the steps before full
  ones.
- **Join Reports** puts the runs' reports in order. Table, plots and images are made of these.
- **Table**: evaluations, seconds, error of the final latent, PSNR.
- **Error per step** shows where in a run the error arises.
- **Error over cost** shows what it costs to lower it. Seconds of the first run after a start are longer: press Run twice, the
  second time with another seed.
- **Images and differences**: below each image is eight times its difference to the reference.

For another model, exchange loader, prompts, latent and VAE, and set the samplers' cfg to what it wants.
""",
    columns=(
        (
            Group(
                "1. Model",
                BLUE,
                (
                    ("Built-in model", "Pixels, no VAE", "Seed of all runs"),
                    ("Quantize to 8 bits",),
                    ("Cache every second step", "Cache every third step"),
                    ("Quantized, every third step",),
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

What a quantized and cached model needs is found out once, and kept in two files; *load_and_sample* reads them again. It runs
with the model that comes with the pack. Press **Run**; it takes one to two minutes on a CPU.

1. **Calibrate Quantization** finds the scales of the activations, one for each layer and step.
2. **Calibrate CacheQuant** finds which steps to evaluate in full, and how to correct what the others reuse.
3. The model is written to models/diffusion_models, with its scales; the cache's profile to models/iec_profiles. Files of the
   same names are replaced.

Calibrate on prompts, size, steps, scheduler and cfg such as you sample with; more runs and prompts are better.
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

Samples with the two files that *calibrate_and_save* has written. Run that first, and then press **R** once, so that the
loaders know the files. Nothing is quantized or calibrated anew.

- The model's file has the scales of its activations too.
- The cache's profile is for the saved model, and for 20 steps on karras. Other seeds and prompts are fine.
- Which steps are evaluated in full was found by the calibration. correction_steps auto corrects the steps before these by
  their evaluations, at no cost; write none for the cache alone.
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

Makes a model small: each layer gets 4 bits or 8 or stays as it is, by what that costs the image. It runs with the model that
comes with the pack. Press **Run**; it takes about two minutes on a CPU.

1. **Calibrate Weights** runs the model on four prompts, rounds every layer to 4 and to 8 bits by what comes into it there, and
measures what each costs alone. Then it chooses what costs least at 5 bits a weight on average.
2. **Two runs** from the same noise, on prompts that it was not calibrated on: full precision, and mixed. In both
correction_steps is none, so that they differ by the bits alone.
3. **Layers**: what costs most at equal bytes stands first, and what stays as it is has 32 bits on a CPU. The last line says
what all together is expected to cost.
4. **File**: the mixed model goes to models/diffusion_models, where **Load Quantized Model (IEC)** finds it. A file of the same
name is replaced.
5. **Comparison**: the error of the final latent, about 0.03 on these four images. Mixed takes longer here: memory is what it
saves, and the model is too small to gain time. **Images**: beside them eight times their difference.

**What was measured**, with the pack's small U-Net: 5 bits take 0.332 of float16's memory and have an error of 0.041, on 32
images of 20 steps. 8 bits have 0.026, and 4 bits throughout 0.097. Other models have other numbers; this workflow tells yours.

**For your own model**

- Exchange loader, prompts, latents and VAE, and write its steps, cfg, sampler and scheduler into Calibrate Weights and both
samplers.
- Calibrate on four unlike prompts such as you sample with. 2 runs of each are better, and take longer.
- average_bits 6 keeps more, 4.5 takes less memory. With budget error you say how much a prediction may change instead.
- Measuring takes eight evaluations a layer, with SDXL some 6000: do it once, and load the file from then on.
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
}
