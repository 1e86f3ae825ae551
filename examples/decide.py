"""Choose among known answers, with probabilities, in one forward and without writing text.

python examples/decide.py
"""

from mlx_diffgemma import Question, chat_ids, decide, load


def main() -> None:
    model, tokenizer = load("nano")

    prompt = chat_ids(tokenizer, [{"role": "user", "content": "Is 12 greater than 30?"}])
    (decision,) = decide(model, tokenizer, prompt, [Question.yes_no()])
    print(f"Is 12 greater than 30?  {decision.label}, p(yes) = {decision.value:.3f}")

    prompt = chat_ids(tokenizer, [{"role": "user", "content": "Add 12 and 30."}])
    question = Question.choice(["41", "42", "52"])
    # Four canvases of noise are averaged, which steadies the probabilities.
    (decision,) = decide(model, tokenizer, prompt, [question], reads=4)
    shares = ", ".join(f"{label}: {share:.3f}" for label, share in decision.probabilities.items())
    print(f"Add 12 and 30.  {decision.label} ({shares})")


if __name__ == "__main__":
    main()
