"""Environments whose right answer is known, registered for `gymnasium.make_vec`."""

import builtins
import multiprocessing
import os
import random
import signal

import gymnasium as gym
import numpy as np
from gymnasium.spaces import (
    Box,
    Dict,
    Discrete,
    Graph,
    MultiBinary,
    MultiDiscrete,
    Sequence,
    Text,
    Tuple,
)

MARK = 9.0  # the observation of an episode's end in `Poison`, seen nowhere else


class Identity(gym.Env):
    """Reward 1 for the action that the observation shows; 10 steps, so the best return is 10."""

    action_space = Discrete(3)
    observation_space = Box(0.0, 1.0, (3,), np.float32)

    def _observe(self):
        self.target = int(self.np_random.integers(3))
        return np.eye(3, dtype=np.float32)[self.target]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        reward = float(action == self.target)
        self.steps += 1
        return self._observe(), reward, self.steps == 10, False, {}


class OffsetIdentity(Identity):
    """The same with the actions 5, 6, 7."""

    action_space = Discrete(3, start=5)

    def step(self, action):
        assert self.action_space.contains(np.int64(action))
        return super().step(action - 5)


class Dial(gym.Env):
    """Its observation is the sum of all actions, -5 to `choices` - 6; 40 steps."""

    observation_space = Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, choices: int = 300):
        self.action_space = Discrete(choices, start=-5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sum, self.steps = self.np_random.normal(), 0
        return np.array([self.sum / 100], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(np.int64(action))
        self.sum += action
        self.steps += 1
        return np.array([self.sum / 100], np.float32), -abs(self.sum), False, self.steps == 40, {}


class Constant(gym.Env):
    """Reward 1 for any action, for `length` steps; the observation is the step's one-hot.

    With `truncate` only a time limit ends the episode and the observation never changes, so that
    V = 1 / (1 - gamma) everywhere; without, V(step k) = 1 + gamma + ... with length - k terms.
    """

    action_space = Discrete(2)
    observation_space = Box(0.0, 1.0, (6,), np.float32)

    def __init__(self, length: int = 5, truncate: bool = False):
        self.length, self.truncate = length, truncate

    def _observe(self):
        return np.eye(6, dtype=np.float32)[0 if self.truncate else self.steps]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        over = self.steps == self.length
        return self._observe(), 1.0, over and not self.truncate, over and self.truncate, {}


class Poison(gym.vector.VectorEnv):
    """Episodes of 3 steps with reward 1; the reset row pays 1e6 and starts from the marked obs."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    single_action_space = Discrete(2)
    single_observation_space = Box(-10.0, 10.0, (2,), np.float32)

    def __init__(self, num_envs: int = 1, max_episode_steps: int | None = None):
        self.num_envs = num_envs

    def _observe(self):
        marked = np.where(self.steps == 3, MARK, 0.1 * self.steps)
        return np.stack([marked, np.ones(self.num_envs)], axis=1).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = np.arange(self.num_envs) % 3  # so that the episodes end in different rows
        return self._observe(), {}

    def step(self, actions):
        reset = self.steps == 3
        self.steps = np.where(reset, 0, self.steps + 1)
        reward = np.where(reset, 1e6, 1.0)
        truncated = self.steps == 3
        return self._observe(), reward, np.zeros(self.num_envs, bool), truncated, {}


class Broken(Identity):
    """Gives what is not a number: a reward or an observation, after 50 steps."""

    def __init__(self, what: str = "reward"):
        self.what, self.total = what, 0

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.total += 1
        if self.total > 50:
            if self.what == "reward":
                reward = float("nan")
            else:
                obs = np.full_like(obs, np.inf)
        return obs, reward, terminated, truncated, info


class Dies(Identity):
    """Kills its own process after 50 steps, as a simulator or the kernel may."""

    def step(self, action):
        self.total = getattr(self, "total", 0) + 1
        if self.total > 50:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class NestedIdentity(Identity):
    """`Identity` with the target in a Dict of a Tuple of a Discrete and a matrix."""

    observation_space = Dict({"a": Tuple((Discrete(3), Discrete(2))), "b": Box(0.0, 1.0, (2, 2))})

    def _observe(self):
        super()._observe()
        return {"a": (self.target, 1), "b": np.ones((2, 2), np.float32)}


class Matrix(Identity):
    """`Identity` with its observation as a column."""

    observation_space = Box(0.0, 1.0, (3, 1), np.float32)

    def _observe(self):
        return super()._observe()[:, None]


class Factors(Identity):
    """`Identity` with its observation as a MultiDiscrete: the target, and a number of four."""

    observation_space = MultiDiscrete([3, 4])

    def _observe(self):
        super()._observe()
        return np.array([self.target, 2])


class Endless(Identity):
    """`Identity` with observations of any length."""

    observation_space = Sequence(Discrete(3))

    def _observe(self):
        super()._observe()
        return (self.target,)


class TwoActions(Identity):
    """An action space that no script here serves."""

    action_space = Tuple((Discrete(2), Discrete(2)))


class Masked(Identity):
    """`Identity` with five actions, of which the target and one more are legal in each state.

    At an episode's end none is. `wrong` makes the mask so earlier, or too short.
    """

    action_space = Discrete(5)

    def __init__(self, wrong: str = ""):
        self.wrong = wrong

    def legal(self) -> np.ndarray:
        mask = np.zeros(5, np.int8)
        if self.steps < 10 and not (self.wrong == "none" and self.steps == 5):
            mask[[self.target, 3 + self.target % 2]] = 1
        return mask[:4] if self.wrong == "short" else mask

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return obs, info | {"action_mask": self.legal()}

    def step(self, action):
        assert self.legal()[action], "an illegal action"
        *step, info = super().step(action)
        return *step, info | {"action_mask": self.legal()}


class MaskedByMethod(Masked):
    """The same, told by a method, as sb3-contrib's environments do."""

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0], {}

    def step(self, action):
        return *super().step(action)[:-1], {}

    def action_masks(self) -> list[bool]:
        return self.legal().astype(bool).tolist()


class Parts(Identity):
    """Half a reward for each part of the action that the observation shows: of 2 and of 3."""

    action_space = MultiDiscrete([2, 3], start=[0, 4])
    observation_space = Box(0.0, 1.0, (5,), np.float32)

    def _observe(self):
        self.target = self.np_random.integers([0, 4], [2, 7])
        return np.eye(5, dtype=np.float32)[[self.target[0], self.target[1] - 2]].sum(0)

    def step(self, action):
        assert self.action_space.contains(action), action
        reward = float((action == self.target).mean())
        self.steps += 1
        return self._observe(), reward, self.steps == 10, False, {}


class Bits(Parts):
    """The same for three bits in a row."""

    action_space = MultiBinary((1, 3))
    observation_space = Box(0.0, 1.0, (3,), np.float32)

    def _observe(self):
        self.target = self.np_random.integers(2, size=(1, 3), dtype=np.int8)
        return self.target[0].astype(np.float32)


class Picture(Identity):
    """`Identity` whose observation is a picture with a bright bar at the left, middle or right."""

    observation_space = Box(0, 255, (42, 60, 3), np.uint8)

    def _observe(self):
        super()._observe()
        picture = np.zeros(self.observation_space.shape, np.uint8)
        picture[:, 20 * self.target : 20 * self.target + 20] = 200
        return picture


class GreyPicture(Picture):
    """The same without colours."""

    observation_space = Box(0, 255, (42, 60), np.uint8)


class OneChannelPicture(Picture):
    """The same with an axis for its one channel."""

    observation_space = Box(0, 255, (42, 60, 1), np.uint8)


class Film(Identity):
    """Two pictures in colour at a time, which no network here takes."""

    observation_space = Box(0, 255, (2, 42, 60, 3), np.uint8)


class FourChannelPicture(Picture):
    """The same with transparency, which is no picture that can be made grey."""

    observation_space = Box(0, 255, (42, 60, 4), np.uint8)


class Lives(gym.vector.VectorEnv):
    """One game after another of 4 steps, worth 3 each; after two of them one of two lives is lost.

    As ALE's: the episode goes on after the first, and the step after its end is the reset.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    single_action_space = Discrete(2)
    single_observation_space = Box(0.0, 1.0, (5,), np.float32)

    def __init__(self, num_envs: int = 1):
        self.num_envs = num_envs

    def _observe(self):
        return np.eye(5, dtype=np.float32)[self.steps]

    def _info(self):
        return {"lives": 2 - self.steps // 2}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = np.arange(self.num_envs) % 4
        return self._observe(), self._info()

    def step(self, actions):
        reset = self.steps == 4
        self.steps = np.where(reset, 0, self.steps + 1)
        reward, over = np.where(reset, 0.0, 3.0), self.steps == 4
        return self._observe(), reward, over, np.zeros(self.num_envs, bool), self._info()


class SameStep(Poison):
    """A vector environment that resets within the step."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}


for cls in (Identity, OffsetIdentity, Dial, Constant, Broken, Dies, NestedIdentity):
    gym.register(id=f"test/{cls.__name__}-v0", entry_point=cls)
for cls in (Matrix, Factors, Endless, Film, TwoActions):
    gym.register(id=f"test/{cls.__name__}-v0", entry_point=cls)
for cls in (Masked, MaskedByMethod, Parts, Bits):
    gym.register(id=f"test/{cls.__name__}-v0", entry_point=cls)
for cls in (Picture, GreyPicture, OneChannelPicture, FourChannelPicture):
    gym.register(id=f"test/{cls.__name__}-v0", entry_point=cls)
for cls in (Poison, SameStep, Lives):
    gym.register(id=f"test/{cls.__name__}-v0", vector_entry_point=cls)


class Target(gym.Env):
    """Pays minus the squared distance between the action and what is observed; the best is 0."""

    action_space = Box(-1.0, 1.0, (2,), np.float32)
    observation_space = Box(-1.0, 1.0, (2,), np.float32)

    def _observe(self):
        self.target = self.np_random.uniform(-0.5, 0.5, 2).astype(np.float32)
        return self.target

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        reward = -float(np.square(action - self.target).sum())
        self.steps += 1
        return self._observe(), reward, self.steps == 10, False, {}


class WideTarget(Target):
    """The same, repeated until the observation has 4 x 17 numbers."""

    observation_space = Box(-1.0, 1.0, (68,), np.float32)

    def _observe(self):
        return np.tile(super()._observe(), 34)


class UnboundedTarget(Target):
    """The same with actions that may be anything."""

    action_space = Box(-np.inf, np.inf, (2,), np.float32)


class HalfBoundedTarget(Target):
    """The same with actions that have a lower bound only."""

    action_space = Box(np.float32([0.0, -0.4]), np.float32([np.inf, 0.4]))


class WholeTarget(Target):
    """The same with whole numbers for actions."""

    action_space = Box(-128, 127, (2,), np.int8)


class PoisonBox(Poison):
    """`Poison` with a continuous action."""

    single_action_space = Box(-1.0, 1.0, (1,), np.float32)


for cls in (Target, WideTarget, UnboundedTarget, HalfBoundedTarget, WholeTarget):
    gym.register(id=f"test/{cls.__name__}-v0", entry_point=cls)
gym.register(id="test/PoisonBox-v0", vector_entry_point=PoisonBox)


class Frames(Identity):
    """`Identity` whose observation is four equal grey frames with a bright bar, (4, 36, 36)."""

    observation_space = Box(0, 255, (4, 36, 36), np.uint8)

    def _observe(self):
        super()._observe()
        frames = np.zeros((4, 36, 36), np.uint8)
        frames[:, :, 12 * self.target : 12 * self.target + 12] = 200
        return frames


class FramesLast(Frames):
    """The same with the frames on the last axis."""

    observation_space = Box(0, 255, (36, 36, 4), np.uint8)

    def _observe(self):
        return np.moveaxis(super()._observe(), 0, -1)


class LivesFrames(Lives):
    """`Lives` with frames whose brightness is 20 times the step."""

    single_observation_space = Box(0, 255, (4, 36, 36), np.uint8)

    def _observe(self):
        return np.tile((20 * self.steps).astype(np.uint8)[:, None, None, None], (1, 4, 36, 36))


class PoisonFrames(Poison):
    """`Poison` with frames whose brightness is 10 times what `Poison` shows: 0 to 2, or 90."""

    single_observation_space = Box(0, 255, (4, 36, 36), np.uint8)

    def _observe(self):
        shown = (10 * super()._observe()[:, 0]).round().astype(np.uint8)
        return np.tile(shown[:, None, None, None], (1, 4, 36, 36))


for cls in (Frames, FramesLast):
    gym.register(id=f"test/{cls.__name__}-v0", entry_point=cls)
for cls in (LivesFrames, PoisonFrames):
    gym.register(id=f"test/{cls.__name__}-v0", vector_entry_point=cls)


class ConstantBox(Constant):
    """`Constant` with a continuous action."""

    action_space = Box(-1.0, 1.0, (1,), np.float32)


gym.register(id="test/ConstantBox-v0", entry_point=ConstantBox)


class Raises(Identity):
    """Raises `error` in its constructor, reset, step, close, or in the constructor of a worker."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, where: str = "step", error: str = "ZeroDivisionError", render_mode=None):
        self.render_mode = render_mode
        self.where, self.error, self.total = where, getattr(builtins, error), 0
        if where == "init" or (where == "worker" and multiprocessing.parent_process()):
            raise self.error("of my own")
        if where == "inner":
            gym.make("CartPol-v1")  # Gymnasium raises, called by an environment

    def reset(self, **kwargs):
        if self.where == "reset":
            raise self.error("of my own")
        return super().reset(**kwargs)

    def step(self, action):
        self.total += 1
        if self.where in ("close", "step") and self.total > 20:
            raise self.error("of my own")
        return super().step(action)

    def close(self):
        if self.where == "close":
            raise self.error("while closing")


class Unpicklable(Exception):
    """An error that a worker cannot send to the main process, as it is."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} {second}")


class RaisesUnpicklable(Identity):
    """Raises `Unpicklable` in one of its methods."""

    def __init__(self, where: str):
        self.where = where

    def reset(self, **kwargs):
        if self.where == "reset":
            raise Unpicklable("of my", "own")
        return super().reset(**kwargs)

    def step(self, action):
        if self.where == "step":
            raise Unpicklable("of my", "own")
        return super().step(action)

    def action_masks(self) -> list[bool]:
        if self.where == "action_masks":
            raise Unpicklable("of my", "own")
        return [True] * self.action_space.n


gym.register(id="test/RaisesUnpicklable-v0", entry_point=RaisesUnpicklable)


class Drawn(Constant):
    """`Constant` that draws a picture of 16 x 16."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, length: int = 5, render_mode: str | None = None):
        super().__init__(length)
        self.render_mode = render_mode

    def _observe(self):
        return np.eye(6, dtype=np.float32)[self.steps % 6]

    def render(self):
        return np.full((16, 16, 3), self.steps % 256, np.uint8)


class ShortOrLong(Constant):
    """`Constant` with episodes of 3 steps or 60 at even odds, so that the mean return is 31.5."""

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        self.length = int(self.np_random.choice([3, 60]))
        return obs, info

    def _observe(self):
        return np.eye(6, dtype=np.float32)[self.steps % 6]


class GlobalNoise(Identity):
    """`Identity` that adds random numbers of Python's and NumPy's global generators."""

    def _observe(self):
        noise = np.float32(0.1 * random.random() + 0.1 * np.random.rand())
        return super()._observe() * (1 - noise)


class MaskedInObs(Masked):
    """`Masked`, told within the observation, as PettingZoo's environments do."""

    observation_space = Dict(
        {"observation": Masked.observation_space, "action_mask": Box(0, 1, (5,), np.int8)}
    )

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return {"observation": obs, "action_mask": info.pop("action_mask")}, info

    def step(self, action):
        obs, *step, info = super().step(action)
        return {"observation": obs, "action_mask": info.pop("action_mask")}, *step, info


class MaskedAdditively(Masked):
    """`Masked`, told by what to add to the logits: 0 for a legal action, else minus infinity."""

    def legal(self) -> np.ndarray:
        return np.where(super().legal(), 0.0, -np.inf)

    def step(self, action):
        return *Identity.step(self, action)[:-1], {"action_mask": self.legal()}


class MaskedVector(gym.vector.VectorEnv):
    """Episodes of 4 steps that pay 1 for the one legal action, told by `action_masks()` (N, 3)."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    single_action_space = Discrete(3)
    single_observation_space = Box(0.0, 4.0, (1,), np.float32)

    def __init__(self, num_envs: int = 1):
        self.num_envs = num_envs

    def action_masks(self) -> np.ndarray:
        return np.eye(3, dtype=bool)[(self.steps + np.arange(self.num_envs)) % 3]

    def _observe(self):
        return self.steps[:, None].astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = np.arange(self.num_envs) % 4
        return self._observe(), {}

    def step(self, actions):
        over = self.steps == 4
        legal = self.action_masks()[np.arange(self.num_envs), actions]
        assert (legal | over).all(), "an illegal action"
        self.steps = np.where(over, 0, self.steps + 1)
        done = self.steps == 4
        return self._observe(), np.ones(self.num_envs), done, np.zeros(self.num_envs, bool), {}


class NanLater(Constant):
    """`Constant` whose reward is not a number in an episode's last step, the 40th."""

    def __init__(self):
        super().__init__(length=40)

    def _observe(self):
        return np.eye(6, dtype=np.float32)[self.steps % 6]

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, float("nan") if terminated else reward, terminated, truncated, info


class Shown(Identity):
    """`Identity` with an observation space of one's own, which `space` names."""

    spaces = {
        "image": Box(0, 255, (64, 48, 3), np.uint8),
        "channels_first": Box(0, 255, (4, 84, 84), np.uint8),
        "channels_last": Box(0, 255, (84, 84, 4), np.uint8),
        "grey": Box(0, 255, (84, 84), np.uint8),
        "floats": Box(0.0, 1.0, (3, 64, 64), np.float32),
        "dict": Dict({"speed": Box(0.0, 1.0, (3,)), "camera": Box(0, 255, (64, 64, 3), np.uint8)}),
        "tuple": Tuple((Discrete(3), Dict({"eye": Box(0.0, 1.0, (64, 64), np.float32)}))),
        "text": Dict({"mission": Text(20), "at": Discrete(3)}),
        "sequence": Tuple((Discrete(3), Sequence(Discrete(3)))),
        "graph": Graph(Box(0.0, 1.0, (2,)), Discrete(3)),
    }

    def __init__(self, space: str):
        self.observation_space = self.spaces[space]

    def _observe(self):
        super()._observe()
        return self.observation_space.sample()


for cls in (Raises, Drawn, ShortOrLong, GlobalNoise, MaskedInObs, MaskedAdditively):
    gym.register(id=f"test/{cls.__name__}-v0", entry_point=cls)
for cls in (NanLater, Shown):
    gym.register(id=f"test/{cls.__name__}-v0", entry_point=cls)
gym.register(id="test/MaskedVector-v0", vector_entry_point=MaskedVector)


class PictureInDict(Picture):
    """The same beside a number."""

    observation_space = Dict({"number": Discrete(2), "picture": Picture.observation_space})

    def _observe(self):
        return {"number": 1, "picture": super()._observe()}


gym.register(id="test/PictureInDict-v0", entry_point=PictureInDict)


class BoxPicture(Picture):
    """`Picture` with a continuous action."""

    action_space = Box(-1.0, 1.0, (1,), np.float32)


gym.register(id="test/BoxPicture-v0", entry_point=BoxPicture)


class FloatPicture(Picture):
    """`Picture` with numbers from 0 to 1."""

    observation_space = Box(0.0, 1.0, (42, 60, 3), np.float32)

    def _observe(self):
        return super()._observe().astype(np.float32) / 255.0


class FloatFrames(FloatPicture):
    """The same as a stack of frames, which needs no wrapper."""

    observation_space = Box(0.0, 1.0, (4, 42, 60), np.float32)


class MaskedFrames(Masked, Frames):
    """`Masked` with the observations of `Frames`."""


class PartsFrames(Parts):
    """`Parts` whose observation is a bright field: high or low; left, in the middle or right."""

    observation_space = Box(0, 255, (4, 36, 36), np.uint8)

    def _observe(self):
        super()._observe()
        top, left = 18 * self.target[0], 12 * (self.target[1] - 4)
        frames = np.zeros((4, 36, 36), np.uint8)
        frames[:, top : top + 18, left : left + 12] = 200
        return frames


for cls in (FloatPicture, FloatFrames, MaskedFrames, PartsFrames):
    gym.register(id=f"test/{cls.__name__}-v0", entry_point=cls)


class ShownBox(Shown):
    """`Shown` with continuous actions."""

    action_space = Box(-1.0, 1.0, (2,), np.float32)


class Bytes(Identity):
    """`Identity` that shows 200 instead of 1, as bytes."""

    observation_space = Box(0, 255, (3,), np.uint8)

    def _observe(self):
        return (200 * super()._observe()).astype(np.uint8)


class NoActions(Target):
    """A box of no actions at all."""

    action_space = Box(-1.0, 1.0, (0,), np.float32)


for cls in (ShownBox, Bytes, NoActions):
    gym.register(id=f"test/{cls.__name__}-v0", entry_point=cls)


class FloatFramesLast(FloatPicture):
    """`FloatPicture` as a stack of frames with the frames on the last axis."""

    observation_space = Box(0.0, 1.0, (42, 60, 4), np.float32)


class NarrowFrames(FloatFramesLast):
    """Its numbers from 0 to 1 are bytes."""

    observation_space = Box(0, 1, (42, 60, 4), np.uint8)

    def _observe(self):
        return super()._observe().astype(np.uint8)


class VectorFramesLast(gym.vector.SyncVectorEnv):
    """`FramesLast` as a simulator that makes all environments itself."""

    def __init__(self, num_envs: int = 1):
        super().__init__([FramesLast] * num_envs)


gym.register(id="test/FloatFramesLast-v0", entry_point=FloatFramesLast)
gym.register(id="test/NarrowFrames-v0", entry_point=NarrowFrames)
gym.register(id="test/VectorFramesLast-v0", vector_entry_point=VectorFramesLast)


class Half(Target):
    """Shows a picture whose left or right half is bright; the action should be -1 or 1."""

    action_space = Box(-1.0, 1.0, (1,), np.float32)
    observation_space = Box(0, 255, (64, 64, 3), np.uint8)

    def _observe(self):
        side = int(self.np_random.integers(2))
        self.target = np.float32([2.0 * side - 1.0])
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[:, 32 * side : 32 * side + 32] = 255
        return picture


gym.register(id="test/Half-v0", entry_point=Half)
