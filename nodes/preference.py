"""MIRA-DPO as a node."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

from ..rewards.base import Reward
from ..sampler.candidates import ENERGIES
from ..sampler.methods import METHODS
from ..sampler.optimize import Result, Score
from ..sampler.preference import KEEP, PreferenceSettings, prefer
from ..sampler.resume import Left
from . import host
from .editor.judges import ON_TIMEOUT, PersonJudge, RecordedJudge, Resuming, RewardJudge, read_choices
from .editor.live import LiveRun
from .shared import memo
from .shared.checks import (
    check_latent,
    check_links,
    check_reward,
    check_said,
    check_values,
    complain,
    fill_in,
    needs,
)
from .shared.finish import finish, tell
from .shared.inputs import (
    HIDDEN,
    advanced,
    beta_input,
    choosing_input,
    denoise_input,
    final_restart_input,
    iterate_input,
    learning_rate_input,
    linked_inputs,
    memory_input,
    method_input,
    noise_outputs,
    prompt_input,
    read_settings,
    repeatable_input,
    sampling_inputs,
    trace_outputs,
)
from .shared.job import KSamplerInputs, describe, ksampler_job, restart_at_end
from .shared.types import MiraReward, aliases, shown_again

JUDGES = ("reward", "person", "recorded choices")
# What the measurement in docs/preference.md chose; Algorithm 2 itself is method dpo, keep last_winner, lr 0.01.
DEFAULT = PreferenceSettings(method="dueling", explore=0.6, keep="incumbent", lr=0.05)
TAKE_BACK = 3  # choices
FREE = {"iterations", "timeout", "on_timeout"}  # what does not tell which images are compared


def preferring(judge: Any, seed: int, history: int, choices: list[list] | None = None) -> Callable:
    """The work of `host.run`: other candidates start from noises of their own. choices: see `prefer`."""

    def work(process: host.Process, noises: tuple[Tensor, ...]) -> Result:
        settings: PreferenceSettings = process.settings
        process.scoring.redraw = False  # candidates are compared under the same draw of a reward that draws
        count = METHODS[settings.method].trajectories(settings.candidates)
        others = [process.noises_of(n, noises) for n in range(1, count)]

        def report(k: int, rows: list[dict], candidates: list[Tensor]) -> None:
            liked = [int(row["preferred"]) if row["preferred"] > 0 else 0 for row in rows]  # nan and -1: the first
            shown = torch.stack([candidates[i][b] for b, i in enumerate(liked)])
            process.job.on_iteration(k, rows, Score(None, {}, shown))

        return prefer(
            process.rollout,
            process.scoring.render,
            judge(process),
            [noises, *others],
            settings,
            seed=seed,
            history=history,
            choices=choices,
            on_iteration=report,
            interrupts=host.INTERRUPTS,
            memory=host.used_bytes,
        )

    return work


def particulars() -> list[io.Input]:
    """What most people leave alone."""
    return advanced(
        denoise_input(),
        method_input(
            METHODS,
            DEFAULT.method,
            (
                "dpo: the paper's Algorithm 2. dueling: perturb the noises, move towards what is preferred. "
                "best_of_n: other seeds every time, the best stays. hybrid2: DNO's estimator from probes "
                "(needs a reward's numbers)."
            ),
        ),
        learning_rate_input(
            DEFAULT.lr, "How far an update of dpo or hybrid2 moves the noises, in units of their deviation."
        ),
        beta_input(DEFAULT.beta, "Of dpo's loss: how sharply a preference pushes winner and loser apart."),
        io.Combo.Input(
            "energy",
            options=list(ENERGIES),
            default=DEFAULT.energy,
            tooltip="What dpo pushes apart. mira: the paper's score energy; its sign reversed; both sides, which have "
            "no slope at the first choice, so that it teaches next to nothing.",
        ),
        io.Float.Input(
            "explore",
            default=DEFAULT.explore,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="How different dueling's challengers (0.6) or hybrid2's probes (0.01) are. 1: another seed.",
        ),
        io.Float.Input(
            "step",
            default=DEFAULT.step,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="How far a win of dueling's challenger moves the noises. 1: all the way, no extra image.",
        ),
        io.Combo.Input(
            "keep",
            options=list(KEEP),
            default=DEFAULT.keep,
            tooltip=(
                "last_winner: of the last comparison; dpo's is moved once more first, as in the paper. incumbent: "
                "never an image that lost to an earlier one (a person is asked about both)."
            ),
        ),
        io.Boolean.Input(
            "skip_ties", default=False, tooltip="Learn nothing from a tie. Else the last wins, as in the paper."
        ),
        io.Float.Input(
            "kick",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Fresh noise for the loser when the candidates have become the same image. 0: none.",
        ),
        memory_input(),
        io.Float.Input(
            "timeout",
            default=0.0,
            min=0.0,
            max=86400.0,
            step=1.0,
            tooltip="Seconds that a person has for a choice. 0: as long as it takes.",
        ),
        io.Combo.Input("on_timeout", options=list(ON_TIMEOUT), tooltip="stop with the best so far, or count as a tie."),
        iterate_input(),
        repeatable_input(),
    )


class MiraDPOPreference(io.ComfyNode):
    NAME = "MIRA-DPO Preference"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiraDPOPreference",
            **aliases("choose", "preference", "compare", "a or b", "human feedback", "dpo"),
            display_name=cls.NAME,
            category="MIRA Alignment/sampling",
            description=(
                "A KSampler that learns from preferences alone: it makes images, asks which is better (a reward "
                "without a gradient, you, or the choices of an earlier run), and moves its noises accordingly."
            ),
            inputs=[
                *linked_inputs("judge"),
                choosing_input(
                    "judge",
                    {name: ("timeout", "on_timeout") if name == "person" else () for name in JUDGES},
                    (
                        "reward: the connected reward, which needs no gradient. person: you choose on this node, by "
                        "click or by the keys 1, 2, ... recorded choices: those of an earlier run."
                    ),
                ),
                *sampling_inputs("Makes the first candidate's noises, as KSampler's does, and all others from there."),
                io.Int.Input(
                    "iterations", default=DEFAULT.iterations, min=1, max=1000, tooltip="Comparisons, for each image."
                ),
                io.Int.Input(
                    "candidates",
                    default=DEFAULT.candidates,
                    min=2,
                    max=16,
                    tooltip=(
                        "Images per comparison: the best so far and its challengers; for dpo the best and the worst "
                        "are told apart; hybrid2's probes and one."
                    ),
                ),
                prompt_input(),
                *particulars(),
                MiraReward.Input("reward", optional=True, tooltip="For judge reward. It needs no gradient."),
                io.String.Input(
                    "choices",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip=(
                        "For judge recorded choices: the choices output of an earlier run, or its record as JSON. For "
                        "person: what is repeated before you are asked."
                    ),
                ),
                *advanced(final_restart_input()),
            ],
            outputs=[
                *trace_outputs(),
                io.String.Output("choices_made", display_name="choices", tooltip="The choices, to repeat the run."),
                *noise_outputs(),
            ],
            hidden=HIDDEN,
            **shown_again(),
        )

    @classmethod
    def validate_inputs(cls, judge: str | None = None, method: str | None = None) -> bool | str:
        return complain(locals(), cls.define_schema().inputs) or wrong_judge(locals()) or True

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
        seed: int,
        cfg: float,
        reward: Reward = None,
        choices: str = "",
        prompt: str = "",
        iterate: int = -1,
        final_restart: float = 0.0,
        **values: Any,
    ) -> io.NodeOutput:
        given = KSamplerInputs(model, positive, negative, latent_image, vae, seed, cfg, prompt)
        inputs, hidden = cls.define_schema().inputs, cls.hidden
        values = fill_in(inputs, values)
        check_said(cls.NAME, inputs, prompt, seed=seed, iterate=iterate, final_restart=final_restart)
        identity = values | vars(given) | {"reward": reward, "choices": choices}
        done, live = memo.of(
            hidden,
            identity,
            (iterate, final_restart),
            lambda: run_preference(hidden, given, reward, choices, values, memo.last_run(hidden, identity, FREE)),
        )
        record = json.dumps(done.result.trace.settings["choices"])
        return finish(
            cls.NAME,
            hidden,
            done,
            live,
            latent_image,
            iterate,
            record,
            restart=restart_at_end(given, values, final_restart, reward if values["judge"] == "reward" else None),
            inputs=identity,
        )


def run_preference(
    hidden: Any,
    given: KSamplerInputs,
    reward: Reward | None,
    choices: str,
    values: dict,
    before: host.Optimized | None = None,
) -> tuple[host.Optimized, LiveRun]:
    """One run: (what came out, what the editor was told). before: the run of which a person's choices are repeated."""
    node, told = MiraDPOPreference.NAME, values | {"cfg": given.cfg}
    check_values(node, MiraDPOPreference.define_schema().inputs, told)
    check_links(node, positive=given.positive, negative=given.negative)
    sampler = comfy.samplers.sampler_object(values["sampler_name"])
    if message := wrong_judge(values):
        raise ValueError(f"{node}: {message}")
    check_latent(node, given.model, given.latent, given.vae, sampler, values, METHODS[values["method"]].gradient)
    judge, context = values["judge"], get_executing_context()
    scorer = check_reward(node, reward) if judge == "reward" else None
    if scorer:
        needs(node, scorer, given.prompt, len(given.latent["samples"]))
    left = before.result.left if before else None
    somebody = asked = None
    if judge == "person":
        asked = person(hidden.unique_id, context, values, given.seed)
        somebody = Resuming(left.value if left else read(choices) if choices else [], asked)
    made: Callable = {
        "reward": lambda: lambda process: RewardJudge(lambda images: process.scoring.reward(images)[0]),
        "person": lambda: lambda process: somebody,
        "recorded choices": lambda: recorded(read(choices)),
    }[judge]()
    settings = read_settings(node, values, PreferenceSettings)
    by = scorer.facts.name if scorer else judge
    record = describe(node, told, given.seed, given.prompt, by)
    shown = {"drift_metric": "path_kl", "judge": judge, "iterations": settings.iterations}
    live = LiveRun(hidden, settings.iterations - 1 + settings.ends_with_update, shown, record)
    job = ksampler_job(
        given, values, node=node, reward=scorer, settings=settings,
        gradient=METHODS[settings.method].gradient, on_iteration=live,
    )  # fmt: skip
    try:
        choices_made: list[list] = []
        live.unfinished.trace.settings["choices"] = choices_made
        done = host.run(job, preferring(made, given.seed, TAKE_BACK if judge == "person" else 0, choices_made))
    except host.INTERRUPTS:  # of a run that hands nothing back nothing stays: what was chosen, was taken back
        live.unfinished.done()
        raise
    trace = done.result.trace
    trace.settings |= record
    if asked and somebody:
        if asked.missed:
            trace.notices.append(f"nobody chose in time, {asked.missed} times: those count as ties")
        done.result.left = Left([*trace.settings["choices"], *somebody.unused()], len(trace.settings["choices"]))
        if repeated := somebody.before.used:
            whose = "of the run before were repeated, {}: another seed begins without"
            whose = whose if left else "that are connected were repeated, {}: then you were asked"
            trace.notices.append(f"choices {whose.format(f'{repeated} of them')}")
    if scorer:
        tell(node, trace, scorer.notices(job.prompts))
    return done, live


def wrong_judge(values: dict) -> str | None:
    """What does not go together, or None. A value that is not known yet (a linked input) is None."""
    judge, method = values.get("judge"), values.get("method")
    if judge in ("person", "recorded choices") and method in METHODS and METHODS[method].numbers:
        others = " or ".join(name for name, kind in METHODS.items() if not kind.numbers)
        return f"method is {method}, which needs a reward's numbers, but judge is {judge}: use {others}"
    return None


def person(node: str, context: Any, values: dict, seed: int) -> PersonJudge:
    client = PromptServer.instance.client_id
    if client is None and not values["timeout"]:
        raise ValueError(
            f"{MiraDPOPreference.NAME}: judge is person, but nobody is connected to choose (the run was queued without "
            "a client_id): set a timeout, or use a reward or recorded choices"
        )
    return PersonJudge(
        node,
        context.prompt_id if context else "",
        client,
        values["iterations"],
        seed,
        values["timeout"],
        values["on_timeout"],
        METHODS[values["method"]].several,
    )


def read(text: str) -> list[list]:
    try:
        return read_choices(text)
    except ValueError as problem:
        raise ValueError(f"{MiraDPOPreference.NAME}: {problem}") from problem


def recorded(choices: list[list]) -> Callable[[host.Process], RecordedJudge]:
    judge = RecordedJudge(choices)
    return lambda process: judge
