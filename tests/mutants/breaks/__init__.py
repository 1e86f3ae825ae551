"""The list of breaks, one table for each part of the package."""

from tests.mutants.breaks import (
    checkpoints,
    drafting,
    grammar,
    loop,
    media,
    model,
    sampling,
    serving,
    text,
    tools,
    tuning,
)

PARTS = {
    part.__name__.rpartition(".")[2]: part.BREAKS
    for part in (
        model,
        sampling,
        loop,
        checkpoints,
        text,
        grammar,
        media,
        serving,
        tuning,
        drafting,
        tools,
    )
}
BREAKS = tuple(one for own in PARTS.values() for one in own)
