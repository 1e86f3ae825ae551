"""The options of a conversion.

>>> ConvertOptions(recipe="4bit", q_bits=3).chosen().name
'4bit with experts at 3 bits in groups of 64'
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_diffgemma.device import dtype_named
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.recipes import Recipe, recipe_named


@dataclass(frozen=True)
class ConvertOptions:
    """The precision that a conversion gives a checkpoint, under mlx-lm's names.

    Args:
        quantize: Whether to quantise, by default by the recipe "4bit".
        recipe: The recipe to quantise by; it implies ``quantize``.
        q_bits: The bits of the recipe's experts; of everything in a uniform recipe.
        q_group_size: Their group size.
        q_mode: Their quantisation mode.
        dtype: The dtype of what is not quantised; None leaves it as stored.
        dequantize: Whether to undo the quantisation of the source.

    Raises:
        UserError: The options contradict each other.
    """

    quantize: bool = False
    recipe: str | None = None
    q_bits: int | None = None
    q_group_size: int | None = None
    q_mode: str | None = None
    dtype: str | None = None
    dequantize: bool = False

    def __post_init__(self) -> None:
        quantises = self.quantize or self.recipe is not None
        if self.dequantize and quantises:
            raise UserError(
                "Either quantise or dequantise, not both at once; leave -d out, or -q and --recipe."
            )
        for name in ("q_bits", "q_group_size", "q_mode"):
            if getattr(self, name) is not None and not quantises:
                raise UserError(
                    f"--{name.replace('_', '-')} has no effect without -q; "
                    "add -q, or --recipe with a name."
                )
        if self.dtype is not None:
            dtype_named(self.dtype)
        recipe = self.chosen()
        changes = (self.q_bits, self.q_group_size, self.q_mode)
        if recipe and not recipe.quantises and (self.quantize or changes != (None, None, None)):
            raise UserError(
                f"Recipe {recipe.name} quantises nothing; leave -q and the --q- options out, "
                "or take another recipe."
            )

    def chosen(self) -> Recipe | None:
        """The recipe with its changes; None where the precision is kept or undone."""
        if self.recipe is None and not self.quantize:
            return None
        recipe = recipe_named(self.recipe or "4bit")
        return recipe.changed(self.q_bits, self.q_group_size, self.q_mode)

    @property
    def stored_dtype(self) -> str | None:
        """The dtype of what is not quantised; None leaves it as stored."""
        return self.dtype or ("bfloat16" if self.recipe == "bf16" else None)

    def command(self) -> str:
        """These options as a command line spells them."""
        words = ["-q"] if self.quantize else ["-d"] if self.dequantize else []
        for name in ("recipe", "q_bits", "q_group_size", "q_mode", "dtype"):
            if (value := getattr(self, name)) is not None:
                words.append(f"--{name.replace('_', '-')} {value}")
        return " ".join(words)
