# SPDX-License-Identifier: Apache-2.0
"""A folder that is ready to be pushed: the adapter, and a model card that says how to
use it.

    python -m experiments.model_card adapter.safetensors FOLDER --auto-class AutoModelForCausalLM
    hf upload you/your-adapter FOLDER     # yours to run: the script itself uploads nothing

Everything in the card comes from the adapter file, and from results.json of
train_glue.py if --results names it. What only its author knows is left as a question.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import safetensors

import gpart
import train_glue

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A [GPart](https://arxiv.org/abs/2605.14841) adapter for `{{ base }}`: {{ d }} trained numbers move
{{ N }} weights (tensors: {{ matrices }}) through a seeded partition.
{% if heads %}It brings {{ heads }} trained parameters of its own, such as `{{ head }}`.
{% endif %}
| | |
|---|---|
| d, N, seed, isometric | {{ d }}, {{ N }}, {{ seed }}, {{ isometric }} |
| adapted | `{{ first }}` … `{{ last }}` |
| format, written by | {{ format }}, gpart {{ version }} |
| identity (sha256) | `{{ sha256 }}` |

## Use

Copy `gpart.py` of the GPart reference implementation beside your script; it needs torch and
safetensors.

```python
import gpart
from transformers import {{ auto }}

model = {{ auto }}.from_pretrained("{{ base }}"{{ labels }})
gpart.load(model, "{{ file }}")  # refuses a file that is damaged or does not fit
gpart.merge(model)  # optional: the plain model's speed; gpart.unmerge takes it back, bit for bit
```

## Training

{{ training }}

## Limits

Which data was it trained on, what is it for, where does it fail? (The author's to answer.)
"""

QUESTION = "How was it trained? (The author's to answer.)"


def write(
    adapter: Path,
    folder: Path,
    auto: str,
    num_labels: int | None = None,
    license: str | None = None,
    results: str = "",
) -> Path:
    """Copy adapter into folder and write README.md beside it; the path of the card.

    auto names transformers' class of the model, num_labels is for a classifier.
    ValueError if adapter is no whole GPart file, or the folder has a README.md that is
    no such card.
    """
    try:
        with safetensors.safe_open(adapter, framework="pt") as f:
            metadata, tensors = (
                f.metadata() or {},
                {key: f.get_tensor(key) for key in [*f.keys()]},
            )
    except safetensors.SafetensorError as error:
        raise ValueError(f"{adapter} is no safetensors file: {error}") from None
    if metadata.get("format") != gpart.FORMAT:
        raise ValueError(
            f"{adapter} has format {metadata.get('format')}, not {gpart.FORMAT}"
        )
    sha256 = metadata.pop("sha256", None)
    if sha256 != gpart._digest(metadata, tensors):
        raise ValueError(f"{adapter} is damaged: its sha256 is wrong")
    path = folder / "README.md"
    if path.exists() and "library_name: gpart" not in path.read_text():
        raise ValueError(
            f"{path} exists and is no model card of GPart: name another folder"
        )
    names = [name for name, _ in json.loads(metadata["manifest"])]
    heads = sorted(tensors.keys() - {"theta"})
    base = metadata["base_model_name_or_path"]
    base = "" if Path(base).is_absolute() else base  # a folder of this machine
    card = huggingface_hub.ModelCard.from_template(
        huggingface_hub.ModelCardData(
            base_model=base or None,
            library_name="gpart",
            license=license,
            tags=["gpart"],
        ),
        template_str=TEMPLATE,
        title=folder.resolve().name,
        base=base or "THE-BASE-MODEL",
        **{key: metadata[key] for key in ("d", "N", "seed", "isometric", "format")},
        sha256=sha256,
        version=metadata["gpart_version"],
        matrices=len(names),
        first=names[0],
        last=names[-1],
        heads=len(heads),
        head=heads[0] if heads else "",
        auto=auto,
        labels="" if num_labels is None else f", num_labels={num_labels}",
        file=adapter.name,
        training=train_glue.table(json.loads(Path(results).read_text()))
        if results
        else QUESTION,
    )
    folder.mkdir(parents=True, exist_ok=True)
    if adapter.resolve() != (folder / adapter.name).resolve():
        shutil.copy(adapter, folder / adapter.name)
    card.save(path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("adapter", type=Path, help="file written by gpart.save")
    parser.add_argument("folder", type=Path, help="where adapter and card go")
    parser.add_argument(
        "--auto-class",
        required=True,
        help="such as AutoModelForCausalLM: what loads the model",
    )
    parser.add_argument("--num-labels", type=int, help="of a classifier")
    parser.add_argument("--license", help="of the adapter, such as apache-2.0")
    parser.add_argument("--results", default="", help="results.json of train_glue.py")
    args = parser.parse_args(argv)
    try:
        given = (args.auto_class, args.num_labels, args.license, args.results)
        print(write(args.adapter, args.folder, *given))
    except (ValueError, OSError) as error:
        sys.exit(f"model_card: error: {error}")


if __name__ == "__main__":
    main()
