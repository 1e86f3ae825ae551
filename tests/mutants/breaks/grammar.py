"""Breaks of the grammar: expressions, schemas, automata, tokens, the dynamic programme, demands."""

from tests.mutants.entry import Break

AUTOMATON = "mlx_diffgemma/grammar/automaton.py"
BUDGET = "mlx_diffgemma/grammar/budget.py"
CALLS = "mlx_diffgemma/grammar/calls.py"
CHARACTERS = "mlx_diffgemma/grammar/characters.py"
CHECKER = "mlx_diffgemma/grammar/checker.py"
CONSTRAINT = "mlx_diffgemma/grammar/constraint.py"
DECIMALS = "mlx_diffgemma/grammar/decimals.py"
LANGUAGE = "mlx_diffgemma/grammar/language.py"
PROGRAM = "mlx_diffgemma/grammar/program.py"
REGEX = "mlx_diffgemma/grammar/regex.py"
SCHEMA = "mlx_diffgemma/grammar/schema.py"
JSON_TEXT = "mlx_diffgemma/grammar/json_text.py"
TOKENS = "mlx_diffgemma/grammar/tokens.py"
DEMANDS = "mlx_diffgemma/decoding/constraints.py"

BREAKS = (
    Break(
        "digits-of-every-script",
        CHARACTERS,
        'DIGIT = chars([(ord("0"), ord("9"))])',
        'DIGIT = chars([(ord("0"), ord("9")), (0x6F0, 0x6F9)])',
        "tests/grammar/test_regex.py -k TestJavaScript",
    ),
    Break(
        "control-character-1f-unescaped",
        JSON_TEXT,
        "ESCAPED = chars([(0, 0x1F),",
        "ESCAPED = chars([(0, 0x1E),",
        "tests/grammar/test_schema.py -k every_character",
    ),
    Break(
        "required-members-may-lack",
        JSON_TEXT,
        "after = chosen_after if is_required else Choice((chosen_after, after))",
        "after = chosen_after if not is_required else Choice((chosen_after, after))",
        "tests/grammar/test_schema.py",
    ),
    Break(
        "references-translated-again",
        SCHEMA,
        "        if reference not in self._translated:\n",
        "        if True:\n",
        "tests/grammar/test_schema.py -k translated_once",
    ),
    Break(
        "pattern-by-backtracking",
        CHECKER,
        '            "pattern": self._pattern,\n',
        "",
        "tests/grammar/test_checker.py -k javascript",
    ),
    Break(
        "references-fetch",
        CHECKER,
        'if not reference.startswith("#"):',
        'if reference.startswith("//"):',
        "tests/grammar/test_checker.py -k TestBounds",
        "the registry holds the schema alone, so nothing is fetched either way; the refusal has other words",
    ),
    Break(
        "one-is-true",
        CHECKER,
        '    if isinstance(value, bool):\n        return "boolean", value\n',
        "",
        "tests/grammar/test_checker.py -k specification or keywords",
    ),
    Break(
        "constraint-of-another-tokenizer",
        CONSTRAINT,
        "key = (id(vocabulary), digest)",
        "key = (0, digest)",
        "tests/grammar/test_constraint.py -k tokenizers",
    ),
    Break(
        "draw-takes-the-first-of-a-piece",
        CONSTRAINT,
        "place, _ = passing(weights, target - before)",
        "place, _ = passing(weights, target * 0)",
        "tests/grammar/test_constraint.py -k TestDraw",
    ),
    Break(
        "markers-may-come",
        TOKENS,
        'if token["special"] or token["content"] in MARKERS',
        'if token["special"]',
        "tests/grammar/test_tokens.py -k need_not_be_special",
    ),
    Break(
        "pins-of-a-canvas-alone",
        DEMANDS,
        "self.pins[start : self.last_pin + 1 if one.stop is None else one.stop],",
        "self.pins[start : start + length if one.stop is None else one.stop],",
        "tests/test_demands.py -k later",
    ),
    Break(
        "any-prefix-is-accepted",
        AUTOMATON,
        "        return bool(self.accepting[state])\n",
        "        return True\n",
        "tests/grammar/test_automaton.py",
    ),
    Break(
        "choice-of-its-first-part",
        AUTOMATON,
        "            for part in language.parts:\n                self.jumps[start].append((yield part, end))\n",
        "            for part in language.parts[:1]:\n                self.jumps[start].append((yield part, end))\n",
        "tests/grammar/test_automaton.py",
    ),
    Break(
        "inner-limit-outlives-the-outer",
        BUDGET,
        "            deadline=min(limit.deadline, outer.deadline),\n",
        "            deadline=limit.deadline,\n",
        "tests/grammar/test_budget.py",
    ),
    Break(
        "inner-limit-forgets-who-waits",
        BUDGET,
        "            abandoned=abandoned or outer.abandoned,\n",
        "            abandoned=abandoned or _never,\n",
        "tests/grammar/test_budget.py",
    ),
    Break(
        "limit-stays-after-its-block",
        BUDGET,
        "    finally:\n        _limit.reset(token)\n",
        "    finally:\n        pass\n",
        "tests/grammar/test_budget.py",
    ),
    Break(
        "message-of-the-outer-limit",
        BUDGET,
        "            seconds=seconds if limit.deadline < outer.deadline else outer.seconds,\n",
        "            seconds=outer.seconds,\n",
        "tests/grammar/test_budget.py",
    ),
    Break(
        "arguments-in-the-order-of-the-schema",
        CALLS,
        "for name in sorted(properties, key=_sort_key):",
        "for name in properties:",
        "tests/test_calls.py",
    ),
    Break(
        "blank-after-a-comma-of-a-list",
        CALLS,
        "    if language is json_text.COMMA:\n        return COMMA\n",
        "    if language is json_text.COMMA:\n        return language\n",
        "tests/test_calls.py",
    ),
    Break(
        "required-arguments-may-lack",
        JSON_TEXT,
        "        after = chosen_after if is_required else Choice((chosen_after, after))\n",
        "        after = Choice((chosen_after, after))\n",
        "tests/test_calls.py",
    ),
    Break(
        "key-with-a-blank-unquoted",
        CALLS,
        "    return text(name) if BARE.fullmatch(name) else concat([QUOTE, text(name), QUOTE])\n",
        "    return text(name)\n",
        "tests/test_calls.py",
    ),
    Break(
        "listed-text-unquoted",
        CALLS,
        "    if isinstance(value, str):\n        return concat([QUOTE, text(value), QUOTE])\n",
        "    if isinstance(value, str):\n        return text(value)\n",
        "tests/test_calls.py",
    ),
    Break(
        "path-forgets-what-follows",
        PROGRAM,
        "step = np.argmax(largest[t, group] + value[t + 1, target])",
        "step = np.argmax(largest[t, group])",
        "tests/grammar/test_program.py",
    ),
    Break(
        "path-takes-the-first-column",
        PROGRAM,
        "columns[np.argmax(best[t, columns])]",
        "columns[0]",
        "tests/grammar/test_program.py",
    ),
    Break(
        "draw-within-a-group-is-uniform",
        PROGRAM,
        "_drawn(np.exp(inner - inner.max()), left)",
        "_drawn(np.ones(len(inner)), left)",
        "tests/grammar/test_program.py",
    ),
    Break(
        "marginals-forget-the-total",
        PROGRAM,
        "np.divide(probability, total, out=np.zeros_like(total), where=total > 0)",
        "probability",
        "tests/grammar/test_program.py",
    ),
    Break(
        "draw-may-take-weight-zero",
        PROGRAM,
        "u * running[-1], np.nextafter(running[-1], 0.0)",
        "u * running[-1], running[-1]",
        "tests/grammar/test_program.py",
        "no u is above 1 - 2**-24, so the product never reaches the sum",
    ),
)
