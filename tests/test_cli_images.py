"""Images on the command line: files, URLs, videos, and every mistake in one line."""

import json
import re
import shutil

import pytest
from PIL import Image as pillow
from PIL import ImageDraw

from mlx_diffgemma import chat_ids, generate, load, nano, user_message
from mlx_diffgemma.evaluation.tasks import tasks_of_file
from mlx_diffgemma.media.video import Video
from tests.helpers.in_process import run
from tests.helpers.video import write_video

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A red circle, a blue square, a video, and what is none of these."""
    folder = tmp_path_factory.mktemp("media")
    for name, colour, shape in (
        ("circle.png", (214, 40, 40), "ellipse"),
        ("square.jpg", (40, 80, 210), "rectangle"),
    ):
        picture = pillow.new("RGB", (200, 200), (245, 245, 245))
        getattr(ImageDraw.Draw(picture), shape)((35, 35, 165, 165), fill=colour)
        picture.save(folder / name)
    (folder / "text.png").write_text("no image")
    (folder / "half.png").write_bytes((folder / "circle.png").read_bytes()[:80])
    write_video(folder / "clip.mp4", 2, size=(128, 128))
    return folder


def ask(monkeypatch, capsys, *arguments, model=nano.VISION):
    return run(
        monkeypatch,
        capsys,
        "generate",
        "--model",
        model,
        "--seed",
        "0",
        "--max-tokens",
        "64",
        "-p",
        QUESTION,
        *arguments,
    )


def expected(*media):
    model, tokenizer = load(nano.VISION)
    prompt = chat_ids(tokenizer, [user_message(QUESTION, len(media))])
    return generate(model, tokenizer, prompt, images=media, seed=0, max_tokens=64)


class TestGenerate:
    def test_what_it_sees(self, monkeypatch, capsys, folder):
        code, out, err = ask(monkeypatch, capsys, "--image", str(folder / "circle.png"))
        assert (code, out.strip(), err) == (0, "a red circle", "")

    def test_addresses_of_files(self, monkeypatch, capsys, folder):
        (folder / "a b").mkdir()
        shutil.copy(folder / "circle.png", folder / "a b" / "circle ä.png")
        name = (folder / "a b" / "circle ä.png").as_uri()
        assert "%20" in name
        for address in (name, name.replace("file:", "FILE:"), name.replace("//", "//localhost")):
            code, out, err = ask(monkeypatch, capsys, "--image", address)
            assert (code, out.strip(), err) == (0, "a red circle", "")

    def test_several(self, monkeypatch, capsys, folder):
        images = folder / "square.jpg", folder / "circle.png"
        _, out, _ = ask(
            monkeypatch,
            capsys,
            "--image",
            str(images[0]),
            "--image",
            str(images[1]),
            "--video",
            str(folder / "clip.mp4"),
        )
        assert out.rstrip("\n") == expected(*images, Video(folder / "clip.mp4"))

    def test_figures_count_the_soft_tokens(self, monkeypatch, capsys, folder):
        counts = []
        for tokens in ("70", "140"):
            _, out, _ = ask(
                monkeypatch,
                capsys,
                "--image",
                str(folder / "circle.png"),
                "--image-tokens",
                tokens,
                "--json",
                "--max-denoising-steps",
                "1",
            )
            counts.append(json.loads(out.splitlines()[-1])["prompt_tokens"])
        assert counts[1] - counts[0] == 11 * 11 - 8 * 8

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--image", "text.png"], "text.png is not an image"),
            (["--image", "half.png"], "half.png is damaged or cut off"),
            (["--image", "nothing.png"], "There is no image nothing.png"),
            (["--image", "clip.mp4"], "clip.mp4 is not an image"),
            (["--video", "nothing.mp4"], "There is no video nothing.mp4"),
            (["--video", "text.png"], "cannot be read as a video"),
            (["--image", "circle.png", "--image-tokens", "100"], "560 or 1120, got 100"),
            (["--video", "clip.mp4", "--fps", "0"], "at most 120 frames a second, not 0"),
            (
                ["--image", "circle.png", "--ignore-chat-template"],
                "0 image marker(s) and 1 image(s)",
            ),
            (["--image-tokens", "70"], "--image-tokens has no meaning without --image or --video"),
            (["--image", "circle.png", "--fps", "1"], "--fps has no meaning without --video"),
            (["--image", "http://127.0.0.1:9/a.png"], "cannot be fetched"),
            (["--image", "http://[::1/a"], "cannot be fetched"),
            (["--image", "."], ". is a folder; give a regular file"),
            (["--image", "file:///no%20where.png"], "There is no image file:///no%20where.png"),
            (["--image", "~nosuchuser/a.png"], "is not the path"),
            (["--image", "data:image/png;base64,ü"], "data URL is not of the form"),
            (["--video", "."], ". is a folder"),
            (["--video", "http://127.0.0.1:9/a.mp4"], "URLs of videos are not fetched here"),
        ],
        ids=lambda value: " ".join(value[-1:]),
    )
    def test_a_mistake_is_one_line(self, monkeypatch, capsys, folder, arguments, message):
        monkeypatch.chdir(folder)
        code, out, err = ask(monkeypatch, capsys, *arguments)
        assert (code, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert message in line

    def test_a_model_without_eyes(self, monkeypatch, capsys, folder):
        code, out, err = ask(
            monkeypatch, capsys, "--image", str(folder / "circle.png"), model="nano"
        )
        assert (code, out) == (2, "")
        assert err.startswith("error: This checkpoint has no vision weights")


class TestChat:
    def test_an_image_comes_with_what_is_said_next(self, monkeypatch, capsys, folder):
        lines = (
            f"/image {folder / 'circle.png'}\n{QUESTION}\n/image {folder / 'text.png'}\n/image {folder}\n/image a\0b.png\n"
            f"/image http://[::1/a\n{QUESTION}\n"
        )
        code, out, err = run(
            monkeypatch, capsys, "chat", "--model", nano.VISION, "--seed", "0", stdin=lines
        )
        assert code == 0
        assert out.splitlines()[0] == "a red circle"
        assert "1 image(s) come with what you say next" in err
        assert "error: text.png is not an image" in err
        assert f"error: {folder} is a folder" in err.replace("\n", " ")
        assert err.count("error: ") == 4

    def test_a_model_without_eyes_refuses_at_once(self, monkeypatch, capsys, folder):
        code, out, err = run(
            monkeypatch,
            capsys,
            "chat",
            "--seed",
            "0",
            stdin=f"/image {folder / 'circle.png'}\nAdd 12 and 30.\n",
        )
        assert (code, out) == (0, "42\n")
        assert err.startswith("error: This checkpoint has no vision weights")

    def test_without_a_file(self, monkeypatch, capsys):
        _, _, err = run(monkeypatch, capsys, "chat", "--model", nano.VISION, stdin="/image\n")
        assert err.startswith("error: No file was named; give one")

    def test_image_tokens(self, monkeypatch, capsys, folder):
        lines, counts = f"/image {folder / 'circle.png'}\n{QUESTION}\n/stats\n", []
        for tokens in ("70", "140"):
            _, _, err = run(
                monkeypatch,
                capsys,
                "chat",
                "--model",
                nano.VISION,
                "--seed",
                "0",
                "--image-tokens",
                tokens,
                "-m",
                "8",
                "--max-denoising-steps",
                "1",
                stdin=lines,
            )
            counts.append(int(re.search(r"(\d+) encoded", err)[1]))
        assert counts[1] - counts[0] == 11 * 11 - 8 * 8

    def test_images_wait_for_a_turn_that_stands(self, monkeypatch, capsys, folder):
        lines = f"/image {folder / 'circle.png'}\n{'word ' * 9000}\n{QUESTION}\n"
        _, out, err = run(
            monkeypatch, capsys, "chat", "--model", nano.VISION, "--seed", "0", stdin=lines
        )
        assert "leaves no room" in err
        assert out == "a red circle\n"


def test_questions_of_a_file(monkeypatch, capsys, folder, tmp_path):
    entries = [
        {"prompt": QUESTION, "images": ["circle.png"], "completion": "a red circle"},
        {
            "prompt": "Which shape is it?",
            "images": ["circle.png"],
            "choices": ["square", "circle"],
            "answer": "circle",
        },
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    code, out, _ = run(
        monkeypatch,
        capsys,
        "evaluate",
        "--model",
        nano.VISION,
        "--data",
        str(folder / "questions.jsonl"),
        "--json",
    )
    assert code == 0
    assert [result["score"] for result in json.loads(out.splitlines()[-1])["results"]] == [1.0, 1.0]
    tool = {
        "messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
        "completion": "c",
    }
    (folder / "tool.jsonl").write_text(json.dumps(tool | {"images": ["circle.png"]}))
    with pytest.raises(
        ValueError, match="line 1: 'images' belong to .*, and the last message is of role 'tool'"
    ):
        tasks_of_file(folder / "tool.jsonl")
    for images, message in (
        (["gone.png"], "line 1: there is no image"),
        ("circle.png", "'images' must be a list"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(entries[0] | {"images": images}))
        with pytest.raises(ValueError, match=message):
            tasks_of_file(tmp_path / "bad.jsonl")
