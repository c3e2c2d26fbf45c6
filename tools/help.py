"""Writes the help pages web/docs/<NodeId>.md: what is said here, and the inputs and outputs as the server knows them.

    python -m tools.help      (in ComfyUI's environment, $MIRA_COMFYUI set, as dev.py sets it)

Pictures, web/docs/pictures/<NodeId>.jpg, are made by tools.pictures.
"""

from __future__ import annotations

import asyncio

from .comfy import ROOT, Client, Server

FOLDER = ROOT / "web" / "docs"
LIMIT = """What matters: `preset`, `iterations` and `drift_limit`. **balanced** tries four seeds, begins from the best
one, and optimises it in three rounds; between two rounds the image is noised again and painted anew by the model, which
takes away what the model would not have painted and keeps most of the reward. `drift_limit` is how far an image may go
in each round: 0.02 stays close, 0.1 goes far (it adds up over the steps, so halve it for half the steps). More
`iterations` go further too. A preset writes its values into the advanced inputs, where you see them; change one, and the
preset is `custom`. For a reward that lives in texture, such as a style, lower `restart_denoise` to 0.4, or try
`variables` late or injected. The presets mira, dno, dno_prno, reno and initno run those methods as their authors do.

To see a restart without this node: put a stock KSampler behind it, `latent_image` from `optimized`, the same prompts and
steps, `denoise` 0.8 and another seed."""
FILES = """Files go into `models/mira_rewards`; nothing is downloaded by itself, and a missing file is named with its
size and where it is published. fp16 costs less than 2 % of accuracy. Prompts that are too long are cut as the original
cuts them, and the record says so."""

# Node id -> (what it is and when to use it, in a few paragraphs).
PAGES = {
    "MiraOptimizeKSampler": f"""A KSampler that optimises its noises, the initial one and every one that the sampler
injects, so that the image scores higher on a reward, while it stays near what the model would paint. Use it in place of
KSampler wherever there is a reward with a gradient: all of MIRA Pixel Reward, the published scorers, the JPEG estimate, your
own torch code.

{LIMIT}

An iteration costs about one and a half plain samples, two to three with the whole gradient (`gradient_steps` 0).
Ancestral and SDE samplers have noise at every step to optimise; `dpm_fast` and `dpm_adaptive` cannot be optimised
through. **Cancel** hands back the best image so far with its record (and what comes next in the
graph goes on with it: another optimising node wants a Cancel of its own), and so does an error in the middle, which is then
named on the node. If ComfyUI itself is killed, its output folder has that image in `mira_unfinished`, with the workflow
and the record inside: drop it onto the editor, or open it with MIRA Load Trace.

With `memory` auto it takes the fastest way that fits, and says in the record which, and what it would take; when memory
runs out all the same, it goes on more thriftily: layers of model, decoder and scorer are computed again instead of
kept, and at last what is kept waits in the CPU's memory. `repeatable` gives the same bits for the same seed, on a GPU
too. A batch of several prompts wants their texts one a line.

What cannot be optimised rightly is refused by name before anything is: caches of steps (EasyCache), LoRA hooks that
change over the steps or differ between positive and negative, and whatever else makes a second sample of the same
noises another image. Guidance that remembers the last step (APG with momentum) works with `memory` none.""",
    "MiraOptimizeSamplerAdvanced": f"""MIRA Optimize KSampler for any NOISE, GUIDER, SAMPLER and SIGMAS, as
SamplerCustomAdvanced takes them: perpendicular guidance, split sigmas (the low half, which ends at 0), custom samplers.

{LIMIT}""",
    "MiraDPOPreference": """A KSampler that learns from preferences alone. It makes images, asks a judge which is better,
and moves its noises. The judge is a reward without a gradient (file size, a server of yours, any scorer), **you**, or the
choices of an earlier run.

When you are the judge, the run pauses and shows two images on the node, left and right at random: click the better one,
or press 1 or 2; 0 is a tie, Backspace takes the last choice back (up to three), Escape keeps the best so far. The pair
comes back after a refresh, nothing is chosen for you, and cancelling the run keeps the best so far. For unattended
runs set a `timeout`. The `choices` output repeats the run bit for bit when it is connected to another node's `choices`.

`dueling` (the default) perturbs the noises and moves towards what is preferred. `dpo` is the paper's Algorithm 2, with
learning rate 0.01 to 0.05. `best_of_n` is the plain alternative. `hybrid2`, with `explore` 0.01 and 5 candidates, is
for rewards that give numbers. On the demo model dueling and best_of_n gained most per image judged.""",
    "MiraDriftMonitor": """Plots reward and drift of up to four runs, writes the records as CSV and JSON to the output
folder, and says in plain words whether an image is still one that the base model would paint.

For that verdict connect `base_images`, plain samples of 3 to 16 other seeds of the same prompt, and a CLIPScore as
`clip`: "hacked" means that an image lies farther from them than they lie from one another, or matches the prompt less
than they do, by two standard deviations. Both thresholds are the base model's own spread over seeds. With several
runs it also compares their rewards where they have drifted equally far. CMMD needs two or more images of a run.""",
    "MiraLoadTrace": """The record of an earlier run: from a PNG that ComfyUI saved after an optimising node (the record
travels in it beside the workflow), or from the MIRA Drift Monitor's JSON or CSV. Connect it to a MIRA Drift Monitor to compare
with a new run. A run that was killed in the middle has left its best image and its record in `mira_unfinished` of the
output folder.""",
    "MiraSearchKSampler": """A KSampler that samples several candidates of every image and lets the better ones
survive, by any reward, with or without a gradient. `best_of_n` keeps the best of `particles` seeds, and is what every
other method has to beat; `zero_order` climbs: `rounds` times it keeps the best of `particles` noises around the best so
far. `fk_steering` and `code` look at the predicted images while they are sampled: FK resamples particles in proportion to
exp(strength * reward), CoDe goes on from the best. `das` is FK's Monte Carlo with proposals that follow the reward's
gradient. `mira_fk` runs MIRA on several trajectories and goes on from the best one. `restarts` noises the best image
again (`restart_denoise`) and lets the model paint it anew, `particles` times in each of `rounds`; the better image
stays, and what the model would not paint never comes in.

Steering needs a sampler that injects noise (an ancestral or SDE one), by which copies part. `strength` belongs to the
reward's scale: around 10 over what an image can gain. Particles run together as far as memory goes. Cancel hands back
the best image so far. The record shows the best of all particles at every look.""",
    "MiraRLGuidance": """Blends a model with its reward-tuned version, at every step: base + `weight` * (tuned - base). With
`schedule` constant this is Reinforcement Learning Guidance: 1 is the tuned model, 0.5 half of the tuning, 2 beyond it.
With `annealed` it is Annealed Importance Guidance: the base model decides early, at high noise, and the tuned one late,
which keeps the base model's variety.

It serves checkpoints and LoRAs of DDPO, Diffusion-DPO, D3PO and their like, and whatever else was tuned from the same
model. Connect the base to `model`, and the checkpoint, or the base with Load LoRA, to `tuned`. A step costs both models.
The result is a MODEL: sample it with any node, or optimise its noises.""",
    "MiraDyMOGuider": """A CFG guider that leans towards a reward in every prediction, for SamplerCustomAdvanced: the
preference term of DyMO. The step has the length of what the prompt changes in the prediction, times `scale`. Nothing is
optimised and nothing is searched, so it is the cheapest way to more reward, and the least sure one. DyMO's other term,
on attention maps, is not in it: `start_percent` leaves the beginning to the prompt instead.""",
    "MiraInitNONoise": """For prompts of which the model forgets half: *a cat and a dog* that become one animal. Name the
subjects in `words`, and the seed's noise is changed a little, before anything is sampled, until the model's attention
answers to every one of them in the first step (`response`), and in different places (`conflict`); if that does not
succeed, other noises are tried. `report` says what both scores were and became.

Give `clip`, `prompt`, `sigmas` and `latent_image` as the sampler gets them, and the noise to SamplerCustomAdvanced, or to
MIRA Optimize Sampler (Advanced), which goes on from there for a reward. It works by the attention of UNets (SD1.5, SDXL
and their like); Flux, SD3 and other transformers are refused. No reward is in it.

The prompt is encoded here as plain text: what else the sampler's conditioning holds (a ControlNet, areas, an inpainting
mask) is not looked at. Thresholds and schedule are the authors', for SD1.5. The demo model paints one subject at a time,
and its prompts gain nothing by it.""",
    "MiraPixelReward": """A reward that is a formula of the pixels, with a gradient and without any file: brightness,
darkness, contrast, colourfulness, sharpness, symmetry, or the match to a reference image (for colours and composition).
Simple rewards are hacked quickly: keep the drift limit low.""",
    "MiraJPEGReward": """Minus the kilobytes of the image as a JPEG: simple images score high. The black box is the real
size and goes to MIRA-DPO Preference; the estimate has a gradient and goes to MIRA Optimize KSampler. Over many kinds
of images its median error is 3 %.""",
    "MiraLoadAestheticReward": f"""The LAION aesthetic predictor v2, from 1 to 10: ordinary images score 4.5 to 6.5, and
above 9 an image is hacked, not beautiful. It needs its small head and a CLIP ViT-L/14, from a file (whole or the image
half) or from Load CLIP Vision.

{FILES}""",
    "MiraLoadHPSReward": f"""Human Preference Score v2 or v2.1: how much people like an image for its prompt, usually 0.2
to 0.35. The two releases have the same architecture and scores that do not compare; the name of the file tells them
apart, or `version` does.

{FILES}""",
    "MiraLoadPickScoreReward": f"""PickScore v1: which of two images people pick for a prompt, usually 18 to 24.

{FILES}""",
    "MiraLoadImageReward": f"""ImageReward v1.0: human preference, standardised; ordinary images score -1 to 1.5.

{FILES}""",
    "MiraLoadCLIPScore": f"""100 times the cosine between image and prompt, by any CLIP (open_clip's, OpenAI's or Hugging
Face's layout) or SigLIP (with its tokenizer files beside it). CLIP usually gives 15 to 35, SigLIP 0 to 20.

{FILES}""",
    "MiraDemoCLIPScore": """The CLIPScore of the demo model's own small CLIP. It knows emoji only: use it with the MIRA Demo
Model, whose samples score 45 to 75.""",
    "MiraDemoAesthetic": """A taste for the demo model: a small head on its CLIP, taught that 3d emoji are worth 7 and flat
ones 4. It is small enough to be hacked, which is what it is for.""",
    "MiraCombineRewards": """A weighted sum of up to four rewards; chain nodes for more. `by typical range` makes equal
weights count about equally, whatever the units; `ReNO` is that paper's composite of HPSv2.1, ImageReward, CLIPScore and
PickScore. A negative weight asks for less. Combining a style with a CLIPScore is a good guard for the prompt.""",
    "MiraAugmentReward": """Scores the mean of random crops and mirror images, so that patterns of pixels that fool a
scorer at one alignment only stop paying. 2 to 8 crops with `smallest` 0.7 to 0.9 are usual; it costs as many scores. Runs
still repeat bit for bit.""",
    "MiraRewardFromPython": """A reward of your own: a Python file in `models/mira_rewards` with `FACTS` and
`score(images, prompts)`; docs/examples/warmth.py of the pack is a complete one. It is read again whenever it changes, and
errors name its line. It runs like any Python on your machine: use files that you trust.""",
    "MiraRewardFromHTTP": """A reward that a server of yours computes, as a black box for MIRA-DPO Preference and Score
Images: it is posted PNGs and prompts and answers scores; docs/examples/reward_server.py of the pack is a complete one. A
vision-language model that you serve becomes a reward this way. Other machines than this one have to be allowed by
starting ComfyUI with the environment variable MIRA_HTTP_HOSTS, so that no workflow can send images away by itself.""",
    "MiraScoreImages": """The absolute score of every image of a batch, on the node and as outputs, with the range that
is typical of the reward beside it. Connect `scores` to MIRA Rank Images for Best-of-N.""",
    "MiraRankImages": """The batch in the order of its scores, the best first, and only the best few. With a batch, VAE
Decode and MIRA Score Images it is Best-of-N.""",
    "MiraDemoModel": """A small text-to-image model that ships with the pack, for trying everything without a download: 128
px emoji of 45 animals and 71 other subjects, four styles (3d, flat, cartoon, icon), twelve backgrounds. Prompt it as
"generate an image of a fox" or "a 3d fox on a blue background", with CFG 5 and 20 steps.""",
}


def cell(text) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def row(name: str, spec: list, optional: bool) -> str:
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(kind, list) or kind == "COMBO":
        values = kind if isinstance(kind, list) else options.get("options", [])
        # Files and samplers differ from one installation to the next.
        kind = "choice" if len(values) > 8 or any("." in str(v) for v in values) else ", ".join(map(str, values))
    elif kind in ("INT", "FLOAT") and "min" in options:
        kind = f"{options['min']:g} to {options['max']:g}"
    default = options.get("default", "")
    default = "" if kind == "choice" else default
    note = " (optional)" if optional else ""
    return f"| `{name}`{note} | {cell(kind)} | {cell(default)} | {cell(options.get('tooltip', ''))} |"


def page(node: str, info: dict) -> str:
    text = "\n\n".join(" ".join(part.split()) for part in PAGES[node].split("\n\n"))
    lines = [f"# {info['display_name']}", "", text, "", f"![{info['display_name']}](pictures/{node}.jpg)", ""]
    inputs = [(n, s, g == "optional") for g in ("required", "optional") for n, s in info["input"].get(g, {}).items()]
    if inputs:
        lines += ["## Inputs", "", "| input | range | default | |", "|---|---|---|---|", *(row(*i) for i in inputs), ""]
    lines += ["## Outputs", "", "| output | type | |", "|---|---|---|"]
    tooltips = info.get("output_tooltips") or [""] * len(info["output"])
    for name, kind, tooltip in zip(info["output_name"], info["output"], tooltips, strict=True):
        lines.append(f"| `{name}` | {kind} | {cell(tooltip or '')} |")
    return "\n".join(lines) + "\n"


async def ask() -> dict:
    with Server() as server:
        async with Client(server.url) as client:
            return await client.get("/object_info")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    everything = asyncio.run(ask())
    for node_id in PAGES:
        (FOLDER / f"{node_id}.md").write_text(page(node_id, everything[node_id]))
        print(FOLDER / f"{node_id}.md")
