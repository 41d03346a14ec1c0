#!/usr/bin/env bash
# Every benchmark that has --quick once, with few seeds, rounds and steps: does it all run, is the order of magnitude
# right? Under 15 minutes on 2 cores. Nothing here is for quoting; results go to results/quick/.
#
#     benchmarks/quick.sh                                   # more: --cleanrl PATH --leanrl PATH ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
rm -rf benchmarks/results/quick  # or standing lines would not be measured again
report() { "$python" benchmarks/report.py --table "quick/$1" "${@:2}"; }
for work in cart-pole half-cheetah pong solve; do
    "$python" benchmarks/speed.py --quick --work "$work" "$@"
    report speed.csv --work "$work"
done
"$python" benchmarks/scaling.py --quick
for part in environments profile gae rlhf; do
    report scaling.csv --part "$part"
done
"$python" benchmarks/ablation.py --quick --processes 2
report ablation.csv
"$python" benchmarks/classic.py --quick --processes 2
report classic.csv
"$python" benchmarks/details.py --quick --processes 2
report details.csv
