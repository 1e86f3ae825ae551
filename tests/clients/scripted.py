"""Runs ``mlx-diffgemma serve`` with one thing scripted: the built-in model was never taught to call
tools, so where a request leaves that open, a user is answered by a call and a tool by text.
Arguments and texts are the model's own.
"""

from mlx_diffgemma.cli import main
from mlx_diffgemma.serving.protocols.openai_chat import ChatRequest

chosen = ChatRequest.forced.fget


def forced(self):
    open_choice = self.tools and self.tool_choice in (None, "auto")
    return bool(self.messages[-1].role == "user") if open_choice else chosen(self)


ChatRequest.forced = property(forced)

if __name__ == "__main__":
    main()
