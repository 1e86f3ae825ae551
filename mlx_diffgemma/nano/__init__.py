"""nano, the built-in model: a real DiffusionGemma of a few million parameters.

This project trained it.  It is versioned data: results, drafters and golden outputs name
``VERSION`` and the hash of its weights.
"""

from pathlib import Path

NAME = "nano"
VERSION = "nano-1"
SHA256 = "922702c834246289f981b0dbdec40beda01cca17e8a1af3a576da60d600ea637"  # of model.safetensors
FOLDER = Path(__file__).with_name("checkpoint")
DRAFTER, VISION = "nano-drafter", "nano-vision"
VISION_VERSION = "nano-vision-1"
VISION_SHA256 = (
    "200e25b3434af097088a0b7cce335abdb4ee509568d8cf7fa5e454bcd05e772e"  # of its model.safetensors
)
VERSIONS = {NAME: VERSION, VISION: VISION_VERSION}
# The folders of what needs no download, by name.
FOLDERS = {
    NAME: FOLDER,
    DRAFTER: Path(__file__).with_name("drafter"),
    VISION: Path(__file__).with_name("vision"),
}
