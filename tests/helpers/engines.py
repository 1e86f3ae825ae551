"""Stand-ins for the server's engine."""

from mlx_diffgemma.decoding.job import ClosedError
from mlx_diffgemma.serving.engine import Engine


class Refusing(Engine):
    """Takes no job, and notes the last one; it is not started."""

    def __init__(self, pair):
        super().__init__(lambda: pair)
        self.model, self.tokenizer = pair

    def check_queue(self, more, client="", own=0):
        pass

    def submit(self, job, again=False):
        self.job = job
        raise ClosedError("The server is shutting down.")
