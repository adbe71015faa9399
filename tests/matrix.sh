#!/usr/bin/env bash
# The quick tests on every Python that is here, and on the oldest versions allowed.
#
#     tests/matrix.sh            # half an hour a row; writes tests/results/matrix.md
#
# Each row has a virtual environment of its own and runs the commit that was checked out
# when the folder (MATRIX) was made. A second call goes on where the first was stopped;
# delete the folder to start anew. For a Python that is not here pip says whether the
# constraints can be had for it, and the row says "not run". The oldest versions are
# pyproject.toml's lower bounds of what gpart.py needs, on the oldest Python that is here;
# train_glue.py's tests are left out there.
set -euo pipefail
cd "$(dirname "$0")/.."
table=$PWD/tests/results/matrix.md
work=${MATRIX:-${TMPDIR:-/tmp}/gpart-matrix}
tree=$work/tree
mkdir -p "$work"
[ -d "$tree" ] || git clone --quiet . "$tree"
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
cd "$tree"

row() { # NAME VERSIONS OUTCOME
  echo "| $1 | $2 | $3 |" | tee "$work/$1.row"
}

run() { # NAME PYTHON TESTS PIP-ARGUMENTS...: the quick tests, unless that row is there
  local name=$1 python=$2 tests=$3 env=$work/$1 last
  shift 3
  [ ! -e "$work/$name.row" ] || return 0
  # pip from outside: Debian's Python has no ensurepip to put one in
  "$python" -m venv --clear --without-pip "$env"
  pip --python "$env/bin/python" install --quiet "$@"
  # shellcheck disable=SC2086
  "$env/bin/python" -m pytest -q -m "not slow" -p no:cacheprovider $tests \
    > "$work/$name.log" 2>&1 || true
  last=$(tail -n 1 "$work/$name.log")
  row "$name" "$("$env/bin/python" -c '
import platform, torch, numpy
print(platform.python_version(), "torch", torch.__version__, "numpy", numpy.__version__)')" \
    "\`$tests\`: ${last//=/}"
}

version() { "$1" -c 'import platform; print(platform.python_version())' 2> /dev/null; }

here=() lowest=3.99
for python in python3.{14..11} python3 /usr/bin/python3 /usr/local/bin/python3 \
  "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3; do
  if found=$(version "$python") && [[ $found =~ ^3\.1[1-4]\. && ! " ${here[*]} " =~ " $found " ]]; then
    here+=("$found")
    if [ "$(printf '%s\n' "$found" "$lowest" | sort -V | head -n 1)" = "$found" ]; then
      lowest=$found oldest_python=$python
    fi
    run "$found" "$python" "test_properties.py test_gpart.py tests" \
      -c .ci/constraints.txt -e ".[test]"
  fi
done
for minor in 11 12 13 14; do
  if [[ " ${here[*]}" == *" 3.$minor."* || -e $work/3.$minor.row ]]; then
    continue
  elif pip install --dry-run --quiet --ignore-installed --no-deps --target "$work/none" \
    --python-version "3.$minor" --only-binary=:all: \
    -r <(grep == .ci/constraints.txt) > /dev/null 2> "$work/why"; then
    row "3.$minor" "the constraints resolve" "not run: no such Python here"
  else
    why=$(grep -m1 "No matching" "$work/why" || echo "the constraints do not resolve")
    row "3.$minor" "$why" "not run: no such Python here"
  fi
done
oldest=$(sed -nE 's/^ *"(torch|numpy|safetensors)>=([0-9.]+)".*/\1==\2/p' pyproject.toml)
# shellcheck disable=SC2086
run oldest "$oldest_python" "test_properties.py test_gpart.py" $oldest pytest hypothesis \
  transformers==4.48 accelerate scikit-learn scipy
{
  echo "\`tests/matrix.sh\` of $(git rev-parse --short HEAD), $(uname -m), $(date +%F)"
  printf '\n| row | versions | quick tests |\n|---|---|---|\n'
  sort -V "$work"/*.row
} > "$table"
