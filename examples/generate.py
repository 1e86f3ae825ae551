"""Answer one prompt, canvas by canvas.

python examples/generate.py
python examples/generate.py --model mlx-community/diffusiongemma-26B-A4B-it-4bit --prompt "Why is the sky blue?"
"""

import argparse

from mlx_diffgemma import chat_ids, load, stream_generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--prompt", default="Sort these numbers: 42 17 91")
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.model)
    prompt = chat_ids(tokenizer, [{"role": "user", "content": arguments.prompt}])
    steps = 0
    for response in stream_generate(model, tokenizer, prompt, seed=0):
        print(response.text, end="", flush=True)
        steps += response.steps
    print(f"\n[{steps} denoising steps, finish reason: {response.finish_reason}]")


if __name__ == "__main__":
    main()
