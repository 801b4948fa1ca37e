"""The page of `diffattn compare` in a real browser: sorting, plots, videos in step, no requests."""

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffattn.draw import NONE, png
from diffattn.pipelines.compare import mask_images, results
from diffattn.pipelines.compare.case import Case, dense_and_floors
from diffattn.pipelines.compare.comparison import Comparison, Folder
from diffattn.pipelines.compare.measures import MEASURES
from diffattn.pipelines.compare.page import page
from diffattn.pipelines.compare.results import write_results
from diffattn.pipelines.compare.sample_table import Row
from diffattn.pipelines.run.request import Request
from diffattn.pipelines.run.video import write_picture, write_video

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FRAMES, FPS = 12, 12.0
VIDEOS = "[...document.querySelectorAll('#media video')]"
PROMPTS = ('a "red" circle </script><b>', "a square & more")
# PSNR, share of the pairs and seconds by case; the last method is the best and the slowest.
CASES = {
    "low": (20.0, 0.2, 1.0),
    "middle": (25.5, 0.5, 2.0),
    "dominated": (21.0, 0.6, 2.5),
    "high": (30.25, 0.8, 3.0),
}


def moving(shift: int) -> np.ndarray:
    frames = np.full((FRAMES, 64, 64, 3), 40 + shift, np.uint8)
    for index in range(FRAMES):
        frames[index, 20:40, 4 * index : 4 * index + 12] = (250, 200, 40)
    return frames


def made(
    folder: Path, picture: bool = False, flex: bool = False
) -> tuple[Comparison, Folder, list[Row]]:
    base = Request("any", model="a-model", steps=4)
    attention = {"type": "gna"}
    groups = {"low": "one", "middle": "one", "dominated": "two", "high": "two"}
    cases = [Case(name, attention, groups=(groups[name],)) for name in CASES]
    if flex:
        cases.append(Case("floor: FlexAttention, low", attention, groups=("one",), flex_of="low"))
    measures = tuple(measure.name for measure in MEASURES)
    comparison = Comparison(
        base, (*dense_and_floors("float32"), *cases), PROMPTS, (0, 1), measures, "A & B"
    )
    found = Folder(folder)
    rows = []
    for name in ("samples", "dense", "masks"):
        (folder / name).mkdir()
    for sample in comparison.samples:
        fps = {} if picture else {"fps": FPS}
        frames = moving(0)[:1] if picture else moving(0)
        np.savez_compressed(found.dense_frames(sample), frames=frames, **fps)
        for index, case in enumerate(comparison.cases):
            path = found.video(comparison.stem(case), sample, picture)
            if picture:
                write_picture(path, Image.fromarray(moving(10 * index)[0]))
            else:
                write_video(path, moving(10 * index), FPS)
            psnr, density, seconds = CASES.get(case.name, (45.0, 1.0, 4.0))
            values: dict[str, float | str] = dict.fromkeys(measures, "not installed: nothing")
            values["psnr"] = psnr + sample.number / 8
            values["ssim"] = 0.9 - 0.01 * index
            if case.name == "dense":
                values |= {"psnr": "", "ssim": ""}
            if case.name == "floor: kernel":
                values["psnr"] = float("inf")
            rows.append(
                Row(case.name, *sample.key, seconds, seconds / 2, 1.0, density,
                    str(path.relative_to(folder)), values)
            )  # fmt: skip
    return comparison, found, rows


def written(folder: Path, **options: Any) -> Path:
    comparison, found, rows = made(folder, **options)
    papers = [{"method": "Radial <b>", "setting": "Hunyuan", "paper": "27.3 dB", "here": "20 dB"}]
    record = {"settings": comparison.to_dict()["settings"], "device": {"name": "a CPU"}}
    found.page.write_text(page(comparison, found, rows, record, papers), "utf-8")
    return found.page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("compared"))


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Any]:
    """The page, and a check at the end that nothing was said on the console or asked for."""
    yield from _watched(browser, file)


def _watched(browser: Any, path: Path) -> Iterator[Any]:
    shown = browser.new_page(viewport={"width": 1300, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    shown.on("console", lambda message: said.append(message.text))
    shown.on("pageerror", lambda error: said.append(str(error)))
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(path.as_uri())
    until(shown, f"{VIDEOS}.every(video => video.readyState >= 2)")
    yield shown
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    shown.close()


def until(shown: Any, condition: str) -> None:
    """Wait for a condition; the page's policy forbids the polling of playwright's own function."""
    for _ in range(600):
        if shown.evaluate(condition):
            return
        shown.wait_for_timeout(50)
    raise AssertionError(f"never {condition}")


def names(shown: Any) -> list[str]:
    return shown.eval_on_selector_all("#table tbody tr", "rows => rows.map(r => r.dataset.case)")


def clocks(shown: Any) -> list[float]:
    return shown.evaluate(f"{VIDEOS}.map(video => video.currentTime)")


class TestInABrowser:
    def test_the_table_sorts(self, opened: Any) -> None:
        everything = ["dense", "floor: precision", "floor: kernel", *CASES]
        assert names(opened) == everything
        cell = opened.locator("tr[data-case=middle] td").nth(4)
        assert cell.inner_text() == "25.81 ± 0.16"
        opened.click("th[data-column=psnr] button")
        assert names(opened) == [
            "floor: kernel", "floor: precision", "high", "middle", "dominated", "low", "dense"
        ]  # fmt: skip
        assert opened.get_attribute("th[data-column=psnr]", "aria-sort") == "descending"
        opened.click("th[data-column=psnr] button")
        assert names(opened)[:4] == ["low", "dominated", "middle", "high"]
        assert names(opened)[-1] == "dense"  # without a number: last in both directions
        opened.click("th[data-column=seconds] button")
        assert names(opened)[:3] == ["low", "middle", "dominated"]
        assert "equal" in opened.inner_text("tr[data-case='floor: kernel']")
        assert opened.inner_text("tr[data-case=high] td.best >> nth=0").startswith("30.56")

    def test_measures_without_numbers_are_named(self, opened: Any) -> None:
        assert "LPIPS" in opened.inner_text("body")
        assert "not installed: nothing." in opened.inner_text("body")
        assert "LPIPS" not in opened.inner_text("#table")

    def test_the_plots_have_the_front(self, opened: Any) -> None:
        for cost in ("density", "seconds"):
            plot = opened.locator(f"svg[data-cost={cost}]")
            assert plot.locator("circle").count() == len(CASES)
            corners = plot.locator("polyline").get_attribute("points").split()
            assert len(corners) == 3  # without the dominated case
        opened.select_option("#quality", "ssim")
        front = opened.locator("svg[data-cost=density] polyline")
        assert front.count() == 0  # the cheapest case has the best SSIM
        opened.select_option("#quality", "psnr")
        circle = opened.locator("svg[data-cost=density] circle[data-case=high]")
        circle.click()
        assert opened.get_attribute("tr[data-case=high]", "class").split() == ["case", "marked"]
        assert "floor: kernel: equal (beyond the plot)" in opened.inner_text("#plots")
        assert opened.inner_text("#legend") == "gna"

    def test_videos_play_in_step(self, opened: Any) -> None:
        assert opened.locator("#media video").count() == 3 + len(CASES)
        assert len(set(clocks(opened))) == 1
        before = clocks(opened)[0]
        opened.click("#play")
        assert opened.inner_text("#play") == "Pause"
        until(opened, f"{VIDEOS}[0].currentTime > {before + 0.2}")
        for _ in range(5):
            times = clocks(opened)
            assert max(times) - min(times) < 1.5 / FPS
            opened.wait_for_timeout(60)
        opened.click("#play")
        until(opened, f"{VIDEOS}.every(video => video.paused && !video.seeking)")
        assert len(set(clocks(opened))) == 1
        shown = int(re.fullmatch(rf"frame (\d+) of {FRAMES}", opened.inner_text("#frame"))[1])
        assert clocks(opened)[0] == pytest.approx((shown - 0.5) / FPS, abs=1e-3)

    def test_it_begins_anew_at_the_end(self, opened: Any) -> None:
        opened.locator("#scrub").fill(str(FRAMES - 2))
        opened.click("#play")
        until(opened, f"{VIDEOS}[0].currentTime < 0.5")
        assert opened.inner_text("#play") == "Pause"

    def test_the_scrubber_shows_the_frame(self, opened: Any) -> None:
        """The bright bar stands where frame 7 has drawn it, in every video."""
        opened.locator("#scrub").fill("6")
        opened.click("#forth")
        until(opened, f"{VIDEOS}.every(video => !video.seeking)")
        assert opened.inner_text("#frame") == f"frame 8 of {FRAMES}"
        found = opened.evaluate(
            """[...document.querySelectorAll('#media video')].map(video => {
              const canvas = document.createElement('canvas');
              [canvas.width, canvas.height] = [64, 64];
              const context = canvas.getContext('2d');
              context.drawImage(video, 0, 0);
              const row = context.getImageData(0, 30, 64, 1).data;
              return [...Array(64).keys()].filter(x => row[4 * x] > 200 && row[4 * x + 1] > 150);
            })"""
        )
        for bar in found:
            # Frame 8 of 12 has the bar at 28 to 39; edges are blurred by the coding of colours.
            assert bar[0] == pytest.approx(28, abs=1)
            assert bar[-1] == pytest.approx(39, abs=1)

    def test_samples_and_boxes_choose_the_videos(self, opened: Any) -> None:
        first = opened.get_attribute("#media figure[data-case=low] video", "src")
        opened.uncheck("tr[data-case=high] input")
        assert opened.locator("#media figure[data-case=high]").count() == 0
        assert opened.locator("#sample option").count() == 4
        assert opened.locator("#sample option").first.inner_text() == f"{PROMPTS[0]} (seed 0)"
        opened.select_option("#sample", "3")
        assert opened.locator("#media video").count() == 2 + len(CASES)
        assert "20.4 dB, 20% of the pairs, 1.0 s" in opened.inner_text("#media")
        assert opened.get_attribute("#media figure[data-case=low] video", "src") == first

    def test_groups_and_tests(self, opened: Any) -> None:
        assert opened.locator("#floors tbody tr").count() == 2 * len(CASES)
        assert opened.locator("#between tbody tr").count() == 2  # within each group
        opened.click("button[data-group=two]")
        assert names(opened) == ["dense", "floor: precision", "floor: kernel", "dominated", "high"]
        assert opened.locator("#floors tbody tr").count() == 4
        assert opened.locator("#media video").count() == 5
        opened.uncheck("tr[data-case=high] input")
        opened.click("button[data-group='']")
        # A group shows its own videos, whichever were shown before.
        assert opened.locator("#media video").count() == 3 + len(CASES)
        row = opened.locator("#floors tbody tr").first.inner_text().split("\t")
        assert row[:4] == ["low", "floor: precision", "0 / 4 of 4", "-25.00"]
        assert float(row[4]) == pytest.approx(0.125)

    def test_a_floor_of_one_case(self, browser: Any, tmp_path: Path) -> None:
        floor = "floor: FlexAttention, low"
        for shown in _watched(browser, written(tmp_path, flex=True)):
            assert shown.locator(f"tr.floor[data-case='{floor}']").count() == 1
            assert "whose mask torch's FlexAttention computes" in shown.inner_text("body")
            tests = shown.locator("#floors tbody tr").all_inner_texts()
            assert [row.split("\t")[0] for row in tests if floor in row] == ["low"]
            assert floor not in shown.inner_text("#between")
            shown.click("button[data-group=two]")
            assert floor not in names(shown)
            shown.click("button[data-group=one]")
            assert names(shown)[-1] == floor

    def test_texts_of_users_are_text(self, opened: Any) -> None:
        assert opened.title() == "A & B"
        assert opened.locator("b").count() == 0
        assert "Radial <b>" in opened.inner_text("#papers")
        opened.click("summary")
        assert "a-model" in opened.inner_text("pre")

    def test_pictures(self, browser: Any, tmp_path: Path) -> None:
        for shown in _watched(browser, written(tmp_path, picture=True)):
            assert shown.locator("#media img").count() == 3 + len(CASES)
            assert not shown.is_visible("#play")
            assert "Pictures" in shown.inner_text("body")


def test_a_page_does_not_grow_without_end(tmp_path: Path) -> None:
    comparison, folder, rows = made(tmp_path)
    whole = page(comparison, folder, rows, {})
    small = page(comparison, folder, rows, {}, most_media=1000)
    assert len(small) < len(whole) - 30_000
    words = "The videos of 1 of 4 samples are in this page"
    assert words in small
    assert words not in whole


def test_a_page_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    comparison, folder, rows = made(tmp_path)
    for some in ([], rows[:1]):
        assert "A &amp; B" in page(comparison, folder, some, {})


def test_a_mask_of_several_cases_is_in_the_page_once(browser: Any, tmp_path: Path) -> None:
    comparison, folder, rows = made(tmp_path)
    pictures = {"low": 30, "middle": 30, "dominated": 30, "high": 90}
    for case in comparison.cases:
        if case.name in pictures:
            grey = np.full((8, 8, 3), pictures[case.name], np.uint8)
            folder.mask(comparison.stem(case)).write_bytes(png(grey))
    text = page(comparison, folder, rows, {})
    folder.page.write_text(text, "utf-8")
    assert text.count("data:image/png") == 2
    for shown in _watched(browser, folder.page):
        captions = shown.locator("#masks figcaption")
        assert captions.all_inner_texts() == ["low, and 2 more", "high"]
        assert captions.first.get_attribute("title") == "low\nmiddle\ndominated"
        shown.click("button[data-group=two]")
        assert captions.all_inner_texts() == ["dominated", "high"]


def test_numbers_of_one_are_said_as_one(tmp_path: Path) -> None:
    comparison, folder, rows = made(tmp_path)
    assert "2 prompts x 2 seeds, on" in page(comparison, folder, rows, {})
    one = replace(comparison, prompts=PROMPTS[:1], seeds=(0,))
    assert "1 prompt x 1 seed, on" in page(one, folder, rows, {})


def test_many_tests_are_left_to_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, folder, rows = made(tmp_path)
    folder.settings.write_text(
        json.dumps({"diffattn_comparison": 1, **comparison.to_dict(), "versions": {}})
    )
    said = "\n".join(write_results(comparison, folder, rows))
    assert "PSNR against the floors" in said
    monkeypatch.setattr(results, "_MOST_TESTS", 10)
    said = "\n".join(write_results(comparison, folder, rows))
    assert "PSNR against the floors" not in said
    assert "| high | 4 |" in said
    assert f"16 paired tests against the floors: {folder.summary}, {folder.page}" in said
    assert "PSNR against the floors" in folder.summary.read_text("utf-8")


def test_a_picture_of_clusters_ends_with_the_last_cluster() -> None:
    import torch

    from diffattn import TokenGrid
    from diffattn.counting import counted_pairs
    from diffattn.methods import Site, from_dict

    grid = TokenGrid(4, 6, 6)
    settings = {"type": "svg2", "block": 16, "query_cluster": 24, "key_cluster": 12, "top_p": 0.5}
    method = from_dict(settings)
    qkv = torch.randn(3, 1, grid.tokens, 1, 8, generator=torch.Generator().manual_seed(0))
    with counted_pairs() as pairs:
        method.attend(*qkv, Site("wan", 0, 1, grid))
    layout = pairs.layout
    assert layout is not None
    used = int((layout.full_count + layout.partial_count)[0, 0].count_nonzero())
    assert used < layout.rows
    image = mask_images._image(pairs, method, grid)
    assert image is not None
    assert (image != np.array(NONE)).any((1, 2))[-1]
    per_row = 256 // max(layout.rows, layout.columns)
    assert image.shape[0] == used * per_row
    whole = np.full((6, 4, 3), NONE, np.uint8)
    assert mask_images._filled(whole) is whole


def test_no_address_stands_in_the_page(tmp_path: Path) -> None:
    text = written(tmp_path).read_text("utf-8")
    found = set(re.findall(r"https?://[^\"'\s]+", text))
    assert found == {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    assert "default-src 'none'" in text
