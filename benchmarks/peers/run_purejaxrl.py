"""Run the work of benchmarks/speed.py with PureJaxRL's ppo.py, from the checkout named second.

All of the training is one compiled program, so there are two ticks: before its first step, after
importing and compiling, and after its last. Its wrappers.py imports brax and navix for other
environments than CartPole; empty modules stand in for them. Its time limit counts as death.
"""

import sys
from types import ModuleType

from common import settings, tick

s = settings()
names = ("brax", "brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training", "navix")
for name in names:
    sys.modules[name] = ModuleType(name)
sys.modules["brax"].envs = sys.modules["brax.envs"]
sys.modules["brax.envs.wrappers.training"].EpisodeWrapper = object
sys.modules["brax.envs.wrappers.training"].AutoResetWrapper = object
sys.path.insert(0, sys.argv[2])

import jax  # noqa: E402
from ppo import ActorCritic, make_train  # noqa: E402

config = {
    "LR": s.learning_rate,
    "NUM_ENVS": s.num_envs,
    "NUM_STEPS": s.num_steps,
    "TOTAL_TIMESTEPS": s.num_iterations * s.batch_size,
    "UPDATE_EPOCHS": s.update_epochs,
    "NUM_MINIBATCHES": s.num_minibatches,
    "GAMMA": s.gamma,
    "GAE_LAMBDA": s.gae_lambda,
    "CLIP_EPS": s.clip_coef,
    "ENT_COEF": s.ent_coef,
    "VF_COEF": s.vf_coef,
    "MAX_GRAD_NORM": s.max_grad_norm,
    "ACTIVATION": s.activation,
    "ENV_NAME": s.env_id,
    "ANNEAL_LR": True,
    "DEBUG": False,
}
key = jax.random.PRNGKey(s.seed)
train = jax.jit(make_train(config)).lower(key).compile()
tick(0)
parameters = jax.block_until_ready(train(key))["runner_state"][0].params
network = ActorCritic(2, activation=s.activation)


@jax.jit
def likeliest(obs):
    return network.apply(parameters, obs)[0].logits.argmax(-1)


tick(config["TOTAL_TIMESTEPS"], likeliest)
