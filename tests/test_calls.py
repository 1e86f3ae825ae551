"""Calls of tools in Gemma's own syntax and in JSON: what is read, and what the constraint admits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import calls
from mlx_diffgemma.grammar.automaton import compile_language
from mlx_diffgemma.grammar.tokens import Vocabulary
from mlx_diffgemma.text.calls import QUOTE, read_calls
from mlx_diffgemma.text.parser import ResponseParser
from tests.helpers.templates import NANO, TOKENIZERS, user
from tests.helpers.templates import call as called

Q = QUOTE


def read(text):
    """The calls in ``text``, where <|"|> stands for the token."""
    return read_calls(text.split(Q))


def admits(parameters, text):
    """Whether the constraint of ``parameters`` admits the arguments ``text``, where <|"|> stands
    for the token.
    """
    automaton = compile_language(calls.parse(parameters))
    return automaton.accepts(b"\xff".join(part.encode() for part in text.split(Q)))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(
        lambda text: Q not in text
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"\A[a-z_]{1,5}\Z"), inner, max_size=3)
    ),
    max_leaves=6,
)


class TestReading:
    @pytest.mark.parametrize(
        ("text", "arguments"),
        [
            ("call:f{}", {}),
            (f"call:f{{a:{Q}x{Q}}}", {"a": "x"}),
            (f"call:f{{a:{Q}{Q}}}", {"a": ""}),
            (f"call:f{{a:{Q}x}}y,{{b:1{Q},b:-1.5e3}}", {"a": "x}y,{b:1", "b": -1500.0}),
            ("call:f{a:true,b:false,c:null}", {"a": True, "b": False, "c": None}),
            (f"call:f{{a:[1,{Q}x{Q},{{b:[]}}]}}", {"a": [1, "x", {"b": []}]}),
            ("call:f{first name:1,x-y.z:2}", {"first name": 1, "x-y.z": 2}),
            (f"call:f{{{Q}a:b{Q}:1}}", {"a:b": 1}),
            (
                'call:f{"a": "}", "b": [1, 2], "c": {"d": null}}',
                {"a": "}", "b": [1, 2], "c": {"d": None}},
            ),
            ('call:f{"a": "\\u00e9\\"\\ud83d\\ude00"}', {"a": 'é"😀'}),
            (f"call: f {{ a : {Q} x {Q} }}", {"a": " x "}),
            (f"call:f{{a:{Q}\n\\n{Q}}}", {"a": "\n\\n"}),
        ],
    )
    def test_arguments(self, text, arguments):
        assert read(text) == [{"name": "f", "arguments": arguments}]

    def test_several(self):
        assert [call["name"] for call in read("call:f{} call:g{a:1}")] == ["f", "g"]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "f{}",
            "call:f",
            "call:f{",
            "call:f{a}",
            "call:f{a:}",
            "call:f{a:1,}",
            "call:f{a:1",
            "call:f{}x",
            f"call:f{{a:{Q}x}}",
            "call:f{a:01x}",
            "call:f{a:nan}",
            'call:f{"a": "\\ud800"}',
            "call:f{a:" + "[" * 99 + "]" * 99 + "}",
            "call:f{a:" + "9" * 5000 + "}",
            'call:f{"a": "x}',
            "call:{}",
            "call:f{:1}",
        ],
    )
    def test_what_is_no_call(self, text):
        with pytest.raises(ValueError, match=r"."):
            read(text)

    def test_the_token_is_told_from_its_text(self):
        """A text that looks like the token ends no text."""
        vocabulary = NANO.get_vocab()
        literal = [
            token for character in Q for token in NANO.encode(character, add_special_tokens=False)
        ]
        ids = [
            vocabulary["<|tool_call>"],
            *NANO.encode("call:f{a:", add_special_tokens=False),
            vocabulary[Q],
            *literal,
            vocabulary[Q],
            *NANO.encode("}", add_special_tokens=False),
            vocabulary["<tool_call|>"],
        ]
        assert ResponseParser(NANO).feed(ids).tool_calls == ({"name": "f", "arguments": {"a": Q}},)

    @settings(max_examples=60, deadline=None)
    @given(st.dictionaries(st.from_regex(r"\A[a-z_]{1,5}\Z"), VALUES, max_size=4))
    def test_what_the_history_writes_is_read_back(self, arguments):
        for name in ("nano", "json"):
            parser = ResponseParser(NANO)
            text = TOKENIZERS[name].apply_chat_template(
                [user("a"), called(arguments)], tokenize=False
            )
            begin, end = (
                text.index("<|tool_call>"),
                text.index("<tool_call|>") + len("<tool_call|>"),
            )
            delta = parser.feed(NANO.encode(text[begin:end], add_special_tokens=False))
            assert [call["arguments"] for call in delta.tool_calls] == [arguments], parser.malformed


CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "Days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city"],
    "additionalProperties": False,
}


class TestConstraint:
    @pytest.mark.parametrize(
        ("parameters", "text", "fits"),
        [
            (CITY, f"{{city:{Q}Rome{Q}}}", True),
            (CITY, f"{{city:{Q}Rome{Q},Days:3}}", True),
            (CITY, f"{{Days:3,city:{Q}Rome{Q}}}", False),
            (CITY, '{"city": "Rome"}', False),
            (CITY, "{city:Rome}", False),
            (CITY, f"{{city: {Q}Rome{Q}}}", False),
            (CITY, "{}", False),
            (CITY, f"{{city:{Q}Lisbon{Q}}}", False),
            (CITY, f"{{city:{Q}a\n}}{Q}}}", True),
            (CITY, f'{{city:{Q}<|"|{Q}}}', True),
            ({"type": "object"}, f"{{a:1,b:{Q}x{Q},c:[true,{{d:null}}]}}", True),
            ({"type": "object"}, "{}", True),
            ({"type": "object"}, '{"a":1}', False),
            (
                {"type": "object", "properties": {"a": {"enum": ["x", 1, None, [1, {"b": "y"}]]}}},
                f"{{a:{Q}x{Q}}}",
                True,
            ),
            (
                {"type": "object", "properties": {"a": {"enum": ["x", 1, None, [1, {"b": "y"}]]}}},
                f"{{a:[1,{{b:{Q}y{Q}}}]}}",
                True,
            ),
            (
                {"type": "object", "properties": {"a": {"enum": ["xx", "y"], "maxLength": 1}}},
                f"{{a:{Q}xx{Q}}}",
                False,
            ),
            (
                {"type": "object", "properties": {"a": {"enum": ["xx", "y"], "maxLength": 1}}},
                f"{{a:{Q}y{Q}}}",
                True,
            ),
            (
                {"type": "object", "properties": {"a": {"const": 5}}, "required": ["a"]},
                "{a:5}",
                True,
            ),
            (
                {
                    "type": "object",
                    "properties": {"a": {"type": "string", "pattern": "^[0-9]{2}$"}},
                },
                f"{{a:{Q}12{Q}}}",
                True,
            ),
            (
                {"type": "object", "properties": {"a": {"type": "string", "format": "date"}}},
                f"{{a:{Q}2026-11-29{Q}}}",
                True,
            ),
            (
                {
                    "type": "object",
                    "properties": {
                        "a": {"type": "array", "items": {"type": "integer"}, "minItems": 2}
                    },
                },
                "{a:[1,2,3]}",
                True,
            ),
            (
                {
                    "type": "object",
                    "properties": {
                        "a": {"type": "array", "items": {"type": "integer"}, "minItems": 2}
                    },
                },
                "{a:[1, 2]}",
                False,
            ),
            (
                {"type": "object", "properties": {"a:b": {"type": "boolean"}}},
                f"{{{Q}a:b{Q}:true}}",
                True,
            ),
            (
                {
                    "type": "object",
                    "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
                },
                "{a:null}",
                True,
            ),
            (
                {
                    "type": "object",
                    "$defs": {"x": {"type": "string"}},
                    "properties": {"a": {"$ref": "#/$defs/x"}},
                },
                f"{{a:{Q}b{Q}}}",
                True,
            ),
            (
                {"type": "object", "required": ["b"], "properties": {"a": True}},
                f"{{a:1,b:{Q}x{Q}}}",
                True,
            ),
        ],
    )
    def test_admitted(self, parameters, text, fits):
        assert admits(parameters, text) is fits

    @pytest.mark.parametrize(
        "parameters",
        [
            {
                "type": "object",
                "properties": {"a": {"type": "string", "pattern": "a", "maxLength": 3}},
            },
            {"type": "object", "properties": {"a": {"not": {}}}},
            {"type": "strange"},
        ],
    )
    def test_what_json_refuses_is_refused(self, parameters):
        with pytest.raises(UserError):
            calls.parse(parameters)

    def test_only_the_token_itself_stands_for_it(self):
        texts = Vocabulary(NANO, 1024).texts
        assert [token for token, content in texts.items() if b"\xff" in content] == [
            NANO.get_vocab()[Q]
        ]


class TestMembers:
    def of(self, *names, required=()):
        return {
            "type": "object",
            "properties": {name: {"type": "integer"} for name in names},
            "required": list(required),
            "additionalProperties": False,
        }

    def test_arguments_are_in_the_order_of_their_names(self):
        """As the published template writes them: whatever the schema's order, and case."""
        parameters = self.of("c", "B", "a", required=("a", "B", "c"))
        assert admits(parameters, "{a:1,B:2,c:3}")
        assert not admits(parameters, "{c:3,B:2,a:1}")
        assert not admits(parameters, "{B:2,a:1,c:3}")

    def test_a_required_argument_may_not_lack(self):
        parameters = self.of("a", "b", "c", required=("b",))
        assert admits(parameters, "{b:1}")
        assert admits(parameters, "{a:1,b:2,c:3}")
        for text in ("{}", "{a:1}", "{c:3}", "{a:1,c:3}"):
            assert not admits(parameters, text)
