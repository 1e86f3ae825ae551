"""The pages in a real browser: the replay of a recorded answer, and the chat page, against a stub
of the server and the server.
"""

import itertools
import json
import re
import shutil
import threading
from dataclasses import replace

import httpx
import mlx.core as mx
import pytest

from mlx_diffgemma.cli.app import app
from mlx_diffgemma.generation.trace import FORMAT, Recorder, Tracer
from tests.browser import Stub, Watched, chunk, delta, opened, recorded
from tests.helpers.steps import STORY, ids_of, records_of, step
from tests.serving.process import serving, until

pytestmark = pytest.mark.browser
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> & <b>bold</b>"
BANDS = ("certain", "sure", "likely", "unsure", "guessing")


@pytest.fixture(scope="module")
def playwright():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as found:
        yield found


@pytest.fixture(scope="module")
def browser(playwright, tmp_path_factory):
    with opened(playwright, tmp_path_factory.mktemp("profile"), accept_downloads=True) as context:
        context.set_default_timeout(15000)
        yield context


@pytest.fixture(scope="module")
def timed_browser(playwright, tmp_path_factory):
    """One whose clock the tests turn, in all its tabs."""
    with opened(playwright, tmp_path_factory.mktemp("timed")) as context:
        context.set_default_timeout(15000)
        context.clock.install(time=0)
        context.clock.pause_at(1000)
        yield context


@pytest.fixture
def watched(browser):
    """A fresh tab; in the end it must have complained of nothing."""
    yield from tab_of(browser)


@pytest.fixture
def timed(timed_browser):
    yield from tab_of(timed_browser)


def tab_of(browser):
    found = Watched(browser)
    yield found
    found.page.close()
    assert found.complaints == []


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    """(path of a page that a real run recorded, its frames)."""
    path = tmp_path_factory.mktemp("replay") / "answer.html"
    app(
        ["generate", "-p", STORY, "--seed", "7", "-m", "80", "--trace", str(path)],
        standalone_mode=False,
    )
    return path, records_of(path)[1:-1]


@pytest.fixture(scope="module")
def trace_lines(replay):
    return "\n".join(json.dumps(record) for record in records_of(replay[0]))


@pytest.fixture
def stub():
    found = Stub()
    yield found
    found.close()


def number(page):
    return int(page.locator("input[type=range]").first.input_value())


def positions(page):
    return page.locator(".positions").first.text_content()


def contrast(first, second):
    def luminance(colour):
        parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        parts = [
            value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
            for value in parts
        ]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


class TestReplay:
    def test_every_step_can_be_reached_and_shows_its_frame(self, watched, replay):
        path, frames = replay
        page = watched.page
        page.goto(path.as_uri())
        slider = page.get_by_role("slider", name="Step")
        assert slider.get_attribute("max") == str(len(frames) - 1)
        assert positions(page) == "".join(frames[0]["pieces"])
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowLeft")
        assert positions(page) == "".join(frames[1]["pieces"])
        slider.fill("5")
        assert positions(page) == "".join(frames[5]["pieces"])
        figures = page.locator(".player .figures").inner_text()
        share = round(100 * frames[5]["accepted"].count("1") / len(frames[5]["accepted"]))
        for text in (
            f"6 of {frames[5]['max_steps']}",
            f"{frames[5]['mean_entropy']:.3f} nats",
            f"{share} %",
            f"{frames[5]['seconds']:.2f} s",
            "Tokens/s",
        ):
            assert text in figures, text
        page.keyboard.press("End")
        assert number(page) == len(frames) - 1
        first = "".join(next(frame["pieces"] for frame in frames if frame["reason"]))
        assert page.locator(".settled").text_content() == first, "the canvas before stays"
        assert "converged" in page.locator(".figure.reason").inner_text()
        page.keyboard.press("Home")
        assert number(page) == 0
        assert page.locator(".final").inner_text() == records_of(path)[-1]["text"]
        assert watched.requests == [path.as_uri()], "nothing but the file itself"

    def test_colours_tell_the_bands_apart_in_light_and_in_dark(self, watched, replay):
        path, frames = replay
        page = watched.page
        page.goto(path.as_uri())
        page.locator("input[type=range]").fill("7")
        bounds = (0.005, 0.1, 0.7, 2.0, float("inf"))
        for token, nats in zip(page.locator(".positions .token").all(), frames[7]["entropy"]):
            expected = next(index for index, bound in enumerate(bounds) if nats <= bound)
            assert f"band{expected}" in token.get_attribute("class").split()
        assert [token.inner_text() for token in page.locator(".legend .token").all()] == list(BANDS)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            colours = page.locator(".legend .token").evaluate_all(
                "all => all.map(one => [getComputedStyle(one).color, getComputedStyle(one).backgroundColor])"
            )
            assert len({ground for _, ground in colours}) == len(BANDS)
            for ink, ground in colours:
                assert contrast(ink, ground) >= 4.5, (scheme, ink, ground)
            stage = page.locator(".stage").evaluate(
                "one => [getComputedStyle(one).color, getComputedStyle(one).backgroundColor]"
            )
            assert contrast(*stage) >= 7

    @pytest.mark.parametrize("speed", ["0.5", "1", "2"])
    def test_it_plays_at_the_pace_of_the_recording(self, timed, replay, speed):
        path, frames = replay
        page = timed.page
        page.goto(path.as_uri())
        page.get_by_label("Speed").select_option(speed)
        waits = [
            min(1500, max(60, 1000 * (after["seconds"] - before["seconds"]))) / float(speed)
            for before, after in itertools.pairwise(frames)
        ]
        page.get_by_role("button", name="Play").click()
        assert page.get_by_role("button", name="Pause").is_visible()
        page.clock.run_for(int(sum(waits[:3]) + waits[3] / 2))
        assert number(page) == 3
        page.clock.run_for(int(sum(waits)) + 50 * len(waits))
        assert number(page) == len(frames) - 1
        assert page.get_by_role("button", name="Play").is_visible(), "it stops at the end"

    def test_keyboard(self, timed, replay):
        page = timed.page
        page.goto(replay[0].as_uri())
        page.keyboard.press(" ")
        assert page.get_by_role("button", name="Pause").is_visible()
        page.keyboard.press(" ")
        page.clock.run_for(20000)
        assert number(page) == 0, "paused"
        page.keyboard.press(" ")
        page.keyboard.press("ArrowRight")
        page.clock.run_for(20000)
        assert number(page) == 1, "stepping pauses"
        page.keyboard.press("Tab")
        assert page.locator(":focus").get_attribute("aria-label") == "Play"
        assert (
            page.locator(":focus").evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
        )
        page.keyboard.press(" ")
        assert page.get_by_role("button", name="Pause").is_visible(), "pressed once, not twice"
        page.keyboard.press("Tab")
        page.keyboard.press("End")
        assert number(page) == len(replay[1]) - 1

    def test_the_chart_leads_to_its_steps(self, watched, replay):
        page = watched.page
        page.goto(replay[0].as_uri())
        chart = page.get_by_role("img", name="Mean entropy over")
        box = chart.bounding_box()
        page.mouse.click(box["x"] + box["width"] - 1, box["y"] + 10)
        assert number(page) == len(replay[1]) - 1
        assert page.locator(".chart polyline").count() == 2, "one line a canvas"

    def test_text_stays_text(self, watched, nano_pair, tmp_path):
        path = tmp_path / "evil.html"
        header = {"model": EVIL, "prompt": EVIL, "options": {"regex": EVIL}}
        with Recorder(path, Tracer(nano_pair[1], (1, 5, 13)), header) as recorder:
            recorder.step(step(ids_of(nano_pair, EVIL)))
            recorder.finish(EVIL, "stop", thought=EVIL, tokens=3)
        page = watched.page
        page.goto(path.as_uri())
        assert positions(page) == EVIL
        for place in (".prompt", ".final", ".thought p"):
            assert page.locator(place).text_content() == EVIL
        assert page.evaluate("window.hacked") is None
        assert page.locator("img").count() == 0
        assert page.locator(".thought p").is_hidden(), "thoughts are folded"

    def test_what_a_killed_run_left(self, watched, replay, tmp_path):
        text = replay[0].read_text(encoding="utf-8")
        (tmp_path / "killed.html").write_text(
            text[: text.rindex('{"canvas"') + 50], encoding="utf-8"
        )
        page = watched.page
        page.goto((tmp_path / "killed.html").as_uri())
        assert page.get_by_role("slider").get_attribute("max") == str(len(replay[1]) - 2)
        assert "cut off" in page.locator("main").inner_text()

    def test_drafts_are_shown(self, watched, nano_pair, tmp_path):
        ids = ids_of(nano_pair, "fox moon")
        found = replace(step(ids), draft=mx.array([9, -1, *ids[2:]]))
        with Recorder(
            tmp_path / "draft.html", Tracer(nano_pair[1], (1, 5, 13)), {"prompt": "fox"}
        ) as recorder:
            recorder.step(found)
        page = watched.page
        page.goto((tmp_path / "draft.html").as_uri())
        assert page.locator(".positions .repaired").count() == 1
        assert page.locator(".positions .stands").count() == len(ids) - 2
        assert "draft repaired" in page.locator(".legend").inner_text()


def ask(page, text):
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def visit(watched, server):
    watched.page.goto(server if isinstance(server, str) else server.url)
    watched.page.locator("#model").wait_for()
    return watched.page


class TestChat:
    def test_an_answer_from_noise_to_replay(self, watched, stub, trace_lines, replay):
        frames = replay[1]
        seen, events = threading.Event(), recorded(trace_lines)

        def answer():
            yield from events[:8]
            assert seen.wait(30)
            yield from events[8:]

        stub.answers = [answer()]
        page = visit(watched, stub)
        ask(page, STORY)
        page.locator(".live .positions .token").first.wait_for()
        assert page.get_by_role("button", name="Stop").is_visible()
        assert "Mean entropy" in page.locator(".live .figures").inner_text()
        page.get_by_text(f"7 of {frames[6]['max_steps']}").wait_for()
        assert positions(page) == "".join(frames[6]["pieces"])
        seen.set()
        page.locator(".foot").wait_for()
        whole = "".join("".join(frame["pieces"]) for frame in frames if frame["reason"])
        assert page.locator(".model .text").inner_text() == whole
        assert page.locator("#announce").text_content() == whole
        assert page.locator(".live").count() == 0
        footer = records_of(replay[0])[-1]
        each = footer["tokens"] / footer["steps"]
        assert (
            page.locator(".foot")
            .inner_text()
            .startswith(
                f"{footer['tokens']} tokens · {footer['steps']} steps · {each:.1f} tokens a forward · "
            )
        )
        assert "tokens/s" in page.locator(".foot").inner_text()
        slider = page.get_by_role("slider", name="Step")
        assert slider.input_value() == str(len(frames)), "past the frames stands the answer"
        slider.fill("3")
        assert positions(page) == "".join(frames[3]["pieces"])
        assert page.locator(".model .text").is_hidden()
        slider.fill(str(len(frames)))
        assert page.locator(".model .text").is_visible()
        assert page.locator(".stage").is_hidden()
        assert all(url.startswith(stub.url) for url in watched.requests), watched.requests
        assert page.locator(".problem").count() == 0

    def test_the_request_settings_and_history(self, watched, stub):
        stub.pause = 0
        stub.answers = [
            [delta(content="first"), delta(finish_reason="stop"), "data: [DONE]\n\n"]
            for _ in range(3)
        ]
        page = visit(watched, stub)
        ask(page, "one")
        page.locator(".foot").wait_for()
        assert stub.asked[0][1] == {
            "model": "nano",
            "messages": [{"role": "user", "content": "one"}],
            "stream": True,
            "stream_options": {"include_usage": True, "include_drafts": True},
        }
        assert "Authorization" not in stub.asked[0][0]
        assert page.locator(".problem").count() == 0
        page.get_by_role("button", name="Settings").click()
        for name, value in (
            ("System prompt", "Be brief."),
            ("Temperature", "0.5"),
            ("Seed", "0"),
            ("Max tokens", "90"),
            ("API key, if the server wants one", "sesame"),
        ):
            page.get_by_label(name).fill(value)
        page.get_by_label("Let the model think before it answers").check()
        page.get_by_role("button", name="Done").click()
        page.get_by_label("Model", exact=True).select_option("other")
        ask(page, "two")
        page.locator(".foot").nth(1).wait_for()
        headers, body = stub.asked[1]
        assert headers["Authorization"] == "Bearer sesame"
        assert body["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": "two"},
        ]
        assert (
            body["model"],
            body["temperature"],
            body["seed"],
            body["max_tokens"],
            body["reasoning_effort"],
        ) == ("other", 0.5, 0, 90, "medium")
        page.get_by_role("button", name="New chat").click()
        assert page.locator(".turn").count() == 0
        page.get_by_role("button", name="Sort these numbers").click()
        page.locator(".foot").wait_for()
        assert [message["role"] for message in stub.asked[2][1]["messages"]] == ["system", "user"]
        page.reload()
        assert page.locator("[name=key]").input_value() == "sesame", "kept in this tab"

    def test_stop_ends_the_request_and_keeps_what_was_said(self, watched, stub):
        stub.pause = 0.05
        stub.answers = [
            [delta(content=f"{count} ") for count in range(400)],
            [delta(content="again"), delta(finish_reason="stop"), "data: [DONE]\n\n"],
        ]
        page = visit(watched, stub)
        ask(page, "count")
        page.get_by_text("0 1 2").wait_for()
        page.get_by_role("button", name="Stop").click()
        assert stub.aborted.wait(5), "the server notices"
        assert "stopped" in page.locator(".foot").inner_text()
        said = page.locator(".model .text").text_content()
        ask(page, "go on")
        page.get_by_text("again").wait_for()
        assert stub.asked[1][1]["messages"][1] == {"role": "assistant", "content": said}
        assert page.locator(".problem").count() == 0

    def test_a_new_chat_leaves_the_answer_of_the_old_one_behind(self, watched, stub):
        stub.pause = 0.05
        stub.answers = [
            [delta(content=f"{count} ") for count in range(400)],
            [delta(content="fresh"), delta(finish_reason="stop"), "data: [DONE]\n\n"],
        ]
        page = visit(watched, stub)
        ask(page, "count")
        page.get_by_text("0 1 2").wait_for()
        page.get_by_role("button", name="New chat").click()
        assert stub.aborted.wait(5)
        ask(page, "hello")
        page.get_by_text("fresh").wait_for()
        assert stub.asked[1][1]["messages"] == [{"role": "user", "content": "hello"}]
        page.locator(".foot").wait_for()
        assert page.locator(".turn").count() == 2
        assert page.locator("#announce").text_content() == "fresh"

    def test_refusals_are_shown_and_the_message_is_given_back(self, watched, stub):
        stub.answers = [
            (
                400,
                {
                    "message": "max_tokens 9,000 does not fit.",
                    "type": "invalid_request_error",
                    "param": "max_tokens",
                    "code": None,
                },
            ),
            (
                401,
                {
                    "message": "The key is missing.",
                    "type": "authentication_error",
                    "param": None,
                    "code": None,
                },
            ),
        ]
        page = visit(watched, stub)
        ask(page, "one")
        page.get_by_role("alert").wait_for()
        assert page.get_by_role("alert").inner_text() == "HTTP 400: max_tokens 9,000 does not fit."
        assert page.get_by_label("Message").input_value() == "one"
        page.keyboard.press("Enter")
        page.get_by_role("alert").nth(1).wait_for()
        assert "Settings" in page.get_by_role("alert").nth(1).inner_text()
        assert len(stub.asked[1][1]["messages"]) == 1, "a refused turn is no history"
        assert len(watched.complaints) == 2, "the browser's own lines of the two refusals"
        watched.complaints.clear()

    def test_an_error_a_malformed_event_and_a_cut_in_the_stream(self, watched, stub):
        stub.pause = 0
        stub.answers = [
            [
                delta(content="part "),
                chunk(error={"message": "The model returned NaN.", "type": "server_error"}),
            ],
            [
                ": a comment\n\n",
                delta(content="one "),
                "data: {not json\n\n",
                delta("stop", content="two"),
                "data: [DONE]\n\n",
            ],
            [delta(content="half")],
        ]
        page = visit(watched, stub)
        for count, (text, says) in enumerate(
            (
                ("part ", "The model returned NaN."),
                ("one two", "1 event of the stream"),
                ("half", "connection ended before"),
            )
        ):
            ask(page, "go")
            page.locator(".foot").nth(count).wait_for()
            assert page.locator(".model .text").nth(count).text_content() == text
            assert says in page.locator(".problem").nth(count).inner_text()

    def test_no_server(self, watched, stub):
        page = visit(watched, stub)
        stub.close()
        ask(page, "one")
        page.get_by_role("alert").wait_for()
        assert "does not answer" in page.get_by_role("alert").inner_text()
        watched.complaints.clear()

    def test_text_stays_text(self, watched, stub):
        stub.pause = 0
        frame = {
            "canvas": 0,
            "retry": 0,
            "step": 0,
            "max_steps": 8,
            "pieces": [EVIL],
            "entropy": [None],
            "accepted": "1",
            "mean_entropy": None,
            "reason": "converged",
            "certificate": EVIL,
            "seconds": 0.5,
        }
        call = {
            "index": 0,
            "id": "1",
            "type": "function",
            "function": {"name": EVIL, "arguments": EVIL},
        }
        stub.answers = [
            [
                chunk(choices=[], diffusion=frame),
                delta(reasoning_content=EVIL),
                delta(tool_calls=[call]),
                delta(content=EVIL),
                delta(finish_reason="stop"),
                "data: [DONE]\n\n",
            ],
            (500, {"message": EVIL}),
        ]
        page = visit(watched, stub)
        ask(page, EVIL)
        page.locator(".foot").wait_for()
        for place in (".model .text", ".user p", ".thought p"):
            assert page.locator(place).text_content() == EVIL
        assert page.locator(".call").text_content() == f"{EVIL}({EVIL})"
        assert not page.locator(".thought p").is_visible()
        page.get_by_role("slider").fill("0")
        assert positions(page) == EVIL
        ask(page, "again")
        page.get_by_role("alert").wait_for()
        assert EVIL in page.get_by_role("alert").text_content()
        assert page.evaluate("window.hacked") is None
        assert page.locator("img, .turn script").count() == 0
        assert len(watched.complaints) == 1
        watched.complaints.clear()

    def test_the_saved_trace_is_one(self, watched, stub, trace_lines, replay, tmp_path):
        stub.pause, stub.answers = 0, [recorded(trace_lines)]
        page = visit(watched, stub)
        ask(page, STORY)
        page.locator(".foot").wait_for()
        with page.expect_download() as download:
            page.get_by_role("button", name="Save trace").click()
        assert download.value.suggested_filename.endswith(".jsonl")
        shutil.copy(download.value.path(), tmp_path / "a.jsonl")
        header, *frames, footer = records_of(tmp_path / "a.jsonl")
        _, *expected, told = records_of(replay[0])
        assert frames == expected
        assert (header["format"], header["model"], header["prompt"], header["seed"]) == (
            FORMAT,
            "nano",
            STORY,
            None,
        )
        assert set(told) - {"text"} <= set(footer) | {"seed"}
        assert footer["tokens"] == told["tokens"]

    def test_a_phone_and_reduced_motion(self, watched, stub, trace_lines):
        stub.pause, stub.answers = 0, [recorded(trace_lines)]
        watched.page.set_viewport_size({"width": 360, "height": 640})
        watched.page.emulate_media(reduced_motion="reduce")
        page = visit(watched, stub)
        ask(page, STORY + " " + "x" * 200)
        page.locator(".foot").wait_for()
        page.get_by_role("slider").fill("3")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator("#log").evaluate("one => one.scrollWidth - one.clientWidth") <= 0
        assert (
            page.locator(".positions .token").first.evaluate(
                "one => getComputedStyle(one).transitionDuration"
            )
            == "0s"
        )


@pytest.fixture(scope="module")
def served():
    with serving("--max-batch", "2", "--api-key", "sesame") as (url, _):
        yield url


def settings(page, **values):
    page.get_by_role("button", name="Settings").click()
    for name, value in {"API key": "sesame", **values}.items():
        page.get_by_label(name).fill(value)
    page.get_by_role("button", name="Done").click()
    page.locator("#model").wait_for()


class TestServed:
    """Against a server that really runs."""

    @pytest.fixture
    def page(self, watched, served):
        watched.page.goto(served)
        watched.page.locator(".welcome .problem").wait_for()
        assert "key" in watched.page.locator(".welcome .problem").inner_text()
        watched.complaints.clear()  # of the 401
        return watched.page

    def test_an_answer_is_what_generate_writes_step_by_step(
        self, page, replay, watched, served, tmp_path
    ):
        settings(page, **{"Seed": "7", "Max tokens": "80"})
        ask(page, STORY)
        page.locator(".live .positions .token").first.wait_for()
        page.locator(".foot").wait_for()
        *_, told = records_of(replay[0])
        assert page.locator(".model .text").text_content() == told["text"]
        assert (
            f"{told['tokens']} tokens · {told['steps']} steps" in page.locator(".foot").inner_text()
        )
        with page.expect_download() as download:
            page.get_by_role("button", name="Save trace").click()
        shutil.copy(download.value.path(), tmp_path / "a.jsonl")
        header, *frames, footer = records_of(tmp_path / "a.jsonl")

        def apart_from_time(frame):
            return {name: value for name, value in frame.items() if name != "seconds"}

        assert [*map(apart_from_time, frames)] == [*map(apart_from_time, replay[1])]
        assert (header["seed"], footer["seed"], footer["text"]) == (7, 7, told["text"])
        slider = page.get_by_role("slider", name="Step")
        slider.fill("3")
        assert positions(page) == "".join(replay[1][3]["pieces"])
        assert all(url.startswith((served, "blob:")) for url in watched.requests), watched.requests

    def test_a_conversation_whose_seed_nobody_gave(self, page, tmp_path):
        settings(page, **{"Seed": "", "Max tokens": "30"})
        for count, text in enumerate(("Add 12 and 30.", "Sort these numbers: 42 17 91"), 1):
            ask(page, text)
            page.locator(f".turn.model:nth-of-type({2 * count}) .foot").wait_for()
        assert page.locator(".model .text").first.text_content() == "42"
        with page.expect_download() as download:
            page.get_by_role("button", name="Save trace").last.click()
        shutil.copy(download.value.path(), tmp_path / "a.jsonl")
        header, *_, footer = records_of(tmp_path / "a.jsonl")
        assert header["seed"] is None
        assert isinstance(footer["seed"], int), "the one the server chose"

    def test_stop_frees_the_row(self, page, served):
        settings(page)
        ask(page, STORY)
        page.locator(".live .positions .token").first.wait_for()
        page.get_by_role("button", name="Stop").click()
        assert "stopped" in page.locator(".foot").inner_text()
        until(lambda: httpx.get(f"{served}/health").json()["rows"] == 0)

    def test_what_the_server_warns_of_is_shown(self, page):
        settings(page, **{"Seed": "7", "Max tokens": "5"})
        page.route(
            "**/v1/chat/completions",
            lambda route: route.continue_(
                post_data={**route.request.post_data_json, "max_denoising_steps": 1}
            ),
        )
        ask(page, STORY)
        page.locator(".foot").wait_for()
        assert "did not converge" in page.locator(".warning").inner_text()
        assert "cut at the limit" in page.locator(".foot").inner_text()
