"""Breaks of the server: scheduler, jobs, protocols, preparation, bodies, amounts, limits."""

from tests.mutants.entry import Break

SCHEDULER = "mlx_diffgemma/decoding/scheduler.py"
ANSWERS = "mlx_diffgemma/serving/jobs/answer.py"
FUNCTIONS = "mlx_diffgemma/serving/jobs/functions.py"
STOPS = "mlx_diffgemma/serving/jobs/stops.py"
FIELDS = "mlx_diffgemma/serving/protocols/fields.py"
BODY = "mlx_diffgemma/serving/protocols/body.py"
PREPARATION = "mlx_diffgemma/serving/preparation.py"
BODIES = "mlx_diffgemma/serving/bodies.py"
AMOUNTS = "mlx_diffgemma/serving/amounts.py"
CONNECTIONS = "mlx_diffgemma/serving/connections.py"
PREFIXES = "mlx_diffgemma/decoding/prefix_cache.py"
KEYS = "mlx_diffgemma/serving/keys.py"
KEPT_THREADS = "mlx_diffgemma/serving/kept_threads.py"
CONVERSATION = "mlx_diffgemma/serving/conversation.py"
OPENAI = "mlx_diffgemma/serving/protocols/openai.py"
CHAT = "mlx_diffgemma/serving/protocols/openai_chat.py"
COMPLETIONS = "mlx_diffgemma/serving/protocols/openai_completions.py"

BREAKS = (
    Break(
        "kept-threads-run-at-the-end",
        KEPT_THREADS,
        "            thread.block()\n",
        "            pass\n",
        "tests/serving/test_engine.py -k interpreter",
    ),
    Break(
        "kept-threads-end",
        KEPT_THREADS,
        "                _idle.append(self)\n",
        "                return done.set_result(None)\n",
        "tests/serving/test_engine.py -k thread_of",
    ),
    Break(
        "cancelled-job-is-still-read",
        SCHEDULER,
        "for slot in [slot for slot in self.slots.values() if slot.run is run]:",
        "for slot in [slot for slot in self._in_state(SlotState.READY) if slot.run is run]:",
        "tests/serving/test_engine.py -k stops_at_the_next",
    ),
    Break(
        "one-row-too-many",
        SCHEDULER,
        "        while len(self.slots) < self.limits.max_batch:\n",
        "        while len(self.slots) <= self.limits.max_batch:\n",
        "tests/serving/test_engine.py -k never_more_rows",
    ),
    Break(
        "rows-are-never-given-up",
        SCHEDULER,
        "        if not waiting or len(self.slots) < self.limits.max_batch:\n            return\n",
        "        if waiting or len(self.slots) < self.limits.max_batch:\n            return\n",
        "tests/serving/test_engine.py -k gives_some",
    ),
    Break(
        "prompt-read-in-one-piece",
        SCHEDULER,
        "            self.limits.prefill_step_size,\n        )\n        boundaries",
        "            10**9,\n        )\n        boundaries",
        "tests/serving/test_engine.py -k long_prompt",
    ),
    Break(
        "prefixes-of-any-scope",
        SCHEDULER,
        "                scope=slot.run.job.scope,\n",
        "",
        "tests/serving/test_engine.py -k scopes",
    ),
    Break(
        "answers-share-one-cache",
        ANSWERS,
        "id(choice.begin(model, cache and cache.copy())): choice for choice in self.choices",
        "id(choice.begin(model, cache)): choice for choice in self.choices",
        "tests/serving/test_server.py tests/serving/test_jobs.py -k several_choices",
    ),
    Break(
        "stop-listed-first-wins",
        STOPS,
        "            return self._held[: min(ends)[1]]\n",
        "            return self._held[: ends[0][1]]\n",
        "tests/serving/test_jobs.py tests/serving/test_conversations.py -k TestStops",
    ),
    Break(
        "calls-unchecked",
        FUNCTIONS,
        '            return checker.fits(call["arguments"])\n',
        "            return checker is not None\n",
        "tests/serving/test_jobs.py -k TestFunctions or TestCalls",
    ),
    Break(
        "half-characters-pass",
        FIELDS,
        "if not item.isascii() and SURROGATE.search(item):",
        "if not item.isascii() and SURROGATE.match(item):",
        "tests/serving/test_protocol.py tests/serving/test_server.py -k named or refused or bodies",
    ),
    Break(
        "false-is-zero",
        BODY,
        "return bool(value == allowed) and same_kind",
        "return bool(value == allowed)",
        "tests/serving/test_protocol.py -k TestOptions",
    ),
    Break(
        "places-of-one-client-unbounded",
        PREPARATION,
        "client = next((name for name in self._waiting if self._taken[name] < self._each), None)",
        "client = next(iter(self._waiting), None)",
        "tests/serving/test_preparation.py -k TestTurns",
    ),
    Break(
        "inflated-at-once",
        "mlx_diffgemma/serving/content.py",
        "pieces.append(inflater.decompress(content, INFLATED_AT_ONCE))",
        "pieces.append(inflater.decompress(content))",
        "tests/serving/test_guards.py -k inflated",
    ),
    Break(
        "one-level-deeper",
        "mlx_diffgemma/serving/content.py",
        "    for _ in range(DEPTH + 1):\n",
        "    for _ in range(DEPTH + 2):\n",
        "tests/serving/test_guards.py -k nested",
    ),
    Break(
        "pixels-of-each-image-alone",
        AMOUNTS,
        "return header_pixels([url for url in urls if is_data(url)])",
        "return max([header_pixels([url]) for url in urls if is_data(url)], default=0)",
        "tests/serving/test_guards.py tests/serving/test_routes.py -k pixels",
    ),
    Break(
        "answers-are-overdue",
        CONNECTIONS,
        "if self.transport.is_closing() or not self.idle:",
        "if self.transport.is_closing():",
        "tests/serving/test_guards.py -k TestConnections",
    ),
    Break(
        "prefix-of-another-scope",
        PREFIXES,
        "            key = scope + own[:length].tobytes()\n",
        "            key = own[:length].tobytes()\n",
        "tests/serving/test_prefixes.py -k scopes",
    ),
    Break(
        "lengths-of-what-is-gone",
        PREFIXES,
        "            self._lengths[oldest.length] -= 1\n",
        "",
        "tests/serving/test_prefixes.py",
        "a length without an entry is only looked up in vain",
    ),
    Break(
        "any-key-that-begins-alike",
        KEYS,
        "equal = [hmac.compare_digest(brought, wanted) for wanted in self.wanted]",
        "equal = [wanted.startswith(brought) for wanted in self.wanted]",
        "tests/serving/test_guards.py -k keys",
    ),
    Break(
        "developer-is-no-system",
        CONVERSATION,
        '"system" if message.role == "developer" else message.role',
        "message.role",
        "tests/serving/test_conversation.py",
    ),
    Break(
        "thought-of-an-answer-is-forgotten",
        CONVERSATION,
        '        if message.role == "assistant" and isinstance(thought, str) and thought:\n',
        "        if False:\n",
        "tests/serving/test_conversation.py",
    ),
    Break(
        "answer-of-a-tool-without-its-name",
        CONVERSATION,
        'turn |= {"name": names[message.tool_call_id], "tool_call_id": message.tool_call_id}',
        'turn |= {"tool_call_id": message.tool_call_id}',
        "tests/serving/test_conversation.py",
    ),
    Break(
        "paths-of-images-are-opened",
        CONVERSATION,
        "open_images(urls, allow_files, allow_urls)",
        "open_images(urls, True, allow_urls)",
        "tests/serving/test_conversation.py",
    ),
    Break(
        "calls-of-a-stream-are-numbered-anew",
        CHAT,
        "enumerate(piece.calls, calls)",
        "enumerate(piece.calls)",
        "tests/serving/test_responses.py",
    ),
    Break(
        "cached-tokens-are-the-prompt",
        OPENAI,
        '"cached_tokens": usage.reused',
        '"cached_tokens": usage.prompt',
        "tests/serving/test_responses.py",
    ),
    Break(
        "offsets-forget-the-echo",
        COMPLETIONS,
        "_logprobs(logprobs, len(echo)) if logprobs else None",
        "_logprobs(logprobs, 0) if logprobs else None",
        "tests/serving/test_responses.py",
    ),
    Break(
        "offsets-of-a-stream-begin-again",
        COMPLETIONS,
        "_logprobs(piece.logprobs, length)",
        "_logprobs(piece.logprobs, 0)",
        "tests/serving/test_responses.py",
    ),
    Break(
        "arguments-in-ascii",
        OPENAI,
        'json.dumps(call["arguments"], ensure_ascii=False)',
        'json.dumps(call["arguments"])',
        "tests/serving/test_responses.py",
    ),
    Break(
        "thought-is-left-out",
        CHAT,
        "        if piece.thought:\n            delta[",
        "        if False:\n            delta[",
        "tests/serving/test_responses.py",
    ),
)
