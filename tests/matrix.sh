#!/usr/bin/env bash
# The quick tests on every Python that is here, and on the oldest versions allowed.
#
#     tests/matrix.sh            # some ten minutes a row; writes tests/results/matrix.md
#
# For a Python that is not here pip says whether the constraints can be had for it, and
# the row says "not run". The oldest versions are pyproject.toml's lower bounds of what
# gpart.py needs; train_glue.py's tests are left out there.
set -euo pipefail
cd "$(dirname "$0")/.."
table=tests/results/matrix.md
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
quick=(-q -m "not slow" -p no:cacheprovider test_properties.py test_gpart.py)

row() { echo "| $1 | $2 | $3 |" | tee -a "$table"; }

run() { # NAME PYTHON PIP-ARGUMENTS...: the quick tests in an environment of their own
  local name=$1 python=$2 last
  shift 2
  "$python" -m venv "$folder/$name"
  "$folder/$name/bin/pip" install --quiet "$@"
  last=$("$folder/$name/bin/python" -m pytest "${quick[@]}" 2>&1 | tail -n 1) || true
  row "$name" "$("$folder/$name/bin/python" -c '
import platform, torch, numpy
print("Python", platform.python_version(), "torch", torch.__version__, "numpy", numpy.__version__)')" "$last"
}

echo "\`tests/matrix.sh\`, $(uname -m), $(date +%F)" > "$table"
printf '\n| row | versions | quick tests |\n|---|---|---|\n' >> "$table"
for minor in 11 12 13 14; do
  if python=$(command -v "python3.$minor"); then
    run "3.$minor" "$python" -c .ci/constraints.txt -e ".[test]"
  elif pip install --dry-run --quiet --ignore-installed --no-deps --target "$folder/none" \
    --python-version "3.$minor" --only-binary=:all: \
    -r <(grep == .ci/constraints.txt) > /dev/null 2> "$folder/why"; then
    row "3.$minor" "constraints resolve" "not run: no such Python here"
  else
    row "3.$minor" "$(grep -m1 ERROR "$folder/why" || echo "constraints do not resolve")" "not run"
  fi
done
oldest=$(sed -nE 's/^ *"(torch|numpy|safetensors)>=([0-9.]+)".*/\1==\2/p' pyproject.toml)
# shellcheck disable=SC2086
run oldest python3 $oldest pytest hypothesis transformers==4.48 accelerate scikit-learn scipy
