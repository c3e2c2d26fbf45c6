"""How far the gradient of the last three steps gets against that of all, by the number of sampling steps.

`python dev.py bench few-steps` prints, for three samplers and two rewards on four images, the mean gain of the best
iterate after five iterations: why a node with few steps takes all of them (`FEW_STEPS` in nodes/shared/inputs.py). The
gains of the images go to docs/results/few_steps.csv.
"""

from __future__ import annotations

from bench.rows import write
from testing.pack import ROOT
from testing.world import PixelReward, World, demo

STEPS = (6, 8, 10, 12)
SAMPLERS = (("euler_ancestral", 5.0), ("euler", 5.0), ("lcm", 1.0))
IMAGES, ITERATIONS = 4, 5


def gains(world: World, reward, gradient_steps: int, **options) -> list[float]:
    done = world.optimize(
        reward=reward, batch=IMAGES, iterations=ITERATIONS, lr=0.03, regularizer="none", keep="best_reward",
        gradient_steps=gradient_steps, seed=21, **options,
    )  # fmt: skip
    trace = done.result.trace
    found = [[r["reward"] for r in trace.of(b)] for b in range(IMAGES)]
    return [max(rewards) - rewards[0] for rewards in found]


def main() -> None:
    world, rows = World(), []
    print("| reward | sampler | steps | last 3 | all | share |\n|---|---|---|---|---|---|")
    for name, reward in (("brightness", PixelReward("brightness")), ("Demo Aesthetic", demo.demo_aesthetic())):
        for sampler, cfg in SAMPLERS:
            for steps in STEPS:
                of = {"reward": name, "sampler": sampler, "steps": steps}
                means = []
                for gradient_steps in (3, 0):
                    found = gains(world, reward, gradient_steps, steps=steps, sampler=sampler, cfg=cfg)
                    rows += [
                        of | {"gradient_steps": gradient_steps, "image": b, "gain": g} for b, g in enumerate(found)
                    ]
                    means.append(sum(found) / IMAGES)
                last, every = means
                print(f"| {name} | {sampler} | {steps} | {last:.3f} | {every:.3f} | {last / every:.2f} |", flush=True)
    write(ROOT / "docs" / "results" / "few_steps.csv", rows)


if __name__ == "__main__":
    main()
