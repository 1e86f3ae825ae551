"""The tensors of a folder."""

import mlx.core as mx


def tensors_of(folder):
    return {
        name: array
        for path in folder.glob("*.safetensors")
        for name, array in mx.load(str(path)).items()
    }
