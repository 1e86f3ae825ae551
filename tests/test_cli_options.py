"""Options are written once: in GenerationOptions, from which every front end takes its own."""

import inspect
import typing

import pydantic
import pytest

from mlx_diffgemma.cli.app import COMMANDS, load_command
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.option_fields import request_fields
from mlx_diffgemma.generation.option_groups import MOST
from mlx_diffgemma.generation.options import COUNTS, DESCRIBED, GenerationOptions
from mlx_diffgemma.serving.protocols.fields import Number, Whole
from mlx_diffgemma.serving.protocols.openai_chat import ChatRequest

BODY = pydantic.create_model(
    "Body",
    **{
        name: (kind, pydantic.Field(None, **limits))
        for name, (kind, limits) in request_fields(GenerationOptions).items()
    },
)
OVERLAP = sorted(set(BODY.model_fields) & set(ChatRequest.model_fields))


def commands():
    """(name, command) of every command, those of groups too."""
    for name in COMMANDS:
        command = load_command(name)
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
        else:
            yield from ((f"{name} {part}", own) for part, own in inner.items())


def options():
    """(command, option) of every option."""
    return [
        pytest.param(own, id=f"{name} {own.opts[0]}")
        for name, command in commands()
        for own in command.params
        if own.param_type_name == "option"
    ]


def plain(kind):
    """A type without None and without what pydantic annotates."""
    if typing.get_origin(kind) is typing.Annotated:
        return plain(typing.get_args(kind)[0])
    parts = [plain(part) for part in typing.get_args(kind) if part is not type(None)]
    origin = typing.get_origin(kind)
    if origin in (list, dict):
        return (origin, *parts)
    return frozenset(parts) if len(parts) > 1 else parts[0] if parts else kind


def test_every_field_is_described():
    assert DESCRIBED.keys() == GenerationOptions.__dataclass_fields__.keys()
    assert {name for name, own in DESCRIBED.items() if own.high == MOST} == set(COUNTS)


@pytest.mark.parametrize("option", options())
def test_every_help_text_stands_alone(option):
    text = option.help or ""
    first = text.split()[0]
    assert first[0].isupper() or first[0] in "'-0123456789" or first.startswith("`"), text
    assert first not in ("Of", "As", "It", "And", "Or", "Default:"), text
    assert text.rstrip().endswith((".", "…")), text
    assert not text.startswith("-1"), text


class TestRequestFields:
    def test_many_overlap_with_the_servers(self):
        assert len(OVERLAP) > 25
        assert {"temperature", "canvas_length", "logit_bias", "choices"} <= set(OVERLAP)

    @pytest.mark.parametrize("name", OVERLAP)
    def test_types_are_the_servers(self, name):
        ours, theirs = BODY.model_fields[name], ChatRequest.model_fields[name]
        assert plain(ours.annotation) == plain(theirs.annotation)
        assert ours.default is theirs.default is None
        assert ours.description

    def test_types_are_replaced(self):
        fields = request_fields(GenerationOptions, {int: Whole, float: Number})
        assert fields["top_k"][0] == Whole | None
        assert fields["top_p"][0] == Number | None
        assert fields["canvas_length"][0] == Whole | str | None

    def test_other_options_are_named_as_fields(self):
        text = request_fields(GenerationOptions)["temperature_steps"][1]["description"]
        assert "over max_denoising_steps" in text
        assert all(
            "{" not in limits["description"]
            for _, limits in request_fields(GenerationOptions).values()
        )

    @pytest.mark.parametrize("name", [n for n, own in DESCRIBED.items() if own.high is not None])
    def test_what_is_above_a_range_is_refused_by_both(self, name):
        self.refused(name, DESCRIBED[name].high * 1.01 + 1)

    @pytest.mark.parametrize("name", [n for n, own in DESCRIBED.items() if own.low is not None])
    def test_what_is_below_a_range_is_refused_by_both(self, name):
        self.refused(name, DESCRIBED[name].low - 1)

    @pytest.mark.parametrize("name", [n for n, own in DESCRIBED.items() if own.above is not None])
    def test_an_open_bound_is_refused_by_both(self, name):
        self.refused(name, DESCRIBED[name].above)

    def refused(self, name, value):
        hint = typing.get_type_hints(GenerationOptions)[name]
        if int in (hint, *typing.get_args(hint)):
            value = int(value)
        more = {"diffusion_sampler": "confidence-threshold"} if name == "threshold" else {}
        with pytest.raises(UserError):
            GenerationOptions(**{name: value, **more})
        with pytest.raises(pydantic.ValidationError):
            BODY(**{name: value})
        assert not DESCRIBED[name].holds(value)

    @pytest.mark.parametrize("bound", ["low", "high"])
    @pytest.mark.parametrize("name", [n for n, own in DESCRIBED.items() if n != "t_max"])
    def test_a_bound_itself_is_taken_by_both(self, name, bound):
        value = getattr(DESCRIBED[name], bound)
        if value is None:
            return
        more = {"diffusion_sampler": "confidence-threshold"} if name == "threshold" else {}
        GenerationOptions(**{name: value, **more})
        BODY(**{name: value})


def test_commands_have_few_parameters_of_their_own():
    """What they share is in parts."""
    for name in COMMANDS:
        command = load_command(name)
        for own in getattr(command, "commands", {"": command}).values():
            function = inspect.unwrap(own.callback)
            assert len(inspect.signature(function, follow_wrapped=True).parameters) <= 15, name
