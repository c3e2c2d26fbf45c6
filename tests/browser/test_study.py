"""The page for people, from a file, in a real browser: answers are kept, undone and saved."""

from __future__ import annotations

import csv
import json

import pytest
from PIL import Image

from bench.grid import Failure
from bench.study import answered, write


@pytest.fixture
def folder(tmp_path):
    listing = []
    for n in range(4):
        for side, colour in (("a", "white"), ("b", "black")):
            Image.new("RGB", (32, 32), colour).save(tmp_path / f"{n}_{side}.png")
        names = {"a": f"{n}_a.png", "b": f"{n}_b.png"} | {"target": "x", "method": "mira", "against": "dno"}
        listing.append({"id": f"pair{n}", "prompt": f"an </script> image {n}"} | names)
    write(tmp_path, listing)
    return tmp_path


def shown(page) -> list[str]:
    return [img.get_attribute("src")[2] for img in page.query_selector_all("#pair img")]


def test_a_person_answers_all_pairs(browser, folder, tmp_path):
    errors = []
    context = browser.new_context()
    page = context.new_page()
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto((folder / "index.html").as_uri())
    chosen, first = {}, page.inner_text("#prompt")
    for n in range(4):
        prompt, sides = page.inner_text("#prompt"), shown(page)
        assert prompt.startswith("an </script> image") and sorted(sides) == ["a", "b"]
        if n == 0:
            page.click("#pair button >> nth=1")
            chosen[prompt[-1]] = sides[1]
        elif n == 3:
            page.keyboard.press("0")
            chosen[prompt[-1]] = "tie"
        else:
            page.keyboard.press("1")
            chosen[prompt[-1]] = sides[0]
        if n == 1:  # a closed tab loses nothing
            closed, page = page, context.new_page()
            page.goto((folder / "index.html").as_uri())
            for _ in range(50):  # what a page stores is on its way to the others
                if "2 of 4 answered" in page.inner_text("#progress"):
                    break
                page.wait_for_timeout(100)
                page.reload()
            closed.close()
            assert "2 of 4 answered" in page.inner_text("#progress")
    assert "last pair" in page.inner_text("#prompt") and not page.is_visible("#tie")
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(tmp_path / "answers.csv")
    with (tmp_path / "answers.csv").open(newline="") as file:
        rows = {r["pair"][-1]: r["winner"] for r in csv.DictReader(file)}
    assert rows == chosen
    points = sum({"a": 1, "b": 0, "tie": 0.5}[w] for w in chosen.values())
    assert f"of 4; win rate {points / 4:.3f}" in answered(folder, [tmp_path / "answers.csv"])
    for _ in range(4):
        page.click("#back")
    assert page.inner_text("#prompt") == first and page.is_disabled("#back")
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#again")
    page.wait_for_function("document.querySelector('#progress').textContent.startsWith('0 of 4')")
    assert not errors
    context.close()


def test_answers_to_something_else_are_refused(folder, tmp_path):
    path = tmp_path / "answers.csv"
    path.write_text("pair,winner,left,time\nother,a,a,now\n")
    with pytest.raises(Failure, match="1 of 1 answers are to pairs of another study, other"):
        answered(folder, [path])
    path.write_text("hello\n")
    with pytest.raises(Failure, match="holds no answers"):
        answered(folder, [path])
    with pytest.raises(Failure, match="no such file"):
        answered(folder, [tmp_path / "none.csv"])


def test_the_list_of_pairs_is_there_for_a_model_too(folder):
    assert [p["id"] for p in json.loads((folder / "pairs.json").read_text())["pairs"]] == [f"pair{n}" for n in range(4)]
