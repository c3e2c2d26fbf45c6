"""Search and steering as a node; and one of its methods, as a KSampler with a dial."""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io

from ..rewards.base import Reward
from ..sampler.search import METHODS, POTENTIALS, SearchSettings
from ..sampler.surrogates import REGULARIZERS
from ..sampler.trace import Trace
from . import host
from .editor.live import LiveRun
from .host.probe import goes_in_pieces, injects_noise
from .shared import memo
from .shared.checks import (
    check_latent,
    check_links,
    check_reward,
    check_said,
    check_values,
    fill_in,
    needs,
    needs_gradient,
)
from .shared.finish import finish, tell
from .shared.inputs import (
    HIDDEN,
    advanced,
    beta_input,
    denoise_input,
    final_restart_input,
    iterate_input,
    learning_rate_input,
    linked_inputs,
    memory_input,
    method_input,
    prompt_input,
    read_settings,
    repeatable_input,
    restart_denoise_input,
    sampling_inputs,
    trace_outputs,
)
from .shared.job import KSamplerInputs, describe, ksampler_job, restart_at_end
from .shared.types import MiraReward, aliases, shown_again

DEFAULT = SearchSettings(particles=8)


def can_steer(node: str, method: str, it: str, other: str, sampler: Any, model_sampling: Any, values: dict) -> None:
    """Raise ValueError where particles could not part, or would be sampled by another sampler than the plain one.

    it: what the node calls it. other: the methods that could be taken instead, as an error's last words; "" where there
    are none.
    """
    name = values["sampler_name"]
    if values["steps"] < 2:
        raise ValueError(
            f"{node}: steps is {values['steps']}, but {it} looks at the image between two steps: use 2 or more{other}"
        )
    if METHODS[method].injects and not injects_noise(sampler, model_sampling):
        use = "by which particles part" if METHODS[method].copies else "which is what it chooses"
        raise ValueError(
            f"{node}: {it} needs a sampler that injects noise, {use}, but {name} injects none: use "
            f"euler_ancestral{other or ', or another ancestral or SDE sampler'}"
        )
    if not goes_in_pieces(sampler, model_sampling):
        raise ValueError(
            f"{node}: {it} stops after every step to look, but {name} carries what it knows from one step "
            f"to the next, and would sample otherwise in pieces: use euler_ancestral{other}"
        )


def particulars() -> list[io.Input]:
    """What most people leave alone."""
    return advanced(
        denoise_input(),
        io.Int.Input(
            "interval",
            default=DEFAULT.interval,
            min=0,
            max=10000,
            tooltip=(
                "Sampling steps between two looks of fk_steering and code. 0: a fifth and a twentieth of the "
                "steps, as in their papers; of halving, as often as it takes to leave one; of ntrk, one step, where 2 "
                "is faster."
            ),
        ),
        io.Float.Input(
            "strength",
            default=DEFAULT.strength,
            min=0.0,
            max=1000000.0,
            step=0.1,
            tooltip=(
                "How much a reward of 1 counts against the model: fk_steering and das aim at p(x) "
                "exp(strength * reward). Small rewards need a large one."
            ),
        ),
        io.Combo.Input(
            "potential",
            options=list(POTENTIALS),
            default=DEFAULT.potential,
            tooltip="Of fk_steering: the best reward of a lineage so far, or the change since the last look.",
        ),
        io.Float.Input(
            "radius",
            default=DEFAULT.radius,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip=(
                "How far zero_order's candidates and mira_fk's copies are from the best. 1: other seeds. Of ntrk: the "
                "share of every injected noise that the reward chooses: 0.2 is gentle, 0.6 far."
            ),
        ),
        io.Int.Input(
            "iterations",
            default=DEFAULT.iterations,
            min=1,
            max=1000,
            tooltip="Of mira_fk: updates of every trajectory between two rounds.",
        ),
        learning_rate_input(
            DEFAULT.lr, "Of mira_fk: how far an update moves the noises, in units of their standard deviation."
        ),
        io.Combo.Input(
            "regularizer",
            options=list(REGULARIZERS),
            default=DEFAULT.regularizer,
            tooltip="Of mira_fk: what holds a trajectory near the model, and counts when it is chosen.",
        ),
        beta_input(DEFAULT.beta, "Of mira_fk: the weight of the regularizer against the reward (0.1 in the paper)."),
        memory_input(),
        iterate_input("what the method hands back"),
        repeatable_input(),
        restart_denoise_input("Of restarts and ntrk: how"),
        final_restart_input(),
    )


class Searching(io.ComfyNode):
    """What the two nodes share: one run of the settings that their values mean.

    NAME; IT: what does the work, as the node calls it; OTHER and BLACK_BOX: what to take instead where a method cannot
    run, and where it needs a gradient that the reward has not; DIALS: which input reaches further, by method, if it is
    not `particles`. For messages.
    """

    NAME = IT = OTHER = BLACK_BOX = ""
    DIALS: ClassVar[dict[str, str]] = {}

    @classmethod
    def settings(cls, values: dict) -> SearchSettings:
        raise NotImplementedError

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        return memo.cuts(inputs)

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list,
        negative: list,
        latent_image: dict,
        vae: VAE,
        reward: Reward,
        seed: int,
        cfg: float,
        prompt: str = "",
        iterate: int = -1,
        final_restart: float = 0.0,
        **values: Any,
    ) -> io.NodeOutput:
        given = KSamplerInputs(model, positive, negative, latent_image, vae, seed, cfg, prompt)
        inputs, hidden = cls.define_schema().inputs, cls.hidden
        values = fill_in(inputs, values)
        check_said(cls.NAME, inputs, prompt, seed=seed, iterate=iterate, final_restart=final_restart)
        identity = values | vars(given) | {"reward": reward}
        run = memo.of(
            hidden, identity, (iterate, final_restart), lambda: run_search(cls, hidden, given, reward, values)
        )
        return finish(
            cls.NAME,
            hidden,
            *run,
            latent_image,
            iterate,
            noises=False,
            restart=restart_at_end(given, values, final_restart, reward),
            inputs=identity,
        )


class MiraSearchKSampler(Searching):
    NAME, IT, OTHER = "MIRA Search KSampler", "method {method}", ", or method best_of_n or zero_order"
    BLACK_BOX = "a method that needs none than {method}, such as fk_steering"
    DIALS: ClassVar[dict[str, str]] = {"ntrk": "radius"}

    @classmethod
    def settings(cls, values: dict) -> SearchSettings:
        return read_settings(MiraSearchKSampler.NAME, values, SearchSettings)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraSearchKSampler",
            **aliases("best of n", "search", "seeds", "particles", "improve", "align"),
            display_name=cls.NAME,
            category="MIRA Alignment/sampling",
            description=(
                "A KSampler that samples several candidates of every image and lets the better ones survive: "
                "Best-of-N, zero-order search, restarts, FK steering, CoDe, DAS, NTRK, or several MIRA trajectories "
                "side by side."
            ),
            inputs=[
                *linked_inputs(),
                MiraReward.Input("reward", tooltip="It needs a gradient for das, ntrk and mira_fk only."),
                *sampling_inputs("Makes the first candidate's noises, as KSampler's does, and all others from there."),
                method_input(
                    METHODS,
                    DEFAULT.method,
                    (
                        "best_of_n: so many seeds, the best stays. zero_order: climbs around the best noise. "
                        "halving: the half of the seeds that promises less is given up, again and again. "
                        "fk_steering: particles are resampled by their predicted reward while they are sampled. code: "
                        "the best of several continuations, again and again. das: FK's sequential Monte Carlo with "
                        "proposals that follow the gradient. mira_fk: MIRA on several trajectories, of which the "
                        "best goes on. restarts: the best seed is noised again and painted anew, several times over, "
                        "and the better image stays: much reward with the prompt kept, and no gradient. ntrk: the "
                        "reward's gradient chooses a part of the noise of every step, as MIRA Tilt KSampler does: far "
                        "in a few samples (`rounds`), each of three times the work, or of two with `interval` 2."
                    ),
                ),
                io.Int.Input(
                    "particles",
                    default=DEFAULT.particles,
                    min=1,
                    max=1000,
                    tooltip=(
                        "Candidates per image: in all (best_of_n), per round (zero_order, restarts), or alive at once."
                    ),
                ),
                io.Int.Input(
                    "rounds",
                    default=DEFAULT.rounds,
                    min=1,
                    max=1000,
                    tooltip=(
                        "Of zero_order and restarts, each of `particles` candidates, and of mira_fk, each of "
                        "`iterations`. Of ntrk, how often an image is sampled, with a restart between: 1 to 3 will do."
                    ),
                ),
                prompt_input(),
                *particulars(),
            ],
            outputs=trace_outputs(),
            hidden=HIDDEN,
            **shown_again(),
        )


class MiraTiltKSampler(Searching):
    NAME, IT = "MIRA Tilt KSampler", "the tilt"
    BLACK_BOX = f"{MiraSearchKSampler.NAME}, of which most methods need none"
    DIALS: ClassVar[dict[str, str]] = {"ntrk": "tilt"}

    @classmethod
    def settings(cls, values: dict) -> SearchSettings:
        shared = {name: values[name] for name in ("rounds", "restart_denoise", "interval")}
        return SearchSettings("ntrk", particles=1, radius=values["tilt"], **shared)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraTiltKSampler",
            **aliases("ntrk", "noise tilt", "guidance", "improve", "beautiful", "align", "fast"),
            display_name=cls.NAME,
            category="MIRA Alignment/sampling",
            description=(
                "A KSampler whose noise leans towards a reward: `tilt` says how far. Nothing is optimised; the picture "
                "is sampled, noised again and sampled anew, twice, for the network's work of about seven."
            ),
            inputs=[
                *linked_inputs(),
                MiraReward.Input(
                    "reward", tooltip="With a gradient: a scorer, brightness, colour, your own torch code."
                ),
                *sampling_inputs("Makes the initial noise, as KSampler's does, and all others from there."),
                io.Float.Input(
                    "tilt",
                    default=0.4,
                    min=0.05,
                    max=0.95,
                    step=0.05,
                    tooltip=(
                        "The share of every injected noise (of its amplitude) that the reward chooses: 0.2 is gentle, "
                        "0.6 far. More is more of the reward, and in the end less of the prompt."
                    ),
                ),
                prompt_input(),
                *advanced(
                    denoise_input(),
                    io.Int.Input(
                        "rounds",
                        default=3,
                        min=1,
                        max=10,
                        optional=True,
                        tooltip=(
                            "How often the picture is sampled: from the second time on it is noised again first, which "
                            "gives back most of the prompt. The last that is better than the plain sample comes back."
                        ),
                    ),
                    restart_denoise_input("From the second round on: how", default=0.8),
                    memory_input(),
                    iterate_input("what the method hands back"),
                    repeatable_input(),
                    final_restart_input(),
                    io.Int.Input(
                        "interval",
                        default=2,
                        min=1,
                        max=100,
                        optional=True,
                        tooltip=(
                            "Sampling steps from one look at the reward to the next; what it asked for stays until "
                            "then. More is faster."
                        ),
                    ),
                ),
            ],
            outputs=trace_outputs(),
            hidden=HIDDEN,
            **shown_again(),
        )


def run_search(
    cls: type[Searching], hidden: Any, given: KSamplerInputs, reward: Reward, values: dict
) -> tuple[host.Optimized, LiveRun]:
    """One run: (what came out, what the editor was told)."""
    node, model, latent, prompt = cls.NAME, given.model, given.latent, given.prompt
    told = values | {"cfg": given.cfg}
    check_values(node, cls.define_schema().inputs, told)
    settings = cls.settings(values)
    method = METHODS[settings.method]
    check_links(node, positive=given.positive, negative=given.negative)
    check_reward(node, reward)
    if method.gradient:
        needs_gradient(node, reward, cls.BLACK_BOX.format(method=settings.method))
    sampler = comfy.samplers.sampler_object(values["sampler_name"])
    check_latent(node, model, latent, given.vae, sampler, values, method.gradient)
    needs(node, reward, prompt, len(latent["samples"]))
    it = cls.IT.format(method=settings.method)
    if method.restarts and values["steps"] < 2:
        raise ValueError(
            f"{node}: steps is {values['steps']}, but {it} noises an image to a level in between: use 2 or "
            f"more{cls.OTHER}"
        )
    if method.steers:
        can_steer(node, settings.method, it, cls.OTHER, sampler, model.get_model_object("model_sampling"), values)
    record = describe(node, told | {"method": settings.method}, given.seed, prompt, reward.facts.name)
    # Another seed is far from the plain sample by every distance; its score energy need not be.
    record["drift_metric"] = "mira_two_sided"
    live = LiveRun(hidden, settings.rows(values["steps"]), {"drift_metric": record["drift_metric"]}, record)
    job = ksampler_job(
        given, values, node=node, reward=reward, settings=settings, gradient=method.gradient, on_iteration=live
    )
    done = host.run(job, host.searching)
    trace = done.result.trace
    tell(node, trace, reward.notices(job.prompts))
    if method.steers and not done.result.cut_short and plain_won(trace, method.copies):
        dial = cls.DIALS.get(settings.method, "particles")
        remedy = "raise strength or particles" if method.copies else f"it came back; raise {dial}"
        trace.notices.append(f"the plain sample scored higher than every particle: {remedy}")
    trace.settings |= record
    return done, live


def plain_won(trace: Trace, replaced: bool) -> bool:
    """Of every image; replaced: the last population came back all the same."""
    if not replaced:
        return not any(trace.kept)
    return all(trace.of(b)[0]["reward"] > trace.of(b)[-1]["reward"] for b in range(len(trace.kept)))
