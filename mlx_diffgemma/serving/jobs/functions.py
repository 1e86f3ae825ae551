"""The functions that an answer may call: checks calls, and asks again for those that are broken."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.decoding.constraints import Demands, Stretch
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.limits import token_limit
from mlx_diffgemma.generation.request import Request
from mlx_diffgemma.grammar.budget import TooLongError
from mlx_diffgemma.grammar.checker import Checker, TooMuchWorkError
from mlx_diffgemma.grammar.constraint import compile_named
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.text.calls import TOOL_END, TOOL_START
from mlx_diffgemma.text.parser import ResponseParser
from mlx_diffgemma.text.tokenizer import calls_as_json

CALL = "call:"  # precedes the name of a function
# The parameters of a function that declares none.
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class Functions:
    """The functions that may be called, with the JSON schema of each one's parameters.

    Raises:
        UserError: the parameters of a function are not the schema of an object.
    """

    def __init__(self, parameters: Mapping[str, Mapping[str, Any] | None]) -> None:
        self.parameters = {
            name: dict(schema or NO_PARAMETERS) for name, schema in parameters.items()
        }
        for name, schema in self.parameters.items():
            schema.setdefault("type", "object")
            if schema["type"] != "object":
                raise UserError(
                    f"The parameters of the function {name!r} are the schema of an object, not of "
                    f"{schema['type']!r}."
                )
        self._checkers = {
            name: self._checker(name, schema) for name, schema in self.parameters.items()
        }

    @staticmethod
    def _checker(name: str, schema: Mapping[str, Any]) -> Checker:
        try:
            return Checker(schema)
        except TooLongError:
            raise
        except UserError as error:
            raise UserError(
                f"The parameters of the function {name!r} cannot be used: {error}"
            ) from None
        except RecursionError:
            raise UserError(
                f"The parameters of the function {name!r} are nested too deeply; write them with "
                "fewer levels."
            ) from None

    def fits(self, call: Mapping[str, Any]) -> bool:
        """Whether {name, arguments} calls one of the functions with valid arguments.

        The check takes a bounded number of steps.
        """
        checker = self._checkers.get(str(call.get("name")))
        if checker is None or not isinstance(call.get("arguments"), dict):
            return False
        try:
            return checker.fits(call["arguments"])
        except TooMuchWorkError:
            # The call is made again under the schema, which then holds by construction.
            return False

    def request(
        self, model: DiffusionGemma, tokenizer: TokenizerWrapper, asked: Request
    ) -> Request:
        """Turn ``asked`` into a request whose answer is one call of these functions.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            asked: the request without a constraint.

        Raises:
            UserError: the parameters of a function cannot be guaranteed.
        """
        begin, _ = self.markers(tokenizer)
        return self._request(model, tokenizer, asked, [begin], list(self.parameters))

    def broken(self, tokens: Sequence[int], tokenizer: TokenizerWrapper) -> list[int]:
        """Find the calls in an answer that cannot be parsed or have invalid arguments.

        Returns:
            For each broken call, the index in ``tokens`` at which its text begins.
        """
        parser = ResponseParser(tokenizer)
        starts = list[int]()
        start = 0
        begin = tokenizer.get_vocab().get(TOOL_START)  # None: the answer has no calls
        for position, token in enumerate(tokens, 1):
            malformed = len(parser.malformed)
            calls = parser.feed([token]).tool_calls
            if token == begin:
                start = position
            elif len(parser.malformed) > malformed or not all(map(self.fits, calls)):
                starts.append(start)
        malformed = len(parser.malformed)
        parser.finish()
        return [*starts, start] if len(parser.malformed) > malformed else starts

    def again(
        self,
        model: DiffusionGemma,
        tokenizer: TokenizerWrapper,
        asked: Request,
        tokens: Sequence[int],
        begin: int,
    ) -> Request:
        """Ask again for one broken call, after everything that precedes it in the answer.

        Args:
            model: the model that answered.
            tokenizer: the model's tokenizer.
            asked: the request that was answered.
            tokens: the answer.
            begin: where the text of the broken call begins in ``tokens``.

        Returns:
            A request for a call of the same function, or of any function if the name is unknown.

        Raises:
            UserError: no call fits in the context, or its parameters cannot be guaranteed.
        """
        meant = re.match(rf"\s*{CALL}\s*([\w.-]+)", tokenizer.decode(list(tokens[begin:])))
        names = [meant[1]] if meant and meant[1] in self.parameters else list(self.parameters)
        return self._request(model, tokenizer, asked, tokens[:begin], names)

    def _request(
        self,
        model: DiffusionGemma,
        tokenizer: TokenizerWrapper,
        asked: Request,
        before: Sequence[int],
        names: Sequence[str],
    ) -> Request:
        """Make a request for one call.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            asked: the request that was answered.
            before: the tokens of the answer before the call.
            names: the functions that may be called.
        """
        _, end = self.markers(tokenizer)
        constraint = compile_named(
            tokenizer,
            model.config,
            {CALL + name: self.parameters[name] for name in names},
            end,
            as_json=calls_as_json(tokenizer),
        )
        ids = [*asked.ids, *before]
        context = model.config.text.max_position_embeddings
        limit = min(asked.limit, token_limit(len(ids), None, model.config.canvas_length, context))
        return Request(
            ids,
            limit,
            asked.seed,
            ResponseParser(tokenizer),
            (end,),
            asked.opened,
            asked.images,
            asked.patches,
            Demands((end,), limit, stretches=[Stretch(constraint)]),
        )

    @staticmethod
    def markers(tokenizer: TokenizerWrapper) -> tuple[int, int]:
        """The tokens that begin and end a call.

        Raises:
            UserError: the model has no such tokens.
        """
        begin, end = (tokenizer.get_vocab().get(marker) for marker in (TOOL_START, TOOL_END))
        if begin is None or end is None:
            raise UserError("This model has no tokens for calls of tools; leave the tools out.")
        return begin, end
