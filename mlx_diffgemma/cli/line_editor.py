"""The prompt of a conversation on a terminal: line editing, history and completion.

It is only imported when ``chat`` runs on a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from mlx_diffgemma.cli.output import errors

PROMPT = "> "
CONTINUED = "… "


class CommandCompleter(Completer):
    """Completes the names of commands, and the file of /image."""

    def __init__(self, commands: Mapping[str, str]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        if text.startswith("/image "):
            path = text.removeprefix("/image ")
            yield from self._paths.get_completions(Document(path, len(path)), complete_event)
        elif text.startswith("/") and " " not in text:
            for name, meaning in self._commands.items():
                if name.startswith(text):
                    yield Completion(name, start_position=-len(text), display_meta=meaning)


def key_bindings() -> KeyBindings:
    """Enter sends, Alt-Enter starts a new line; Ctrl-C clears the text, if there is any."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class LineEditor:
    """Reads messages and commands.

    The first Ctrl-C clears the text, or interrupts an answer.  The next Ctrl-C at an empty prompt
    ends the conversation, as Ctrl-D does.
    """

    def __init__(self, commands: Mapping[str, str], **streams: Any) -> None:
        self._warned = False
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation=lambda width, *_: CONTINUED.rjust(width),
            history=InMemoryHistory(),
            completer=CommandCompleter(commands),
            complete_while_typing=False,
            key_bindings=key_bindings(),
            **streams,
        )

    def interrupted(self) -> None:
        """Note that Ctrl-C has interrupted an answer.  The next one at an empty prompt ends the
        conversation.
        """
        self._warned = True

    def read(self) -> str | None:
        """The next message or command; None if the user ends the conversation."""
        while True:
            try:
                text = self._session.prompt(PROMPT)
            except EOFError:
                return None
            except KeyboardInterrupt:
                if self._warned and not self._session.default_buffer.text:
                    return None
                if not self._session.default_buffer.text:
                    errors.print("Ctrl-C again, or Ctrl-D, ends the conversation.", style="dim")
                self._warned = True
            else:
                self._warned = False
                return text
