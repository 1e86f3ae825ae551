"""Breaks of text: tokenizer, conversations, control tokens, chat templates, calls."""

from tests.mutants.entry import Break

TOKENIZER = "mlx_diffgemma/text/tokenizer.py"
PARSER = "mlx_diffgemma/text/parser.py"
DIALECT = "mlx_diffgemma/text/dialect.py"
LITERAL = "mlx_diffgemma/text/literal.py"
BUDGET = "mlx_diffgemma/text/budget.py"
CALLS = "mlx_diffgemma/text/calls.py"

BREAKS = (
    Break(
        "replacement-character-holds-back",
        PARSER,
        "if text.endswith(REPLACEMENT) and not final and self._incomplete():",
        "if text.endswith(REPLACEMENT) and not final:",
        "tests/test_tokenizer.py -k TestTextStream",
    ),
    Break(
        "half-characters-are-shown",
        PARSER,
        "if text.endswith(REPLACEMENT) and not final and self._incomplete():",
        "if text.endswith(REPLACEMENT * 2) and not final and self._incomplete():",
        "tests/test_tokenizer.py -k TestTextStream",
    ),
    Break(
        "stream-decodes-without-context",
        PARSER,
        "self._context = self._done\n",
        "self._context = len(self._ids)\n",
        "tests/test_tokenizer.py -k TestTextStream",
    ),
    Break(
        "marker-leaks-into-a-call",
        PARSER,
        'self._state = {CHANNEL_START: "header", TOOL_START: "tool"}.get(marker, "answer")',
        'self._state = {CHANNEL_START: "thought", TOOL_START: "tool"}.get(marker, "answer")',
        "tests/test_tokenizer.py -k TestResponseParser",
    ),
    Break(
        "header-carried-over",
        PARSER,
        '        self._header = ""\n        self._tool = [""]\n\n    def _take',
        '        self._tool = [""]\n\n    def _take',
        "tests/test_tokenizer.py -k TestResponseParser",
    ),
    Break(
        "malformed-calls-dropped",
        PARSER,
        "        except ValueError:\n            self.malformed.append(QUOTE.join(self._tool))",
        "        except ValueError:\n            pass",
        "tests/test_tokenizer.py -k malformed",
    ),
    Break(
        "second-start-token",
        TOKENIZER,
        "special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)",
        "special = True",
        "tests/test_tokenizer.py -k second",
    ),
    Break(
        "control-tokens-of-users-unmarked",
        TOKENIZER,
        "            turns = marked(turns, control, marks)\n",
        "",
        "tests/test_conversations.py -k TestLiterally",
    ),
    Break(
        "control-tokens-of-tools-unmarked",
        TOKENIZER,
        "            called = marked(called, control, marks)\n",
        "",
        "tests/test_conversations.py -k TestLiterally",
    ),
    Break(
        "parts-glued-by-a-blank",
        DIALECT,
        '"".join(part["text"] for part in run)',
        '"".join(part["text"].strip() for part in run)',
        "tests/test_conversations.py -k TestParts",
    ),
    Break(
        "product-of-a-text-unbounded",
        BUDGET,
        "current_budget().check(text_size(value) * max(times, 0))",
        "current_budget().check(text_size(value))",
        "tests/test_templates.py -k before_they_are_made",
    ),
    Break(
        "nested-without-end",
        CALLS,
        "if depth > DEEPEST:",
        "if depth > 10**9:",
        "tests/test_calls.py -k no_call",
    ),
)
