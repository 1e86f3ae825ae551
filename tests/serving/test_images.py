"""Pictures in requests: as data URLs, and as paths where these are allowed."""

import base64
import io

import openai
import pytest
from PIL import Image as pillow
from PIL import ImageDraw
from starlette.testclient import TestClient

from mlx_diffgemma import chat_ids, generate, load, nano, user_message
from mlx_diffgemma.serving.app import create_app
from mlx_diffgemma.serving.settings import LOCAL, Settings
from tests.helpers.engines import Refusing
from tests.serving.process import threaded

QUESTION = "What is in the picture?"


def drawn(colour, shape):
    picture = pillow.new("RGB", (200, 200), (245, 245, 245))
    getattr(ImageDraw.Draw(picture), shape)((35, 35, 165, 165), fill=colour)
    return picture


PICTURES = [drawn((214, 40, 40), "ellipse"), drawn((40, 80, 210), "rectangle")]


def data_url(picture, kind="png"):
    written = io.BytesIO()
    picture.save(written, kind)
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"


def part(url, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def asked(*urls, question=QUESTION):
    return [{"role": "user", "content": [*map(part, urls), {"type": "text", "text": question}]}]


@pytest.fixture(scope="module")
def pair():
    return load(nano.VISION)


@pytest.fixture(scope="module")
def sighted(pair):
    settings = Settings(nano.VISION, allow_files=True, allowed_hosts=LOCAL)
    with threaded(pair, settings) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture
def ask(sighted):
    def chat(messages, **options):
        own = {"model": nano.VISION, "messages": messages, "seed": 0, "max_tokens": 64}
        return sighted.chat.completions.create(**{**own, **options})

    return chat


@pytest.fixture(scope="module")
def expected(pair):
    model, tokenizer = pair

    def text(*pictures):
        prompt = chat_ids(tokenizer, [user_message(QUESTION, len(pictures))])
        return generate(model, tokenizer, prompt, images=pictures, seed=0, max_tokens=64)

    return text


def test_what_it_sees(ask):
    assert ask(asked(data_url(PICTURES[0]))).choices[0].message.content == "a red circle"


def test_several_are_seen_in_their_order_as_generate_sees_them(ask, expected):
    answers = [
        ask(asked(*map(data_url, own))).choices[0].message.content
        for own in (PICTURES, PICTURES[::-1])
    ]
    assert answers == [expected(*PICTURES), expected(*PICTURES[::-1])]
    assert answers[0] != answers[1]


def test_pictures_of_different_requests_stay_apart(ask):
    """The same prompt but for the picture: what was encoded for one must not serve the other."""
    first, second, again = (ask(asked(data_url(own))) for own in (*PICTURES, PICTURES[0]))
    assert first.choices[0].message.content == again.choices[0].message.content == "a red circle"
    assert second.choices[0].message.content == "a blue square"


def test_later_turns_see_it_too(ask):
    messages = asked(data_url(PICTURES[1]))
    said = ask(messages).choices[0].message.content
    more = [
        *messages,
        {"role": "assistant", "content": said},
        {"role": "user", "content": QUESTION},
    ]
    assert ask(more).choices[0].message.content == said


def test_choices_share_it(ask):
    response = ask(asked(data_url(PICTURES[0])), n=2, stream=False)
    assert [choice.message.content for choice in response.choices] == ["a red circle"] * 2


def test_soft_tokens_are_prompt_tokens(ask):
    counts = [
        ask(
            asked(data_url(PICTURES[0])),
            extra_body={"image_tokens": tokens, "max_denoising_steps": 1},
        ).usage.prompt_tokens
        for tokens in (70, 140)
    ]
    assert counts[1] - counts[0] == 11 * 11 - 8 * 8


def test_detail(pair):
    """By the prompt alone: nothing is read."""
    engine = Refusing(pair)
    client = TestClient(create_app(engine, Settings(nano.VISION)))

    def answered(*details, **options):
        content = [part(data_url(PICTURES[0]), detail=detail) for detail in details]
        body = {"model": nano.VISION, "messages": [{"role": "user", "content": content}]}
        return client.post("/v1/chat/completions", json={**body, **options})

    def count(*details, **options):
        assert answered(*details, **options).status_code == 503
        return len(engine.job.choices[0].request.ids)

    assert count("low") == count("auto", image_tokens=70) < 100
    assert 1000 < count("high") < 1200
    assert count("low", "low") > count("low")
    for details, more in (
        (("low", "high"), {}),
        (("auto", "low"), {}),
        (("low",), {"image_tokens": 280}),
        (("fine",), {}),
    ):
        refused = answered(*details, **more)
        assert refused.status_code == 400
        assert "detail" in refused.json()["error"]["message"]


def test_files_where_they_are_allowed(ask, tmp_path):
    PICTURES[0].save(tmp_path / "circle.png")
    assert ask(asked(str(tmp_path / "circle.png"))).choices[0].message.content == "a red circle"
    with pytest.raises(openai.BadRequestError, match="missing.png"):
        ask(asked(str(tmp_path / "missing.png")))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png;base64,AAAA", "image"),
        ("data:image/png;base64,%%%", "base64"),
        ("data:text/plain,hello", "image"),
        ("https://example.com/cat.png", "Remote images are not fetched"),
        ("data:image/png;base64,", "image"),
    ],
)
def test_what_is_none_is_refused(ask, url, said):
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        ask(asked(url))
    assert len(str(refused.value)) < 500


def test_decisions_see_it(sighted):
    body = {
        "model": nano.VISION,
        "messages": asked(data_url(PICTURES[0]), question=""),
        "questions": [{"question": QUESTION, "labels": ["a red circle", "a blue square"]}],
    }
    found = sighted.post("/decisions", body=body, cast_to=object)
    assert found["decisions"][0]["label"] == "a red circle"


def test_a_model_without_eyes_says_so(client):
    with pytest.raises(openai.BadRequestError, match="vision|image"):
        client.chat.completions.create(model="nano", messages=asked(data_url(PICTURES[0])))
