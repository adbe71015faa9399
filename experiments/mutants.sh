#!/usr/bin/env bash
# Mutation testing: does any test notice when gpart.py is changed? About 15 minutes on two cores:
#
#     pip install mutmut==3.8.1 && experiments/mutants.sh
#
# mutmut 3 changes one expression at a time and runs the quick tests that reach it; then the bugs
# named in mutants.py go in by hand, each against all of them. Written to results/mutants.md. A
# second call goes on where the first was stopped; delete the folder (MUTANTS) to start anew.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${MUTANTS:-${TMPDIR:-/tmp}/gpart-mutants}
export HYPOTHESIS_PROFILE=quick HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
mkdir -p "$work" experiments/results
cp -r test_gpart.py test_properties.py train_glue.py toy_glue "$work"
python experiments/mutants.py prepare "$work"
(cd "$work" && mutmut run --max-children 2)
python experiments/mutants.py report "$work" | tee experiments/results/mutants.md
