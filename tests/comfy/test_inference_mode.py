"""ComfyUI runs nodes in inference mode: its own behave after ours as before, and ours after its own, in any order."""

from __future__ import annotations

import comfy.model_management
import comfy.samplers
import pytest
import torch
from mira.nodes import demo, host
from mira.nodes.guidance import MiraDyMOGuider, MiraRLGuidance
from mira.nodes.host import inference_mode
from mira.nodes.host.dynamic import is_dynamic
from mira.nodes.host.restart import FinalRestart
from mira.nodes.initno import MiraInitNONoise
from mira.nodes.preference import preferring
from mira.nodes.shared.scores import score_images
from mira.rewards.pixel import PixelReward
from mira.sampler.preference import PreferenceSettings, by_score
from mira.sampler.search import SearchSettings

from testing.networks import SMALL, random_unet, thin_vae


def load() -> tuple:
    """A model, a CLIP and a VAE that nobody has loaded yet, as a graph begins."""
    with torch.inference_mode():
        return random_unet(SMALL, torch.float32), demo.load_clip(), thin_vae()


@pytest.fixture
def fresh(world):
    yield load()
    with torch.inference_mode():
        comfy.model_management.unload_all_models()


@torch.inference_mode()
def encode(clip, text="a fox"):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def test_a_network_without_a_latent_format_leaves_inference_mode():
    """Small decoders for video latents have the name, and nothing in it."""
    with torch.inference_mode():
        network = torch.nn.Linear(2, 2)
        network.latent_format = None
    inference_mode.leave_inference_mode(network)
    assert not any(p.is_inference() for p in network.parameters())


class Graph:
    """One node at a time, as ComfyUI's executor runs them: in inference mode."""

    def __init__(self, world, model, clip, vae):
        self.world, self.model, self.clip, self.vae = world, model, clip, vae
        self.latent = torch.zeros(1, 4, 8, 8)

    def stock(self):
        positive = encode(self.clip)
        sample = self.world.ksampler(model=self.model, positive=positive, steps=2)
        with torch.inference_mode():
            return positive[0][0], sample, self.vae.decode(sample)

    def optimize(self):
        self.world.optimize(model=self.model, vae=self.vae, positive=encode(self.clip), steps=2, iterations=1)

    def per_block(self):
        self.world.optimize(model=self.model, vae=self.vae, steps=2, iterations=1, memory="per_block")

    @torch.inference_mode()
    def search(self):
        job = self.world.job(model=self.model, vae=self.vae, steps=2)
        job.settings = SearchSettings(method="das", particles=2)
        host.run(job, host.searching)

    @torch.inference_mode()
    def preference(self):
        job = self.world.job(model=self.model, vae=self.vae, steps=2)
        job.settings = PreferenceSettings(method="dpo", iterations=1)
        judge = lambda k, images: by_score(torch.stack([i.mean((1, 2, 3)) for i in images], 1))  # noqa: E731
        host.run(job, preferring(lambda process: judge, 0, 0))

    @torch.inference_mode()
    def initno(self):
        MiraInitNONoise.execute(
            self.model, self.clip, {"samples": self.latent}, self.world.sigmas(steps=2), "a fox and a cat", "fox, cat",
            1, 1, 1, 0.2, 0.3,
        )  # fmt: skip

    @torch.inference_mode()
    def dymo(self):
        guider = MiraDyMOGuider.execute(
            self.model,
            encode(self.clip),
            encode(self.clip, ""),
            self.vae,
            PixelReward("brightness"),
            5.0,
            1.0,
            0.0,
            1.0,
        ).args[0]
        sampler = comfy.samplers.sampler_object("euler")
        guider.sample(torch.randn(1, 4, 8, 8), self.latent, sampler, self.world.sigmas(steps=2), seed=0)

    @torch.inference_mode()
    def blend(self):
        """With a tuned model that shares the weights, as a LoRA's does: sampled, then optimised through."""
        tuned, key = self.model.clone(), "diffusion_model.out.2.weight"
        tuned.add_patches({key: (0.1 * torch.ones_like(self.model.model.state_dict()[key]),)})
        guided = MiraRLGuidance.execute(self.model, tuned, 0.5, "constant", 1.0).args[0]
        self.world.ksampler(model=guided, steps=2)
        self.world.optimize(model=guided, vae=self.vae, steps=2, iterations=1)

    @torch.inference_mode()
    def tilt(self):
        job = self.world.job(model=self.model, vae=self.vae, steps=2)
        job.settings = SearchSettings(method="ntrk", particles=1)
        host.run(job, host.searching)

    @torch.inference_mode()
    def painted_anew(self):
        """An optimised image, noised and sampled once more at the end."""
        job = self.world.job(model=self.model, vae=self.vae, steps=2, iterations=1)
        anew = FinalRestart(0.5, job.guider, job.sampler, job.sigmas, job.initial, job.seed)
        before = host.run(job).latent
        after, told, cut = anew(before)
        assert not (told or cut or torch.equal(after, before))

    @torch.inference_mode()
    def score(self):
        score_images(demo.demo_clip_score(), torch.rand(1, 3, 128, 128), ["a fox"])

    @torch.inference_mode()
    def evicted(self):
        """Room is made: everything moves, in whichever mode ComfyUI happens to be asked."""
        comfy.model_management.unload_all_models()

    @torch.inference_mode()
    def another_model(self):
        self.world.ksampler(model=random_unet(SMALL, torch.float32), steps=1)


OURS = ("optimize", "per_block", "search", "preference", "initno", "dymo", "blend", "tilt", "painted_anew", "score")


@pytest.fixture(scope="module")
def before(world):
    """What the stock nodes give where none of ours ever ran."""
    return Graph(world, *load()).stock()


@pytest.mark.parametrize(
    "ours", [pytest.param(o, marks=pytest.mark.every_host if o in ("optimize", "initno") else ()) for o in OURS]
)
def test_stock_nodes_behave_after_ours_as_before(world, fresh, before, ours):
    graph = Graph(world, *fresh)
    following = OURS[(OURS.index(ours) + 1) % len(OURS)]
    for order in ((ours,), ("evicted", ours), (ours, "another_model", following), ("stock", "evicted", ours)):
        for step in order:
            getattr(graph, step)()
        for a, b in zip(graph.stock(), before, strict=True):
            assert torch.equal(a, b)


@pytest.mark.every_host
@pytest.mark.parametrize("method", ["best_of_n", "restarts"])
def test_without_a_gradient_no_weight_is_replaced(world, fresh, method):
    """ComfyUI may have locked the memory that it lies in, for a device to read from."""
    model, _, vae = fresh

    def weights():
        every = [id(p) for m in (model.model, vae.first_stage_model) for p in m.parameters()]
        return [w for n, w in enumerate(every) if n not in at_every_load]

    at_every_load: set[int] = set()
    if is_dynamic(model):  # of such a model ComfyUI itself replaces the small ones
        once, again = ((world.ksampler(model=model, steps=1), weights())[1] for _ in range(2))
        at_every_load = {n for n, (a, b) in enumerate(zip(once, again, strict=True)) if a != b}
    before = weights()
    assert before
    job = world.job(model=model, vae=vae, steps=2, gradient=False)
    job.settings = SearchSettings(method=method, particles=2, rounds=2)
    with torch.inference_mode():
        done = host.run(job, host.searching)
    assert weights() == before and len(done.result.trace.rows) > 1
    Graph(world, *fresh).optimize()  # which replaces them, and what the search left is none of its business
    assert weights() != before


def test_a_weight_that_a_stock_node_moved_is_replaced(world):
    """It has a version counter, and data that were made in inference mode: autograd takes neither half of it."""
    module = torch.nn.Linear(2, 2)
    with torch.inference_mode():
        module.weight.data = module.weight.data.clone()
    assert inference_mode.made_in_inference_mode(module.weight)
    inference_mode.leave_inference_mode(module)
    assert not inference_mode.made_in_inference_mode(module.weight)
    x = torch.ones(1, 2, requires_grad=True)
    (module(x).square()).sum().backward()


def test_tensors_beside_the_weights_are_replaced_too(world):
    """Latent formats with a mean of their own (Playground 2.5, EDM), and modules with a plain tensor."""
    with torch.inference_mode():
        model, stock = demo.load_model(), demo.load_model()
        model.model.latent_format.mean = torch.zeros(1, 4, 1, 1)
        model.model.latent_format.std = torch.ones(1, 4, 1, 1)
        latent_format = type(model.model.latent_format)

        class WithMean(latent_format):
            def process_out(self, latent):
                return super().process_out(latent * self.std.to(latent) + self.mean.to(latent))

        model.model.latent_format.__class__ = WithMean
    done = world.optimize(model=model, steps=2, iterations=1)
    assert torch.equal(done.plain, world.ksampler(model=stock, steps=2))
