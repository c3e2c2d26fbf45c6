"""How far the gradient of the last three steps gets against that of all, by the number of sampling steps.

`python dev.py bench few-steps` prints, for three samplers and two rewards on four images, the mean gain of the best
iterate after five iterations: why a node with few steps takes all of them (`FEW_STEPS` in nodes/shared/inputs.py).
"""

from __future__ import annotations

from testing.world import PixelReward, World, demo

STEPS = (6, 8, 10, 12)
SAMPLERS = (("euler_ancestral", 5.0), ("euler", 5.0), ("lcm", 1.0))
IMAGES, ITERATIONS = 4, 5


def gain(world: World, reward, gradient_steps: int, **options) -> float:
    done = world.optimize(
        reward=reward, batch=IMAGES, iterations=ITERATIONS, lr=0.03, regularizer="none", keep="best_reward",
        gradient_steps=gradient_steps, seed=21, **options,
    )  # fmt: skip
    trace = done.result.trace
    found = [[r["reward"] for r in trace.of(b)] for b in range(IMAGES)]
    return sum(max(rewards) - rewards[0] for rewards in found) / IMAGES


def main() -> None:
    world = World()
    print("| reward | sampler | steps | last 3 | all | share |\n|---|---|---|---|---|---|")
    for name, reward in (("brightness", PixelReward("brightness")), ("Demo Aesthetic", demo.demo_aesthetic())):
        for sampler, cfg in SAMPLERS:
            for steps in STEPS:
                last, every = (gain(world, reward, g, steps=steps, sampler=sampler, cfg=cfg) for g in (3, 0))
                print(f"| {name} | {sampler} | {steps} | {last:.3f} | {every:.3f} | {last / every:.2f} |", flush=True)


if __name__ == "__main__":
    main()
