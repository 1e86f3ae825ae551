"""Builds nano's tokenizer: a byte-fallback BPE that is lossless for every Unicode string.

sentencepiece trains ``tokenizer.model``.  ``tokenizer.json`` says the same for the `tokenizers`
library, which transformers and mlx-lm load.  Spaces remain spaces: sentencepiece normally writes
them as U+2581, and then cannot tell the two apart when decoding.  Training needs that escape to
find word borders, so it is removed from the finished model.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from mlx_diffgemma.evaluation.nano_stories import STAGES
from mlx_diffgemma.evaluation.nano_tasks import TASKS, draw

VOCAB_SIZE = 1024
# Gemma 4's markers, one token each.  Ids 0 to 3 are pad, eos, bos, unk as in Gemma.
MARKERS = (
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<channel|>",
    "<|think|>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
    "<|image>",
    "<image|>",
    "<|image|>",
    "<|video|>",
)
SPECIALS = ("<pad>", "<eos>", "<bos>")
ESCAPED_SPACE = "\u2581"


def corpus(lines: int, seed: int = 0) -> list[str]:
    """Text of the kind nano reads and writes."""
    rng, tasks = random.Random(seed), list(TASKS.values())
    weights = [task.weight for task in tasks]
    texts = [
        "\n",
        "system\n",
        "user\n",
        "model\n",
        "thought\n",
        *" ".join(map(" ".join, STAGES)).split("."),
    ] * 50
    for task in rng.choices(tasks, weights, k=lines):
        example = draw(task, rng, held_out=False)
        texts += [example.prompt, example.answer, example.thought]
    return texts


def train_model(texts: list[str]) -> bytes:
    """The sentencepiece model file as bytes."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        required_chars="".join(map(chr, range(33, 127))),
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=[*MARKERS, "\n"],
        num_threads=1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(buffer.getvalue())
    for piece in proto.pieces:
        piece.piece = piece.piece.replace(ESCAPED_SPACE, " ")
        if piece.piece in SPECIALS:  # chat templates write <bos> as text, so text may hold it
            piece.type = sentencepiece_model_pb2.ModelProto.SentencePiece.Type.USER_DEFINED
    proto.normalizer_spec.escape_whitespaces = False
    # The trainer's own settings hold paths and nothing a reader needs.
    proto.trainer_spec.ClearField("input")
    return proto.SerializeToString(deterministic=True)


def to_tokenizers_json(model: bytes) -> dict:
    """``tokenizer.json`` with the same pieces, ids and merges as the sentencepiece ``model``."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    pieces = [piece.piece for piece in proto.pieces]
    ids = {piece: index for index, piece in enumerate(pieces)}
    normal = {
        p.piece
        for p in proto.pieces
        if p.type == sentencepiece_model_pb2.ModelProto.SentencePiece.Type.NORMAL
    }
    # sentencepiece merges any two neighbours whose union is a piece, best-scored union first; every
    # such pair is listed here under the rank of its union.
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in sorted((p for p in normal if len(p) > 1), key=ids.__getitem__)
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    added = [
        {
            "id": ids[text],
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": text != "\n",
        }
        for text in (*SPECIALS, *MARKERS, "\n")
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda t: t["id"]),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                "<bos>": {"id": "<bos>", "ids": [ids["<bos>"]], "tokens": ["<bos>"]}
            },
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }


def tokenizer_config() -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "model_max_length": 8192,
        "tool_parser_type": "gemma4",
    }


def build(folder: Path) -> None:
    """Write the three tokenizer files into ``folder``."""
    model = train_model(corpus(40_000))
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in (
        ("tokenizer.json", to_tokenizers_json(model)),
        ("tokenizer_config.json", tokenizer_config()),
    ):
        (folder / name).write_text(
            json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
