"""Answer several prompts in shared forwards.  Each answer is the one the prompt gets alone.

python examples/batch.py
"""

from mlx_diffgemma import batch_generate, chat_ids, load

PROMPTS = [
    "Add 12 and 30.",
    "Sort these numbers: 42 17 91",
    "Turn this into JSON: Anna is 31 years old and lives in Paris.",
]


def main() -> None:
    model, tokenizer = load("nano")
    prompts = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS]
    responses = batch_generate(model, tokenizer, prompts, seed=0, batch_size=4)
    for text, response in zip(PROMPTS, responses, strict=True):
        print(f"{text}\n  {response.text}  [{response.steps} steps]")


if __name__ == "__main__":
    main()
