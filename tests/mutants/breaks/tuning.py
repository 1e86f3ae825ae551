"""Breaks of tuning: objective, trainer, adapters, data, fusing, memory."""

from tests.mutants.entry import Break

TRAINER = "mlx_diffgemma/tuning/trainer.py"
OBJECTIVE = "mlx_diffgemma/tuning/objective.py"
ADAPTERS = "mlx_diffgemma/tuning/adapters.py"
DATA = "mlx_diffgemma/tuning/data.py"
FUSE = "mlx_diffgemma/tuning/fuse.py"
HEAD = "mlx_diffgemma/tuning/head.py"
MEMORY = "mlx_diffgemma/tuning/memory.py"
RUN = "mlx_diffgemma/tuning/run.py"
STATE = "mlx_diffgemma/tuning/state.py"

BREAKS = (
    Break(
        "experts-of-the-first-layers",
        ADAPTERS,
        "    for layer in model.layers[-count:]:\n        for path",
        "    for layer in model.layers[:count]:\n        for path",
        "tests/test_adapters.py -k last_layers",
    ),
    Break(
        "full-tuning-of-the-first-layers",
        ADAPTERS,
        "    for layer in model.layers[-count:]:\n        layer.unfreeze()",
        "    for layer in model.layers[:count]:\n        layer.unfreeze()",
        "tests/test_adapters.py -k full",
    ),
    Break(
        "validation-noise-changes",
        TRAINER,
        "yield self._make(piece, self._rng(VALID, number))",
        "yield self._make(piece, self._rng(VALID, number + self.iteration))",
        "tests/test_trainer.py -k same_noise",
    ),
    Break(
        "validation-in-training-mode",
        TRAINER,
        "        self.model.eval()\n        sums",
        "        sums",
        "tests/test_trainer.py -k drops_nothing",
    ),
    Break(
        "one-share-of-noise-for-a-batch",
        OBJECTIVE,
        "rng.random((len(starts), 1))",
        "rng.random((1, 1))",
        "tests/test_trainer.py -k corruption",
    ),
    Break(
        "noise-never-the-same-token",
        OBJECTIVE,
        "noise = rng.integers(vocabulary, size=clean.shape, dtype=np.int32)",
        "noise = rng.integers(vocabulary // 2, size=clean.shape, dtype=np.int32)",
        "tests/test_trainer.py -k corruption",
    ),
    Break(
        "last-canvas-never-drawn",
        OBJECTIVE,
        "rng.integers(max(1, -(-(ids.size - answer) // length)))",
        "rng.integers(max(1, (ids.size - answer) // length))",
        "tests/test_trainer.py -k TestMakeBatch",
    ),
    Break(
        "self-conditioning-always",
        OBJECTIVE,
        "bool(draw < objective.self_conditioning)",
        "bool(draw >= 0)",
        "tests/test_trainer.py -k self_conditioning",
    ),
    Break(
        "first-pass-has-a-gradient",
        OBJECTIVE,
        "conditioning.dense(model, mx.stop_gradient(model.logits(rows)))",
        "conditioning.dense(model, model.logits(rows))",
        "tests/parity/test_gradients.py tests/test_trainer.py -k losses_and or self_conditioning",
    ),
    Break(
        "canvas-sees-its-own-answer",
        OBJECTIVE,
        "prefixes = [sequences[row][: batch.starts[row]] for row in chosen]",
        "prefixes = [sequences[row] for row in chosen]",
        "tests/test_trainer.py tests/parity/test_gradients.py -k self_conditioning or losses_and",
        "training_forward lets a canvas at ``starts`` see only what comes before it, whatever the sequence holds behind",
    ),
    Break(
        "signal-of-another-row-of-the-batch",
        OBJECTIVE,
        "signal[place[row]] if row in place else none for row in range(len(sequences))",
        "signal[0] if row in place else none for row in range(len(sequences))",
        "tests/parity/test_gradients.py tests/test_trainer.py -k losses_and or self_conditioning",
    ),
    Break(
        "next-token-is-this-one",
        OBJECTIVE,
        "        targets.append(ids[places + 1])\n",
        "        targets.append(ids[places])\n",
        "tests/parity/test_gradients.py -k losses_and",
    ),
    Break(
        "masked-prompt-one-short",
        OBJECTIVE,
        "places = np.arange(answer - 1 if mask_prompt else 0, ids.size - 1)",
        "places = np.arange(answer if mask_prompt else 0, ids.size - 1)",
        "tests/parity/test_gradients.py tests/test_trainer.py -k mask or losses_and",
    ),
    Break(
        "rows-of-the-first-sequence",
        OBJECTIVE,
        "        first += ids.size\n",
        "        first = ids.size\n",
        "tests/parity/test_gradients.py -k losses_and",
    ),
    Break(
        "gradients-summed-not-averaged",
        TRAINER,
        "gradients = tree_map(lambda g: g / count, gradients)",
        "gradients = tree_map(lambda g: g, gradients)",
        "tests/test_trainer.py -k averaged",
    ),
    Break(
        "gradients-kept-after-a-step",
        TRAINER,
        "                self.gradients = None\n",
        "",
        "tests/test_trainer.py -k averaged or unbroken",
    ),
    Break(
        "gradients-between-two-steps-lost",
        TRAINER,
        "self.gradients = tree_unflatten(gradients) if gradients else None",
        "self.gradients = None",
        "tests/test_trainer.py -k unbroken",
    ),
    Break(
        "clipped-before-the-mean",
        TRAINER,
        "        if count > 1:\n            gradients",
        "        if count > 10:\n            gradients",
        "tests/test_trainer.py -k averaged",
    ),
    Break(
        "epochs-begin-alike",
        TRAINER,
        "self._rng(ORDER, epoch).permutation(len(self.train)),",
        "self._rng(ORDER, 0).permutation(len(self.train)),",
        "tests/test_trainer.py -k epoch",
    ),
    Break(
        "examples-drawn-with-a-seam",
        TRAINER,
        "epoch, index = divmod(place, count)\n            chosen",
        "epoch, index = divmod(place + iteration, count)\n            chosen",
        "tests/test_trainer.py -k epoch",
    ),
    Break(
        "one-stream-for-order-and-noise",
        TRAINER,
        "return np.random.default_rng([self.options.seed, purpose, number])",
        "return np.random.default_rng([self.options.seed, number])",
        "tests/test_trainer.py -k noise or epoch or unbroken",
    ),
    Break(
        "learning-rate-may-change",
        RUN,
        '        "learning_rate": options.learning_rate,\n',
        "",
        "tests/test_lora.py -k TestResume",
    ),
    Break(
        "base-may-change",
        RUN,
        '        "model": fingerprint(model),\n',
        "",
        "tests/test_lora.py -k TestResume",
    ),
    Break(
        "examples-may-change",
        TRAINER,
        "found.update(np.ascontiguousarray(example.ids, dtype=np.int32).tobytes())",
        "found.update(bytes(example.ids[:1].astype(np.int32)))",
        "tests/test_lora.py tests/test_trainer.py -k TestResume or another_run",
    ),
    Break(
        "seed-may-change",
        TRAINER,
        '                "grad_checkpoint",\n            )',
        '                "grad_checkpoint",\n                "seed",\n            )',
        "tests/test_trainer.py tests/test_lora.py -k another_run or TestResume",
    ),
    Break(
        "optimiser-begins-anew",
        STATE,
        "    optimizer.state = tree_unflatten(state)\n",
        "",
        "tests/test_trainer.py -k unbroken",
    ),
    Break(
        "state-of-any-run",
        STATE,
        'if metadata.get("run") != _as_text(run):',
        'if "run" not in metadata:',
        "tests/test_trainer.py -k another_run",
    ),
    Break(
        "weights-written-before-the-state",
        RUN,
        "        self.trainer.save(self.folder / STATE)\n        self.write_losses()\n",
        "        self.write_losses()\n",
        "tests/test_lora.py -k resume",
    ),
    Break(
        "no-validation-is-a-loss-of-zero",
        TRAINER,
        "        if not self.options.val_batches:\n            self.valid = ()\n",
        "",
        "tests/test_lora.py -k no_batches",
    ),
    Break(
        "adapter-scale-left-out",
        ADAPTERS,
        "return y + (self.scale * z).astype(y.dtype)",
        "return y + z.astype(y.dtype)",
        "tests/test_fuse.py tests/test_adapters.py -k unfused or experts",
    ),
    Break(
        "losses-by-batch-not-by-token",
        TRAINER,
        "        self.causal += found.causal.item() * found.causal_tokens\n",
        "        self.causal += found.causal.item() * len(batch.sequences)\n",
        "tests/test_trainer.py -k weighted",
    ),
)
