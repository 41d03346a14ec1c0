"""MuJoCo MJX: a pendulum to swing up, in all environments at once by one function of JAX.

Beside the scripts:
    pip install mujoco-mjx
    python ppo_continuous.py --env-id mjx_envs:Swing-v0 --num-envs 32 --num-steps 64
"""

from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx

MODEL = """<mujoco><option timestep="0.05"/><worldbody><body><joint name="hinge" axis="0 1 0"/>
<geom type="capsule" fromto="0 0 0 0 0 -0.5" size="0.05" mass="1" contype="0" conaffinity="0"/>
</body></worldbody><actuator><motor joint="hinge" gear="1"/></actuator></mujoco>"""
model = mjx.put_model(mujoco.MjModel.from_xml_string(MODEL))


def first(key: jax.Array) -> mjx.Data:
    """Return a state with a random angle, at rest."""
    return mjx.make_data(model).replace(qpos=jax.random.uniform(key, (1,), minval=-3.0, maxval=3.0))


@jax.jit
@jax.vmap
def advance(state: mjx.Data, action: jax.Array, key: jax.Array, reset: jax.Array) -> tuple:
    """Step, or reset if the step before ended the episode (NEXT_STEP)."""
    after = mjx.step(model, state.replace(ctrl=action.clip(-1.0, 1.0)))
    state = jax.tree.map(lambda new, old: jnp.where(reset, new, old), first(key), after)
    angle, velocity = state.qpos[0], state.qvel[0]
    obs = jnp.stack([jnp.cos(angle), jnp.sin(angle), velocity])
    return state, obs, jnp.where(reset, 0.0, -jnp.cos(angle))  # upright pays 1


class Swing(gym.vector.VectorEnv):
    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    single_action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, num_envs: int):
        self.num_envs = num_envs

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        self.key, keys = self.split(jax.random.key((seed or 0) % 2**31))
        self.state, self.length = jax.vmap(first)(keys), np.zeros(self.num_envs, int)
        self.done = np.ones(self.num_envs, bool)
        return self.step(np.zeros((self.num_envs, 1), np.float32))[0], {}

    def split(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return a new key and one for each environment."""
        keys = jax.random.split(key, 1 + self.num_envs)
        return keys[0], keys[1:]

    def step(self, actions: np.ndarray) -> tuple[Any, Any, Any, Any, dict]:
        self.key, keys = self.split(self.key)
        self.state, obs, rewards = advance(self.state, actions, keys, self.done)
        self.length = np.where(self.done, 0, self.length + 1)
        self.done = self.length == 200  # a time limit: these episodes are truncated
        return np.asarray(obs), np.asarray(rewards), np.zeros_like(self.done), self.done, {}


gym.register("Swing-v0", vector_entry_point=Swing)
