"""`mlx-diffgemma chat`: talk to a model."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from typing import Annotated, Any

from mlx_diffgemma.cli.answer import CanvasInFlight, print_thought
from mlx_diffgemma.cli.hints import print_hint
from mlx_diffgemma.cli.live import LiveCanvas
from mlx_diffgemma.cli.options import CANVAS_TEMPERATURE, ModelOptions, PromptOptions, Think
from mlx_diffgemma.cli.output import errors, output, spinner, streaming
from mlx_diffgemma.cli.signature import command, generation
from mlx_diffgemma.cli.values import TEMPLATE_CONFIG, template_variables
from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.chat import Chat
from mlx_diffgemma.generation.load import load
from mlx_diffgemma.generation.option_groups import DENOISING, IMAGES, RULE, SAMPLING
from mlx_diffgemma.generation.options import GenerationOptions
from mlx_diffgemma.media.images import open_image
from mlx_diffgemma.media.prompt import check_vision, prepare_media
from mlx_diffgemma.text.variables import check_variables

OPTIONS = generation(
    groups=(SAMPLING, DENOISING, RULE, IMAGES),
    without=("mode",),
    help={
        "temperature": CANVAS_TEMPERATURE,
        "max_tokens": "Cut each answer after this many tokens. Default: until it ends, at most "
        "4,096 or the context.",
        "seed": "Seed of the first turn; it counts up by one a turn. Default: a fresh one.",
    },
)
COMMANDS = {
    "/help": "lists these commands",
    "/image": "FILE adds an image, file or URL, to what you say next",
    "/system": "TEXT sets the system message; without TEXT there is none",
    "/reset": "forgets the conversation",
    "/stats": "shows figures of the conversation",
    "/exit": "ends, as does Ctrl-D",
}
OTHER_NAMES = {"/quit": "/exit"}
KEYS = (
    "Enter sends, Alt-Enter starts a new line, and a pasted block stays one message. Ctrl-C clears "
    "the line or interrupts the answer; at an empty prompt, a second one ends."
)


@command
def chat(
    *,
    source: ModelOptions,
    surroundings: PromptOptions,
    think: Think = False,
    options: Annotated[dict[str, Any], OPTIONS],
) -> None:
    """Talk to a model; the canvas is shown while it resolves."""
    variables, thinks = template_variables(surroundings.chat_template_config)
    with spinner(f"loading {source.model}"):
        network, tokenizer = load(source.model, **source.loading)
    check_variables(tokenizer, variables, TEMPLATE_CONFIG)
    # Options that do not fit this checkpoint are refused now, not at each turn.
    GenerationOptions.from_keywords(options).policy(network)
    talk = Chat(
        network,
        tokenizer,
        surroundings.system_prompt,
        think or thinks,
        variables | {"allow_control_tokens": surroundings.allow_control_tokens},
        **options,
    )
    at_terminal = sys.stdin.isatty() and output.is_terminal
    knows_nano = (source.model, source.adapter_path)
    conversation = Conversation(talk, at_terminal, knows_nano)
    if at_terminal:
        from mlx_diffgemma.cli.line_editor import LineEditor

        errors.print("/help lists the commands, Ctrl-D ends.", style="dim")
        editor = LineEditor(COMMANDS)
        conversation.run(editor.read, editor.interrupted)
    else:
        conversation.run(_read_line)


def _read_line() -> str | None:
    try:
        return input()
    except (EOFError, KeyboardInterrupt):
        return None


class Conversation:
    """Reads messages and commands.  It answers a message and carries out a command."""

    def __init__(self, talk: Chat, at_terminal: bool, model: tuple[str, str | None]) -> None:
        self.talk = talk
        self.at_terminal = at_terminal
        self.model = model  # with its adapter
        self.images: list[Any] = []  # the images of the next message
        self.hinted = False

    def run(
        self,
        read: Callable[[], str | None],
        interrupted: Callable[[], None] = lambda: None,
    ) -> None:
        """Run until ``read`` returns None or the command is /exit.

        Args:
            read: returns the next message or command.
            interrupted: called when Ctrl-C has ended an answer.
        """
        while (line := read()) is not None:
            text = line.strip()
            if not text:
                continue
            name, _, rest = text.partition(" ")
            if not name.startswith("/"):
                if not self.say(text):
                    interrupted()
            elif OTHER_NAMES.get(name, name) == "/exit":
                return
            else:
                self.follow(name, rest.strip())

    def follow(self, name: str, rest: str) -> None:
        """Carry out the command ``name``, whose arguments are ``rest``."""
        if name == "/help":
            self.help()
        elif name == "/reset":
            self.talk.reset()
            self.images.clear()
        elif name == "/image":
            self.add_image(rest)
        elif name == "/system":
            self.talk.system = rest or None
            now = f"set to {rest!r}" if rest else "gone"
            errors.print(f"the system message is {now}", style="dim", markup=False)
        elif name == "/stats":
            errors.print(str(self.talk.stats), style="dim", markup=False)
        else:
            close = difflib.get_close_matches(name.lower(), [*COMMANDS, *OTHER_NAMES], n=1)
            meant = f"Did you mean {close[0]}? " if close else ""
            errors.print(
                f"error: There is no command {name}. {meant}/help lists all commands.",
                markup=False,
            )

    def help(self) -> None:
        """Print the commands, one a line."""
        for name, meaning in COMMANDS.items():
            errors.print(f"{name:8} {meaning}", style="dim", markup=False)
        if self.at_terminal:
            errors.print(KEYS, style="dim", markup=False)

    def add_image(self, name: str) -> None:
        """Add an image to the next message.  An invalid one is refused here, not at the turn."""
        try:
            self.images += _image_for(self.talk, name)
        except UserError as error:
            errors.print(f"error: {error}", markup=False)
        else:
            errors.print(f"{len(self.images)} image(s) come with what you say next", style="dim")

    def say(self, text: str) -> bool:
        """Take one turn.  Returns False if it was interrupted."""
        turns = self.talk.stats.turns
        images = self.images
        uninterrupted = _take_turn(self.talk, text, images, self.at_terminal)
        # If this turn left no trace in the history, its images stay for the next one.
        if self.talk.stats.turns > turns:
            self.images = []
        if not self.hinted and not images:
            self.hinted = print_hint(*self.model, text)
        return uninterrupted


def _image_for(talk: Chat, name: str) -> list[Any]:
    """The image of a file or URL, ready for the model.

    Raises:
        UserError: there is no such image, or the model cannot see images.
    """
    check_vision(talk.model.config)
    if not name:
        raise UserError("No file was named; give one, as /image cat.png.")
    return [
        *prepare_media(
            [open_image(name, allow_urls=True)], talk.model.config, talk.options.get("image_tokens")
        )
    ]


class _Screen:
    """Shows the canvas on the terminal while an answer is written, and keeps its last text."""

    def __init__(self, talk: Chat) -> None:
        self._talk = talk
        self._eos_ids = talk.model.config.generation.eos_token_ids
        self._live: LiveCanvas | None = None
        self.flight = CanvasInFlight(talk.tokenizer, self._eos_ids)

    def show(self, step: CanvasStep) -> None:
        if self._live is None:
            self._live = LiveCanvas(self._talk.tokenizer, self._eos_ids, output)
            self._live.__enter__()
        self._live.show(step)
        self.flight.step(step)

    def hide(self) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None


def _take_turn(talk: Chat, text: str, images: list[Any], at_terminal: bool) -> bool:
    """Take one turn.  Ctrl-C ends the answer, not the conversation.

    Args:
        talk: the conversation.
        text: the message.
        images: its images.
        at_terminal: whether the canvas is shown.

    Returns:
        False if Ctrl-C ended the answer.
    """
    screen = _Screen(talk)
    responses = talk.send(text, screen.show if at_terminal else None, images)
    with streaming():
        try:
            for response in responses:
                screen.hide()
                print_thought(response.thought)
                print(response.text, end="", flush=True)
                for call in response.tool_calls:
                    errors.print(f"tool call: {call}", style="dim", markup=False)
            print(flush=True)
        except KeyboardInterrupt:
            screen.hide()
            print(flush=True)
            screen.flight.report()
            errors.print("interrupted", style="dim")
            return False
        except UserError as error:
            screen.hide()
            errors.print(f"error: {error} (/reset forgets the conversation)", markup=False)
        finally:
            screen.hide()
            responses.close()
    return True
