#!/usr/bin/env bash
# Make an environment for each peer that benchmarks/speed.py measures, about 1 GB each.
#
#     benchmarks/peers/install.sh                # all of them, in .venv-peers
#     benchmarks/peers/install.sh sb3 tianshou   # some of them
#
# The same PyTorch and Gymnasium in each, those of constraints.txt. CleanRL, LeanRL and PureJaxRL
# are no packages: these are what their scripts need, the checkouts are named to speed.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
torch=$(grep -E '^torch==' constraints.txt)
gymnasium=$(grep -E '^gymnasium==' constraints.txt)
gymnasium="gymnasium[mujoco]${gymnasium#gymnasium}"
declare -A packages=(
    [sb3]="$torch stable-baselines3==2.9.2 tensorboard"
    [tianshou]="$torch tianshou==2.0.1" # needs Python 3.11 or newer
    [torchrl]="$torch torchrl==0.14.1 tensorboard"
    [skrl]="$torch skrl==2.1.1 tensorboard"
    [rlox]="$torch rlox==1.2.0 tensorboard"
    [sbx]="$torch sbx-rl==0.28.0 tensorboard"
    [cleanrl]="$torch tensorboard tyro ale-py==0.12.1 opencv-python-headless==5.0.0.93"
    [leanrl]="$torch tensordict==0.14.3 tyro tqdm"
    [purejaxrl]="jax[cpu]==0.10.2 flax==0.12.8 optax==0.2.8 distrax==0.1.9 gymnax==0.0.9"
)
for peer in ${@:-sb3 tianshou torchrl skrl rlox sbx cleanrl leanrl purejaxrl}; do
    echo "+ $peer: $gymnasium ${packages[$peer]}"
    "$python" -m venv ".venv-peers/$peer"
    # shellcheck disable=SC2086
    ".venv-peers/$peer/bin/pip" install -q "$gymnasium" ${packages[$peer]} ||
        echo "$peer does not install here: speed.py will leave it out" >&2
done
