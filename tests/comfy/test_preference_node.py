"""The MIRA-DPO node, called as ComfyUI's executor calls it."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import threading
import time
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import server
import torch

from testing.pack import as_node, mira

nodes, judges, preference = mira("nodes"), mira("nodes.editor.judges"), mira("nodes.preference")
PixelReward, JPEG = mira("rewards.pixel").PixelReward, mira("rewards.jpeg").JPEG

pytestmark = pytest.mark.timeout(120)  # a person who is not there is waited for
INPUTS = dict(
    judge="reward", seed=1, steps=3, cfg=5.0, sampler_name="euler_ancestral", scheduler="normal", denoise=1.0,
    iterations=3, method="dpo", candidates=2, learning_rate=0.05, beta=1.0, energy="mira", explore=0.3, step=1.0,
    keep="last_winner", skip_ties=False, kick=0.0, memory="auto", timeout=0.0, on_timeout="stop", choices="", prompt="",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def somebody(prompt_server):
    prompt_server.client_id = "me"


def prefer(world, **changes):
    inputs = INPUTS | {
        "model": world.model,
        "positive": world.positive,
        "negative": world.negative,
        "vae": world.vae,
        "latent_image": {"samples": torch.zeros(1, 4, 8, 8)},
        "reward": JPEG(),
    }
    clone = as_node(nodes.MiraDPOPreference)
    with torch.inference_mode():
        return clone.execute(**(inputs | changes))


def test_a_cancelled_one_is_asked_again_whatever_is_painted_anew_after_it(world, monkeypatch):
    widgets = INPUTS | {"final_restart": 0.6, "seed": 81}
    before = nodes.MiraDPOPreference.fingerprint_inputs(**widgets)

    def cancel(*_):
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(mira("nodes.editor.live").LiveRun, "__call__", cancel)
    trace = prefer(world, **widgets).args[2]
    assert any("final_restart was left out" in notice for notice in trace.notices)
    assert nodes.MiraDPOPreference.fingerprint_inputs(**widgets) != before


@pytest.mark.parametrize("method", preference.METHODS)
@pytest.mark.parametrize("sampler", ["euler_ancestral", "euler", "dpmpp_2m_sde"])
def test_every_method_with_a_black_box(world, method, sampler):
    seed = 2**64 - 1 if sampler == "euler" else 1  # the largest that there is
    out = prefer(world, method=method, sampler_name=sampler, keep="incumbent", seed=seed)
    optimized, plain, trace, choices = out.args[:4]
    assert torch.isfinite(optimized["samples"]).all()
    assert len(trace.rows) == 3 and {c[0] for c in json.loads(choices)} == {0, 1, 2}
    assert torch.equal(plain["samples"], world.ksampler(seed=seed, steps=3, sampler=sampler))
    assert out.ui["mira"][0]["rows"][0]["reward"] == trace.rows[0]["reward"]


def test_the_other_candidate_is_of_another_seed_as_the_host_makes_it(world):
    """By `batch_index`: images of one place in their batch are the same, and so is what they are compared with."""
    latent = torch.zeros(3, 4, 8, 8)
    for places, alike in (([0, 0, 0], True), ([0, 1, 2], False)):
        given = {"samples": latent, "batch_index": places}
        trace = prefer(world, method="dpo", sampler_name="euler", latent_image=given).args[2]
        rewards = [{round(trace.of(b)[k]["reward"], 4) for b in range(3)} for k in range(3)]
        assert all(len(seen) == 1 for seen in rewards) if alike else len(rewards[0]) == 3


def test_candidates_are_compared_under_the_same_draw(world):
    """Of a reward that draws at random, else the draws would be compared."""
    drawn = []

    class Drawing(JPEG):
        def evaluation(self, k):
            drawn.append(k)

    prefer(world, reward=Drawing(), method="dueling")
    assert len(drawn) >= 6 and set(drawn) == {0}


@pytest.mark.parametrize(
    "how",
    [{"method": "dpo"}, {"method": "dueling", "step": 0.5}, {"method": "best_of_n"}],
    ids=lambda how: how["method"],
)
def test_the_choices_of_a_reward_repeat_its_run(world, how):
    """Also those between the kept image and a winner, which numbers decide without asking."""
    asked = how | {"keep": "incumbent", "iterations": 4}
    for seed in (7, 8, 9):
        out = prefer(world, seed=seed, reward=PixelReward("brightness"), **asked)
        again = prefer(world, seed=seed, judge="recorded choices", reward=None, choices=out.args[3], **asked)
        assert torch.equal(again.args[0]["samples"], out.args[0]["samples"]) and again.args[2].kept == out.args[2].kept


BLACK_BOX = """
FACTS = {"name": "mine", "typical": (0.0, 1.0), "differentiable": False}

def score(images, prompts):
    images.sub_(0.48).div_(0.27)
    return [float(image.cpu().numpy().std()) for image in images]
"""


@pytest.mark.parametrize("method", ["dpo", "dueling"])
def test_a_black_box_may_do_what_it_likes_with_its_images(world, tmp_path, method):
    (tmp_path / "mine.py").write_text(BLACK_BOX)
    trace = prefer(world, reward=mira("rewards.python_file").PythonReward(tmp_path / "mine.py"), method=method).args[2]
    assert len({row["reward"] for row in trace.of(0)}) > 1


def test_two_runs_are_the_same_and_the_choices_repeat_it(world):
    a, b = prefer(world), prefer(world)
    assert torch.equal(a.args[0]["samples"], b.args[0]["samples"])
    for record in (a.args[3], a.args[2].to_json()):
        again = prefer(world, judge="recorded choices", choices=record, reward=None)
        assert torch.equal(a.args[0]["samples"], again.args[0]["samples"])


def test_a_batch_with_a_mask(world):
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1
    latent = {"samples": torch.randn(3, 4, 8, 8), "noise_mask": mask}
    out = prefer(world, latent_image=latent, method="dueling", keep="incumbent", denoise=0.7)
    assert out.args[0]["samples"].shape == (3, 4, 8, 8) and len(out.args[2].rows) == 9


def test_methods_without_a_gradient_need_none(world, monkeypatch):
    def never(*_):
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(mira("nodes.host.runs"), "check_gradient", never)
    prefer(world, method="dueling", sampler_name="dpm_fast")
    with pytest.raises(ValueError, match="dpm_fast cannot be optimised through"):
        prefer(world, method="dpo", sampler_name="dpm_fast")


def posted(body: bytes) -> tuple[int, dict]:
    class Request:
        async def read(self):
            return body

    response = asyncio.run(judges.choose(Request()))
    return response.status, json.loads(response.body)


class Person:
    """Answers every pair in a thread, as a browser would over HTTP."""

    def __init__(self, answers, client="me"):
        self.answers, self.client, self.seen, self.replies = list(answers), client, [], []

    def __enter__(self):
        self.running = True
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.running = False
        self.thread.join()

    def post(self, **body):
        return posted(json.dumps(body).encode())

    def loop(self):
        while self.running:
            pending = next(iter(judges._pending.values()), None)
            if pending is None or (self.seen and self.seen[-1]["token"] == pending.token) or not self.answers:
                time.sleep(0.01)
                continue
            self.seen.append(pending.shown)
            answer = self.answers.pop(0)
            body = dict(prompt_id=pending.prompt, node_id=pending.node, token=pending.token, client_id=self.client)
            self.replies.append(self.post(**body, choice=answer))
            self.last = body


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b"[]", 400),
        (b'{"choice": [1]}', 400),
        (b'{"choice": 0}', 400),
        (b'{"choice": true}', 400),
        (b'{"choice": "left"}', 400),
        (b'{"choice": 1, "node_id": "1"}', 409),
    ],
)
def test_what_is_no_answer_is_refused(body, status):
    assert posted(body)[0] == status


def test_a_token_in_any_script_is_only_a_wrong_one():
    judges._pending["77"] = judges.Pending("p", "77", None, "token", {})
    try:
        status, said = posted(json.dumps(dict(prompt_id="p", node_id="77", token="j\u00f8t\u00fcn", choice=1)).encode())
        assert status == 409 and "are not the ones that are waited for" in said["error"]
        assert posted(b'{"prompt_id": "p", "node_id": "77", "token": "\\ud800", "choice": 1}')[0] == 409
    finally:
        del judges._pending["77"]


def test_a_person_chooses(world):
    with Person([1, "tie", 2]) as person:
        out = prefer(world, judge="person", reward=None)
    assert [s["iteration"] for s in person.seen] == [0, 1, 2]
    choices = json.loads(out.args[3])
    assert [c[4] for c in choices] == [False, True, False]
    again = prefer(world, judge="recorded choices", reward=None, choices=out.args[3])
    assert torch.equal(out.args[0]["samples"], again.args[0]["samples"])
    status, reply = person.post(**person.last, choice=1)  # late
    assert status == 409 and "waits for no choice" in reply["error"]


def test_who_stands_where_is_drawn(world):
    with Person([1] * 12) as person:
        out = prefer(world, judge="person", reward=None, iterations=12, method="best_of_n", steps=1)
    assert len(person.seen) == 12
    assert {c[2] for c in json.loads(out.args[3])} == {0, 1}


@pytest.mark.parametrize("method", ["dpo", "dueling", "best_of_n"])
def test_a_person_chooses_among_several_and_dpo_asks_for_the_worst_too(world, method):
    answers = [3, 1, 2, "back", 4, "tie", "tie", 1, 3] if method == "dpo" else [3, 4, "tie", 1]
    settings = dict(reward=None, method=method, candidates=4, iterations=4)
    with Person(answers) as person:
        out = prefer(world, judge="person", **settings)
    best, worst = [(k, "best", 4) for k in range(4)], [(k, "worst", 3) for k in range(4)]
    both = [best[0], worst[0], best[1], worst[1], best[1], worst[1], best[2], best[3], worst[3]]
    asked = [(s["iteration"], s["wanted"], len(s["images"])) for s in person.seen]
    assert asked == (both if method == "dpo" else best)
    choices = json.loads(out.args[3])
    assert [c[4] for c in choices[:3]] == [False, False, True] and all(c[2] != c[3] for c in choices)
    again = prefer(world, judge="recorded choices", choices=out.args[3], **settings)
    assert torch.equal(out.args[0]["samples"], again.args[0]["samples"])


def test_what_was_chosen_before_good_enough_counts(world):
    """Of several, dpo asks for the worst too: to stop there keeps the best that was just chosen."""
    with Person([2, "stop"]) as person:
        out = prefer(world, judge="person", reward=None, method="dpo", candidates=3, iterations=5)
    assert [s["wanted"] for s in person.seen] == ["best", "worst"]
    assert len(json.loads(out.args[3])) == 1 and out.args[2].reasons == ["the judge had enough"]
    assert out.args[2].kept == [0]


def test_good_enough_and_a_step_back(world):
    with Person([1, 2, "back", 1, "stop"]) as person:
        out = prefer(world, judge="person", reward=None, iterations=9)
    assert [s["iteration"] for s in person.seen] == [0, 1, 2, 1, 2]
    assert len(json.loads(out.args[3])) == 2 and out.args[2].reasons == ["the judge had enough"]


@pytest.mark.parametrize(
    ("policy", "reason", "notice"),
    [
        (
            "stop",
            "a choice that nobody made within 0.2 s",
            "ended by a choice that nobody made within 0.2 s: this is the",
        ),
        ("tie", "all comparisons done", "nobody chose in time, 2 times: those count as ties"),
    ],
)
def test_a_timeout_has_its_policy_and_is_no_answer(world, policy, reason, notice):
    out = prefer(world, judge="person", reward=None, iterations=2, timeout=0.2, on_timeout=policy)
    assert out.args[2].reasons == [reason] and any(n.startswith(notice) for n in out.args[2].notices)
    assert not judges._pending


def test_a_choice_of_the_last_moment_counts(prompt_server, monkeypatch):
    """It was taken, and the page was told so."""

    def clock():
        if pending := judges._pending.pop("7", None):  # as the route does, after the last look and before the timeout
            pending.answer = 1
            pending.answered.set()
            return math.inf
        return 0.0

    monkeypatch.setattr(judges.time, "monotonic", clock)
    judge = judges.PersonJudge("7", "p", None, 1, 0, timeout=0.01, on_timeout="stop", worst=False)
    verdict = judge(0, [torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)])
    assert not verdict.stop and not judge.late and not verdict.tie.any()


def test_a_cancel_while_paused_keeps_the_best_so_far(world):
    import comfy.model_management as management

    def cancel():
        while len(person.seen) < 2 or not judges._pending:
            time.sleep(0.01)
        management.interrupt_current_processing()

    with Person([1]) as person:
        person.answers.append(1)
        thread = threading.Thread(target=cancel, daemon=True)
        thread.start()
        out = prefer(world, judge="person", reward=None, iterations=9)
        thread.join()
    assert out.args[2].reasons[0].startswith("interrupted at iteration")
    assert not judges._pending


def test_choices_are_not_asked_for_twice(world):
    """Neither after a cancel nor where there are more of them; another seed begins without them."""
    import comfy.model_management as management

    same = {"latent_image": {"samples": torch.zeros(1, 4, 8, 8)}, "judge": "person", "reward": None, "seed": 77}

    def cancel():
        while len(person.seen) < 2 or not judges._pending:
            time.sleep(0.01)
        management.interrupt_current_processing()

    with Person([2, 1]) as person:
        thread = threading.Thread(target=cancel, daemon=True)
        thread.start()
        cut = prefer(world, iterations=3, **same)
        thread.join()
    assert cut.args[2].reasons[0].startswith("interrupted at iteration 2")
    with Person([2]) as person:
        whole = prefer(world, iterations=3, **same)
    assert [s["iteration"] for s in person.seen] == [2]
    first, choices = json.loads(cut.args[3]), json.loads(whole.args[3])
    assert choices[:2] == first and len(first) == 2 and len(choices) == 3
    assert any("choices of the run before were repeated, 2 of them" in n for n in whole.args[2].notices)
    with Person(["back", 2, 1]) as person:  # and may be taken back
        more = prefer(world, iterations=4, timeout=30.0, **same)
    assert [s["iteration"] for s in person.seen] == [3, 2, 3]
    assert json.loads(more.args[3])[:2] == first
    recorded = prefer(world, iterations=4, **same | {"judge": "recorded choices"}, choices=more.args[3])
    assert torch.equal(recorded.args[0]["samples"], more.args[0]["samples"])
    with Person([1]) as person:
        prefer(world, iterations=1, **same | {"seed": 78})
    assert [s["iteration"] for s in person.seen] == [0]


def test_choices_of_a_run_that_was_killed_are_in_its_record_and_can_be_gone_on_with(world, tmp_path):
    same = {"latent_image": {"samples": torch.zeros(1, 4, 8, 8)}, "judge": "person", "reward": None, "seed": 80}
    known = set(Path(folder_paths.get_output_directory()).rglob("*.png"))

    def kill():
        while len(person.seen) < 2 or not judges._pending:
            time.sleep(0.01)
        (file,) = {*Path(folder_paths.get_output_directory(), "mira_unfinished").glob("*.png")} - known
        shutil.copy(file, tmp_path / "left.png")
        person.answers.append(1)

    with Person([2, 1]) as person:
        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        whole = prefer(world, iterations=3, **same)
        thread.join()
    record = mira("nodes.record").read_trace(str(tmp_path / "left.png"), 0).to_json()
    choices = json.loads(whole.args[3])
    assert json.loads(record)["settings"]["choices"] == choices[:2]
    mira("nodes.shared.memo")._runs.clear()  # as in another server
    with Person([1]) as person:
        again = prefer(world, iterations=3, choices=record, **same)
    assert [s["iteration"] for s in person.seen] == [2] and len(json.loads(again.args[3])) == 3
    assert json.loads(again.args[3])[:2] == choices[:2]
    assert any("choices that are connected were repeated, 2 of them" in n for n in again.args[2].notices)
    with pytest.raises(ValueError, match="MIRA-DPO Preference: choices is not a record of choices"):
        prefer(world, iterations=3, choices="{}", **same)


def test_repeated_choices_stay_with_their_comparisons():
    """Also where one is made again for want of memory, or the repetition is cut short. Ties at its end are asked."""
    asked, images = [], [torch.zeros(1, 3, 2, 2)] * 2

    def person(k, candidates):
        asked.append(k)
        return judges.Verdict(*(torch.tensor([n]) for n in (1, 0, False)))

    choices = [[0, 0, 1, 0, False], [1, 0, 0, 1, False], [2, 0, 0, 1, True], [3, 0, 0, 1, True]]
    judge = judges.Resuming(choices, person)
    first = judge(0, images)
    judge.rewind(0)
    assert judge(0, images).best.tolist() == first.best.tolist() == [1] and judge.unused() == choices[1:2]
    assert judge(1, images).best.tolist() == [0] and not asked
    judge(2, images)
    judge.rewind(1)
    judge(1, images)
    assert asked == [2, 1] and judge.unused() == [] and judge.before.used == 2
    batch = judges.Resuming([[0, 0, 1, 0, False], [0, 1, 1, 0, True]], person)  # a comparison is repeated as a whole
    batch(0, [torch.zeros(2, 3, 2, 2)] * 2)
    assert asked == [2, 1, 0] and batch.before.used == 0


def test_what_was_chosen_outlives_a_shorter_run(world):
    same = {"latent_image": {"samples": torch.zeros(1, 4, 8, 8)}, "judge": "person", "reward": None, "seed": 79}
    with Person([2, 1, 2]):
        first = prefer(world, iterations=3, **same)
    with Person([]):
        prefer(world, iterations=1, **same)
    with Person([1]) as person:
        again = prefer(world, iterations=4, **same)
    assert [s["iteration"] for s in person.seen] == [3]
    assert json.loads(again.args[3])[:3] == json.loads(first.args[3])


def test_an_answer_has_to_fit(world):
    bad = {}

    def meddle():
        while not judges._pending:
            time.sleep(0.01)
        pending = next(iter(judges._pending.values()))
        body = dict(prompt_id=pending.prompt, node_id="1", token=pending.token, client_id="me", choice=1)
        person = Person([])
        server.PromptServer.instance.sockets["me"] = object()
        for name, change in {
            "choice": {"choice": "both"}, "place": {"choice": 3}, "node": {"node_id": "2"},
            "prompt": {"prompt_id": "other"}, "token": {"token": "x"},
            "client": {"client_id": "you"}, "no token": {"token": None},
        }.items():  # fmt: skip
            bad[name] = person.post(**(body | change))
        del server.PromptServer.instance.sockets["me"]
        bad["gone"] = person.post(**(body | {"client_id": "you"}))  # the one who queued it has left

    thread = threading.Thread(target=meddle, daemon=True)
    thread.start()
    prefer(world, judge="person", reward=None, iterations=1)
    thread.join()
    assert {k: v[0] for k, v in bad.items()} == {
        "choice": 400, "place": 400, "node": 409, "prompt": 409, "token": 409, "client": 403, "no token": 409,
        "gone": 200,
    }  # fmt: skip
    assert "another client queued this run" in bad["client"][1]["error"]


def test_a_page_that_was_loaded_again_sees_the_pair(world):
    listed = []

    class Request:
        query = {"client_id": "me"}

    def look():
        while not judges._pending:
            time.sleep(0.01)
        listed.extend(json.loads(asyncio.run(judges.list_pending(Request())).body)["pending"])

    thread = threading.Thread(target=look, daemon=True)
    with Person([1]) as person:
        person.answers, waiting = [], person.answers
        thread.start()

        def release():
            thread.join()
            person.answers = waiting

        threading.Thread(target=release, daemon=True).start()
        prefer(world, judge="person", reward=None, iterations=1)
    assert listed == person.seen and {"images", "wanted", "token"} <= listed[0].keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": None}, "reward is empty: connect a MIRA reward node"),
        ({"judge": "person", "method": "hybrid2"}, "method is hybrid2, which needs a reward's numbers"),
        ({"judge": "recorded choices"}, "choices is empty: connect"),
        ({"judge": "recorded choices", "choices": "[]"}, "choices is empty"),
        ({"judge": "recorded choices", "choices": "[[0, 1, 0, 1, false]]"}, "the recorded choices do not fit"),
        ({"iterations": 0}, "iterations is 0"),
        ({"beta": -1.0}, "beta is -1"),
        ({"latent_image": {"samples": torch.zeros(0, 4, 16, 16)}}, "the batch is empty"),
    ],
)
def test_bad_input(world, changes, message):
    with pytest.raises(ValueError, match=message):
        prefer(world, **changes)


def test_nobody_there_to_choose(world, prompt_server):
    prompt_server.client_id = None
    try:
        with pytest.raises(ValueError, match="nobody is connected to choose"):
            prefer(world, judge="person", reward=None)
        out = prefer(world, judge="person", reward=None, timeout=0.2, iterations=2)
        assert out.args[2].reasons == ["a choice that nobody made within 0.2 s"]
    finally:
        prompt_server.client_id = "me"


def test_a_reward_that_is_constant_or_no_number(world):
    class Constant(JPEG):
        value = 1.0

        def score(self, images, prompts):
            return torch.full((len(images),), self.value)

    out = prefer(world, reward=Constant(), iterations=9, steps=1)
    assert "no preference can be learned" in out.args[2].reasons[0]
    Constant.value = float("nan")
    with pytest.raises(ValueError, match="gives no number for any candidate"):
        prefer(world, reward=Constant())
