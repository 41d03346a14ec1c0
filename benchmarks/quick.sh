#!/usr/bin/env bash
# Run every benchmark that has --quick once: does it all run, is the order of magnitude right? Under 15 minutes on
# 2 cores. Nothing here is for quoting; results go to benchmarks/results/quick/.
#
#     benchmarks/quick.sh                                   # more: --cleanrl PATH --leanrl PATH ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
rm -rf benchmarks/results/quick  # or the lines in there would not be measured again
print_table() { "$python" -m benchmarks.tables --results benchmarks/results/quick --table "$@"; }
for work in cart-pole half-cheetah pong solve; do
    "$python" -m benchmarks.speed --quick --work "$work" "$@"
    print_table speed.csv --part "$work"
done
"$python" -m benchmarks.scaling --quick
for part in environments profile gae rlhf; do
    print_table scaling.csv --part "$part"
done
for name in ablation classic details; do
    "$python" -m "benchmarks.$name" --quick --processes 2
    print_table "$name.csv"
done
