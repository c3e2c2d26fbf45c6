"""Search and guidance through the real server, with a LoRA that ComfyUI's own loader reads."""

from __future__ import annotations

import asyncio

import pytest

from tools.comfy import Client, ServerError

PROMPT = "generate an image of a fox"


def node(kind, /, **inputs):
    return {"class_type": kind, "inputs": inputs}


def base(model="MiraDemoModel", side=64, **more):
    return {
        "1": node(model),
        "2": node("CLIPTextEncode", clip=["1", 1], text=PROMPT),
        "3": node("CLIPTextEncode", clip=["1", 1], text=""),
        "4": node("EmptyLatentImage", width=side, height=side, batch_size=2),
        "5": node("MiraPixelReward", measure="brightness"),
    } | more


def scored(prompt, latent):
    """The mean score of the images that a latent decodes to."""
    return prompt | {
        "90": node("VAEDecode", samples=latent, vae=["1", 2]),
        "91": node("MiraScoreImages", images=["90", 0], reward=["5", 0], prompt=PROMPT),
        "92": node("SaveImage", images=["90", 0], filename_prefix="guided"),
    }


def run(server, prompt):
    async def go():
        async with Client(server.url) as client:
            return await client.run(prompt)

    return asyncio.run(go())


def brightness_of(output: dict) -> float:
    return sum(output["mira_scores"]) / len(output["mira_scores"])


def ksampler(model):
    return node(
        "KSampler", model=model, positive=["2", 0], negative=["3", 0], latent_image=["4", 0], seed=11, steps=6, cfg=5.0,
        sampler_name="euler_ancestral", scheduler="normal", denoise=1.0,
    )  # fmt: skip


def test_initno_makes_the_noise_of_a_custom_sampler(server):
    prompt = base(
        "SmallModel",
        **{
            "6": node("BasicScheduler", model=["1", 0], scheduler="normal", steps=6, denoise=1.0),
            "7": node("CFGGuider", model=["1", 0], positive=["2", 0], negative=["3", 0], cfg=5.0),
            "8": node("KSamplerSelect", sampler_name="euler"),
            "9": node(
                "MiraInitNONoise", model=["1", 0], clip=["1", 1], latent_image=["4", 0], sigmas=["6", 0],
                prompt=PROMPT, words="fox", seed=11, rounds=1, iterations=2, response=0.0, conflict=0.3,
            ),
            "10": node(
                "SamplerCustomAdvanced", noise=["9", 0], guider=["7", 0], sampler=["8", 0], sigmas=["6", 0],
                latent_image=["4", 0],
            ),
            "11": node("PreviewAny", source=["9", 1]),
        }
    )  # fmt: skip
    outputs = run(server, scored(prompt, ["10", 0]))
    (report,) = outputs["11"]["text"]
    assert report.count("image") == 2 and "of 3 evaluations" in report
    assert len(outputs["92"]["images"]) == 2
    prompt["9"]["inputs"]["words"] = "wolf"
    with pytest.raises(ServerError, match="words has 'wolf', which is not in the prompt"):
        run(server, scored(prompt, ["10", 0]))


def guided(weight):
    return base(
        side=128,  # of which its LoRA makes bright pictures
        **{
            "6": node("LoraLoaderModelOnly", model=["1", 0], lora_name="bright.safetensors", strength_model=1.0),
            "7": node("MiraRLGuidance", model=["1", 0], tuned=["6", 0], weight=weight, schedule="constant", power=1.0),
            "8": ksampler(["7", 0]),
        },
    )


def test_rl_guidance_with_load_lora(server):
    low, high = (brightness_of(run(server, scored(guided(w), ["8", 0]))["91"]) for w in (0.0, 1.6))
    assert high > low + 0.05


def test_dymo_with_sampler_custom_advanced(server):
    def prompt(scale):
        return base(
            side=128,
            **{
                "6": node(
                    "MiraDyMOGuider", model=["1", 0], positive=["2", 0], negative=["3", 0], vae=["1", 2],
                    reward=["5", 0], cfg=5.0, scale=scale, start_percent=0.2, end_percent=1.0,
                ),
                "7": node("RandomNoise", noise_seed=11),
                "8": node("KSamplerSelect", sampler_name="euler_ancestral"),
                "9": node("BasicScheduler", model=["1", 0], scheduler="normal", steps=6, denoise=1.0),
                "10": node(
                    "SamplerCustomAdvanced", noise=["7", 0], guider=["6", 0], sampler=["8", 0], sigmas=["9", 0],
                    latent_image=["4", 0],
                ),
            }
        )  # fmt: skip

    low, high = (brightness_of(run(server, scored(prompt(s), ["10", 0]))["91"]) for s in (0.0, 1.5))
    assert high > low + 0.05


def search(**changes):
    inputs = dict(
        model=["1", 0], positive=["2", 0], negative=["3", 0], latent_image=["4", 0], vae=["1", 2], reward=["5", 0],
        seed=11, steps=4, cfg=5.0, sampler_name="euler_ancestral", scheduler="normal", denoise=1.0,
        method="fk_steering", particles=4, rounds=1, interval=1, strength=20.0, potential="max", radius=0.4,
        iterations=1, learning_rate=0.02, regularizer="mira", beta=0.1, memory="auto",
    ) | changes  # fmt: skip
    return base(**{"6": node("MiraSearchKSampler", **inputs)})


def test_search_records_and_finds(server):
    outputs = run(server, scored(search(), ["6", 0]))
    (record,) = outputs["6"]["mira"]
    assert [r["iteration"] for r in record["rows"] if r["image"] == 0] == [0, 1, 2, 3, 4]
    assert len(record["previews"]) == 5 and record["settings"]["method"] == "fk_steering"
    assert record["rows"][2]["path_kl"] is None  # not known before the end; NaN would break browsers
    best = brightness_of(run(server, scored(search(method="best_of_n", particles=6), ["6", 0]))["91"])
    plain = brightness_of(run(server, scored(search(method="best_of_n", particles=6), ["6", 1]))["91"])
    assert best > plain + 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler_name": "euler"}, "MIRA Search KSampler: method fk_steering needs a sampler that injects noise"),
        ({"steps": 0}, "Value 0 smaller than min of 1.*: steps"),
        ({"particles": 0}, "particles"),
    ],
)
def test_bad_input_is_said(server, changes, message):
    with pytest.raises(ServerError, match=message):
        run(server, scored(search(**changes), ["6", 0]))
