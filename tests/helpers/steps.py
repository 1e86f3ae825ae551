"""Hand-made steps as the loop reports them, and the lines of a trace."""

import json
import re

import mlx.core as mx

from mlx_diffgemma.decoding.records import CanvasStep


def step(ids, number=0, reason=None, entropy=1.0):
    ids = mx.array(ids)
    return CanvasStep(
        0,
        0,
        number,
        8,
        ids,
        ids,
        ids > 0,
        mx.full(ids.shape, entropy),
        mx.zeros(ids.shape),
        entropy,
        reason,
    )


def ids_of(nano_pair, text):
    return nano_pair[1].encode(text, add_special_tokens=False)


STORY = "Tell me a story about Leo the owl and a map."


def records_of(path):
    """The lines of a trace in either kind of file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".html":
        text = re.search(
            r'<script type="application/json" id="trace">\n(.*?)</script>', text, re.DOTALL
        )[1]
    return [json.loads(line) for line in text.strip().split("\n")]
