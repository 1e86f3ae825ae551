"""From the messages of a request to those that a chat template takes."""

import base64
import io

import PIL.Image
import pytest
from pydantic import TypeAdapter

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.serving.conversation import template_messages
from mlx_diffgemma.serving.protocols.messages import Message

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"n": 3}'}}
ASKED = {"role": "user", "content": "Look."}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def made(*messages, **options):
    return template_messages(TypeAdapter(list[Message]).validate_python(messages), **options)


def test_a_developer_is_the_system():
    (message,), _ = made({"role": "developer", "content": "Be brief."})
    assert message == {"role": "system", "content": "Be brief."}


def test_a_tool_s_answer_has_the_name_of_what_was_called():
    messages, _ = made(ASKED, CALLED, {"role": "tool", "tool_call_id": "c1", "content": "4"})
    assert messages[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"n": 3}}
    assert messages[2]["name"] == "look"
    assert messages[2]["tool_call_id"] == "c1"


def test_a_tool_s_answer_to_no_call_is_refused():
    with pytest.raises(UserError, match="messages.1: no call before it has the id 'c1'"):
        made(ASKED, {"role": "tool", "tool_call_id": "c1", "content": "4"})


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_of_an_answer_are_kept(field):
    messages, _ = made(ASKED, {"role": "assistant", "content": "4", field: "2 and 2."})
    assert messages[1]["reasoning_content"] == "2 and 2."


class TestImages:
    def part(self, url):
        return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}

    def test_stand_as_markers_in_their_order(self):
        kept = io.BytesIO()
        PIL.Image.new("RGB", (8, 6)).save(kept, "PNG")
        url = "data:image/png;base64," + base64.b64encode(kept.getvalue()).decode()
        (message,), images = made(self.part(url))
        assert message["content"] == [{"type": "image"}]
        assert len(images) == 1

    def test_of_this_machine_s_disk_are_opened_only_where_allowed(self, tmp_path):
        path = tmp_path / "a.png"
        PIL.Image.new("RGB", (8, 6)).save(path)
        with pytest.raises(UserError):
            made(self.part(path.as_uri()))
        _, images = made(self.part(path.as_uri()), allow_files=True)
        assert len(images) == 1
