#!/usr/bin/env bash
# Mutation testing: does any test notice when a file is changed?
#
#     pip install mutmut==3.8.1
#     tests/mutants.sh gpart                                    # every mutant
#     tests/mutants.sh train_glue --sample 300 --seed 0         # 300 of them
#
# What follows the name goes to mutants.py. Written to tests/results/mutants-NAME.md. A
# second call goes on where the first was stopped; delete the folder (MUTANTS) to start
# anew.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?gpart or train_glue}
work=${MUTANTS:-${TMPDIR:-/tmp}/gpart-mutants}/$name
result=tests/results/mutants-$name.md
python tests/mutants.py "$name" "$work" "${@:2}" > "$result.tmp" || status=$?
mv "$result.tmp" "$result"
cat "$result"
exit "${status:-0}"
