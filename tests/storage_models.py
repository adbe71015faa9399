"""What the tests of adapter files share: a trained model, and files read, changed and
signed again."""

import safetensors
import torch
from safetensors.torch import load_file, save_file

import gpart
from tests.models import NET, normal


def trained(seed=7, **kwargs):
    """A NET whose theta, head and running statistics are not the pretrained ones."""
    model, _ = NET.adapted(seed, **kwargs)
    with torch.no_grad():
        for w in model.head.parameters():
            w.add_(normal(*w.shape, seed=seed))
        model.train()(normal(8, 16, seed=seed))
    return model.eval()


def read(path):
    """Metadata and tensors, nothing being checked."""
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata(), load_file(path)


def write(path, metadata, tensors):
    """A file with a digest that agrees, whatever it says."""
    metadata = {key: text for key, text in metadata.items() if key != "sha256"}
    signature = {"sha256": gpart.digest(metadata, tensors)}
    save_file(tensors, path, metadata | signature)


def rewrite(path, edit):
    """edit(metadata, tensors) changes the two in place; the result is signed."""
    metadata, tensors = read(path)
    edit(metadata, tensors)
    write(path, metadata, tensors)
