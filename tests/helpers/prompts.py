"""Prompts of the built-in model's own tasks."""

from mlx_diffgemma import nano
from mlx_diffgemma.evaluation.nano_tasks import TASKS, held_out_examples
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.text.tokenizer import chat_ids, load_tokenizer


def nano_prompts(count: int) -> list[list[int]]:
    """Held-out prompts of every task in turn."""
    eos = ModelConfig.from_folder(nano.FOLDER).generation.eos_token_ids
    tokenizer, tasks = load_tokenizer(nano.FOLDER, eos), list(TASKS.values())
    per_task = -(-count // len(tasks))
    examples = [
        e for group in zip(*(held_out_examples(t, per_task, seed=3) for t in tasks)) for e in group
    ]
    return [chat_ids(tokenizer, [{"role": "user", "content": e.prompt}]) for e in examples[:count]]
