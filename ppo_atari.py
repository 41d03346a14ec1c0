# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "gymnasium>=1.1", "numpy", "tensorboard", "tyro", "tqdm"]
# ///
"""PPO for images and discrete actions, in one file that reads from top to bottom.

    python ppo_atari.py --env-id ALE/Pong-v5    # pip install "gymnasium[atari]"

Each iteration of `train` has four parts:
    [1] Rollout     the policy plays T steps in each of N environments
    [2] Advantages  the critic values every observation, GAE turns rewards into advantages
    [3] Update      K epochs of minibatches: clipped surrogate, value loss, entropy bonus
    [4] Log         averages over the iteration

Shapes: T num_steps, N num_envs, (C, H, W) an image, F its features, B transitions in a batch or a
minibatch, P parts of an action (1 if the space is Discrete), A choices of the part with the most.

Environments reset one step late (Gymnasium's NEXT_STEP autoreset). If an episode ends in row t,
obs[t + 1] is its true last observation, and row t + 1 only resets the environment: its action is
ignored, so it is not a transition and stays out of the batch. obs[t + 2] starts the next episode.

What is not PPO (run folder, checkpoints, evaluation, command line) is in experiment.py.
Papers: PPO (Schulman et al. 2017, arXiv 1707.06347), GAE (Schulman et al. 2016, arXiv 1506.02438).
"Detail n" is a number in "The 37 Implementation Details of PPO" (Huang et al. 2022).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

import experiment
from experiment import Choices, EnvArgs, UserError, is_image
from gae import gae


@dataclass
class Args(EnvArgs):
    """Train a PPO agent on images, such as those of Atari games, then evaluate it."""

    env_id: str = "ALE/Pong-v5"  # Gymnasium environment; module:Name-v0 imports the module first.
    total_timesteps: int = 10_000_000  # Total steps over all environments.
    num_envs: int = 8  # N: environments that run in parallel.
    num_steps: int = 128  # T: steps per environment and rollout.
    learning_rate: float = 2.5e-4  # Adam's initial learning rate.
    anneal_lr: bool = True  # Lower the learning rate linearly to 0 (detail 4).
    update_epochs: int = 4  # K: passes over the batch per update.
    num_minibatches: int = 4  # Minibatches per pass over the batch.
    gamma: float = 0.99  # Discount factor.
    gae_lambda: float = 0.95  # Lambda of GAE: 0 trusts the critic, 1 trusts the rewards.
    norm_adv: Literal["batch", "minibatch", "none"] = "batch"  # Rows over which to normalise.
    objective: Literal["clip", "penalty"] = "clip"  # PPO-Clip (eq. 7) or PPO-Penalty (eq. 8).
    clip_coef: float = 0.1  # Epsilon: moving the ratio further than this from 1 gains nothing.
    clip_vloss: bool = False  # Limit the change in the value to clip_coef as well (detail 9).
    ent_coef: float = 0.01  # Weight of the entropy bonus.
    vf_coef: float = 0.5  # Weight of the value loss.
    max_grad_norm: float = 0.5  # The gradient's global norm is clipped to this (detail 11).
    target_kl: float | None = None  # KL that ends an update. Penalty: KL to aim for, 0.01 if None.
    kl_coef: float = 1.0  # With penalty: the initial KL coefficient (beta).
    sign_rewards: bool = True  # Learn only from the sign of each reward (detail 19).
    life_loss: bool = True  # In the advantages, a lost life ends the episode (detail 16).
    hidden_size: int = 512  # F: units of the layer on top of the convolutions.
    eval_episodes: int = 10  # Episodes of each final evaluation, deterministic and stochastic.

    fixed, wants_gpu = "env_id kl_coef hidden_size", True  # kept by --resume, --evaluate
    infos = "lives"  # parts of the info to keep, besides masks; joining all of it is slow

    def check(self) -> None:
        """Raise `UserError`, which names the flag, for an invalid value."""
        super().check()
        self.check_range("update_epochs num_minibatches hidden_size", 1)
        self.check_range("gamma gae_lambda", 0, 1)
        self.check_range("ent_coef vf_coef", 0)
        self.check_range("learning_rate clip_coef max_grad_norm target_kl kl_coef", 1e-12)
        envs = self.num_envs // experiment.world_size()
        if envs * (self.num_steps // 2) < 2 * self.num_minibatches:  # half may be resets
            batch = f"{envs} environments with --num-steps {self.num_steps}"
            raise UserError(f"{batch} are too few for --num-minibatches {self.num_minibatches}")


class Batch(NamedTuple):
    """The transitions of a rollout, or a minibatch of them."""

    obs: Tensor  # (B, C, H, W), bytes
    actions: Tensor  # (B, P)
    masks: Tensor  # (B, P, A), added to the logits: 0 for a legal choice, -1e9 for any other
    log_probs: Tensor  # (B,), of the actions, under the policy that took them
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,), targets of the critic
    values: Tensor  # (B,), the critic's estimates before the update


def prepare(env: Any) -> Any:
    """Turn images (H, W[, 1 or 3]) into four grey frames, 84 x 84 (details 18, 20)."""
    space, shape = env.observation_space, env.observation_space.shape
    if space.dtype == np.uint8 and is_image(shape) and (len(shape) == 2 or shape[2] in (1, 3)):
        env = gym.wrappers.GrayscaleObservation(env) if shape[2:] == (3,) else env
        env = gym.wrappers.ReshapeObservation(env, shape[:2])
        env = gym.wrappers.ResizeObservation(env, (84, 84))
        env = gym.wrappers.FrameStackObservation(env, 4)
    return env


def make_envs(args: Args, num_envs: int, **kwargs: Any) -> gym.vector.VectorEnv:
    """Make environments with images of bytes (N, C, H, W) and discrete actions."""
    if "ALE/" in args.env_id and args.vectorization_mode in (None, "vector_entry_point"):
        kwargs = {"reward_clipping": False, "wrap": None} | kwargs  # --sign-rewards clips instead
        kwargs.pop("render_mode", None)  # they cannot render: a video shows what the agent sees
    envs = experiment.make_vec(args, num_envs, **{"wrap": prepare, **kwargs})
    space: Any = envs.single_observation_space
    if space.dtype != np.uint8 or not is_image(space.shape, (3,)) or 255 not in space.high:
        experiment.refuse(args, envs, f"its observations are {space}, not images of bytes")
    if not isinstance(envs.single_action_space, Choices.SPACES):
        experiment.refuse(args, envs, f"its actions are {envs.single_action_space}, not discrete")
    if space.shape[2] < space.shape[0]:  # (N, H, W, C)
        moved = gym.spaces.Box(0, 255, (space.shape[2], *space.shape[:2]), dtype=space.dtype)
        transform = gym.wrappers.vector.TransformObservation
        envs = transform(envs, lambda x: np.moveaxis(x, -1, 1), single_observation_space=moved)
    return envs


def orthogonal(layer: Any, gain: float) -> Any:
    """Return a layer with orthogonal weights and zero biases (detail 2)."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class NatureCNN(nn.Sequential):
    """The network of the Nature DQN paper: images (B, C, H, W) to features (B, F)."""

    def __init__(self, shape: tuple[int, ...], width: int):
        relu: Any = nn.ReLU(inplace=True)
        layers = [nn.Conv2d(shape[0], 32, 8, stride=4), relu, nn.Conv2d(32, 64, 4, stride=2), relu]
        layers += [nn.Conv2d(64, 64, 3), relu, nn.Flatten()]
        size = nn.Sequential(*layers)(torch.zeros(1, *shape)).numel()
        super().__init__(*layers, nn.Linear(size, width), relu)
        for layer in (*layers[:5:2], self[-2]):
            orthogonal(layer, math.sqrt(2.0))

    def forward(self, images: Tensor) -> Tensor:
        """Return features of bytes / 255 (detail 22). Channels last is a fifth faster on a CPU."""
        x = images.contiguous(memory_format=torch.channels_last)
        return super().forward(x.float().div_(255.0))


class Agent(nn.Module):
    """The policy (actor) and the value function (critic), two heads of one CNN (detail 21)."""

    def __init__(self, args: Args, envs: Any):
        super().__init__()
        self.choices = Choices(envs.single_action_space)
        self.obs_shape = envs.single_observation_space.shape
        # A network of your own goes here, without dropout or batch norm: rollout and update use it.
        self.trunk = NatureCNN(self.obs_shape, args.hidden_size)
        num_logits = math.prod(self.choices.shape)
        # The small gain makes the first policy almost uniform.
        self.actor = nn.Sequential(orthogonal(nn.Linear(args.hidden_size, num_logits), 0.01))
        self.critic = nn.Sequential(orthogonal(nn.Linear(args.hidden_size, 1), 1.0))
        self.kl_coef = nn.Buffer(torch.tensor(args.kl_coef))  # beta of PPO-Penalty

    def see(self, images: Tensor) -> Tensor:
        """Return the features (N, F) of images, without gradients, for the actor and the critic."""
        with torch.no_grad():
            return self.trunk(images)

    def policy(self) -> Callable[..., np.ndarray]:
        """Return the current policy, a function (features (N, F), masks, rng) -> actions (N, P).

        argmax(logits + Gumbel noise) samples from softmax(logits); without `rng`, it is the mode.
        """

        def choose(features: Tensor, masks: np.ndarray, rng: Any) -> np.ndarray:
            logits = self.actor(features).detach().cpu().numpy()  # waits for a GPU
            logits = logits.reshape(-1, *self.choices.shape) + masks
            return (logits if rng is None else logits + rng.gumbel(size=logits.shape)).argmax(-1)

        return choose

    def act(self, obs: np.ndarray, info: dict, rng: Any = None, policy: Any = None) -> np.ndarray:
        """Return actions for the environment: sampled with a generator, else the most likely."""
        features = self.see(experiment.to_device(obs, self.kl_coef.device))
        actions = (policy or self.policy())(features, self.choices.masks(info), rng)
        return self.choices.to_env(actions)

    def log_prob_and_entropy(
        self, features: Tensor, actions: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return log pi(a|s) and the entropy of pi(.|s), both (...), for actions (..., P).

        The parts of an action are independent: log-probabilities and entropies add (detail 37). A
        masked choice has probability 0 exactly, and its logit gets no gradient.
        """
        logits = self.actor(features).unflatten(-1, self.choices.shape) + masks
        log_pi = logits.log_softmax(-1)  # (..., P, A)
        log_probs = log_pi.gather(-1, actions.unsqueeze(-1)).sum((-2, -1))
        return log_probs, -(log_pi.exp() * log_pi).sum((-2, -1))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return log pi(a|s), the entropy of pi(.|s) and V(s), each (B,)."""
        features = self.trunk(batch.obs)
        log_probs, entropy = self.log_prob_and_entropy(features, batch.actions, batch.masks)
        return log_probs, entropy, self.critic(features).squeeze(-1)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """Return mean(min(r A, clip(r, 1 - eps, 1 + eps) A)), to be maximised (PPO eq. 7).

    The min is pessimistic: outside the range gains no longer count, but losses still do.
    """
    clipped = ratio.clamp(1.0 - clip_coef, 1.0 + clip_coef)
    return torch.min(ratio * advantages, clipped * advantages).mean()


def kl_penalised_surrogate(log_ratio: Tensor, advantages: Tensor, kl_coef: Tensor) -> Tensor:
    """Return mean(r A - beta KL(old, new)), to be maximised (PPO eq. 8).

    (r - 1) - log r estimates KL(old, new) in nats: unbiased, and never negative.
    """
    ratio = log_ratio.exp()
    return (ratio * advantages - kl_coef * (ratio - 1.0 - log_ratio)).mean()


def adapt_kl_coef(kl_coef: Tensor, kl: float, target_kl: float) -> None:
    """Double beta, or halve it, if the KL left [target / 1.5, 1.5 target] (PPO section 4)."""
    factor = 2.0 if kl > 1.5 * target_kl else 0.5 if kl < target_kl / 1.5 else 1.0
    kl_coef.mul_(factor).clamp_(1e-6, 1e6)  # at 0 it could never grow back


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Return mean((V - returns)^2) / 2.

    With `clip`, take the larger of that error and that of V kept within `clip` of its old value.
    """
    errors = (values - returns).square()
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.max(errors, (clipped - returns).square())
    return 0.5 * errors.mean()


def ppo_loss(agent: Agent, args: Args, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss to minimise, PPO's eq. 9 with the sign flipped, and statistics to log."""
    log_probs, entropies, values = agent(batch)
    log_ratio = log_probs - batch.log_probs
    ratio = log_ratio.exp()  # 1, up to rounding, in the first minibatch of an update
    if args.objective == "clip":
        surrogate = clipped_surrogate(ratio, batch.advantages, args.clip_coef)
    else:
        surrogate = kl_penalised_surrogate(log_ratio, batch.advantages, agent.kl_coef)
    value_clip = args.clip_coef if args.clip_vloss else None
    v_loss = value_loss(values, batch.values, batch.returns, value_clip)
    entropy = entropies.mean()
    loss = -surrogate + args.vf_coef * v_loss - args.ent_coef * entropy
    with torch.no_grad():
        change = ratio - 1.0
        return loss, {
            "policy_loss": -surrogate,
            "value_loss": v_loss.detach(),
            "entropy": entropy.detach(),
            "approx_kl": (change - log_ratio).mean(),  # KL(old, new) in nats
            "clipfrac": (change.abs() > args.clip_coef).float().mean(),
        }


def normalise(advantages: Tensor) -> Tensor:
    """Return advantages (B,) shifted and scaled to mean 0 and standard deviation 1 (detail 7)."""
    mean, variance = experiment.mean_and_variance(advantages)
    return (advantages - mean) / (variance.sqrt() + 1e-8)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns): 1 if they differ at most by a constant."""
    (_, unexplained), (_, variance) = map(experiment.mean_and_variance, (returns - values, returns))
    return 1.0 - (unexplained / variance).item()


def train(args: Args, agent: Agent | None = None, on_iteration: Any = None) -> tuple[Agent, dict]:
    """Train `agent`, made with the same `args`, or a new one; return it and its evaluation.

    `on_iteration(step, metrics)` is called after each iteration; return True to stop training.
    """
    with experiment.Run(args, on_iteration) as run:
        envs = run.make_envs(make_envs)
        agent = (agent or Agent(args, envs)).to(run.device)
        parameters = experiment.flatten_parameters(agent)  # one vector, and one of gradients
        optimizer = experiment.Adam([parameters], eps=1e-5, fused=True)  # detail 3
        if args.compile:
            compiled = experiment.compile_gradient(ppo_loss, agent, args, parameters)
        run.start(agent, optimizer)  # opens the folder, or loads its checkpoint
        tensor = partial(experiment.to_device, device=run.device)
        T, N, choices = args.num_steps, envs.num_envs, agent.choices
        obs = tensor(np.zeros((T + 1, N, *agent.obs_shape), np.uint8))
        features = tensor(np.zeros((T + 1, N, args.hidden_size), np.float32))
        masks = np.zeros((T + 1, N, *choices.shape), np.float32)
        done = np.zeros((T + 1, N), bool)  # whether the previous step ended an episode
        actions = np.zeros((T, N, choices.shape[0]), np.int64)
        rewards = np.zeros((T, N), np.float32)
        terminated, life_lost = np.zeros((2, T, N), bool)
        images, info = envs.reset(seed=run.env_seed)
        obs[T] = tensor(images)
        masks[T] = choices.masks(info)
        lives = info.get("lives", 0)

        for iteration in range(run.iteration, args.num_iterations):
            remaining = 1.0 - iteration / args.num_iterations if args.anneal_lr else 1.0
            optimizer.param_groups[0]["lr"] = remaining * args.learning_rate

            # ---- [1] Rollout: T steps in N environments; only the policy runs ------------------
            obs[0], masks[0], done[0] = obs[T], masks[T], done[T]  # where the last rollout ended
            policy = agent.policy()
            for t in range(T):
                features[t] = agent.see(obs[t])  # kept: both heads need them in [2]
                actions[t] = policy(features[t], masks[t], run.sampling)
                step = envs.step(choices.to_env(actions[t]))
                images, rewards[t], terminated[t], truncated, info = step
                obs[t + 1] = tensor(images)
                masks[t + 1] = choices.masks(info)
                done[t + 1] = terminated[t] | truncated
                if args.life_loss:
                    known, before = info.get("_lives", True), lives  # who reports lives
                    lives = np.where(known, info.get("lives", lives), lives)
                    life_lost[t] = lives < before
            is_transition = ~done[:-1]  # (T, N): False where the environment was only reset
            run.count_steps(is_transition, rewards)  # refuses NaN and infinity
            features[T] = agent.see(obs[T])

            # ---- [2] Advantages: one pass over all rows, with the rollout's parameters ---------
            taken, logit_masks = tensor(actions), tensor(masks[:-1])
            with torch.no_grad():
                values = agent.critic(features).squeeze(-1)  # (T + 1, N)
                log_probs, _ = agent.log_prob_and_entropy(features[:-1], taken, logit_masks)
            # The last observation of an episode has its own row, so V(s') is simply V's next row.
            advantages, returns = gae(
                rewards=tensor(np.sign(rewards) if args.sign_rewards else rewards),
                values=values[:-1],
                next_values=values[1:],
                terminated=tensor(terminated | life_lost),
                done=tensor(done[1:] | life_lost),
                gamma=args.gamma,
                gae_lambda=args.gae_lambda,
            )
            keep = tuple(map(tensor, is_transition.nonzero()))  # indices: a bool mask stalls a GPU
            batch = Batch(
                obs=obs[:-1][keep],
                actions=taken[keep],
                masks=logit_masks[keep],
                log_probs=log_probs[keep],
                advantages=advantages[keep],
                returns=returns[keep],
                values=values[:-1][keep],
            )
            if args.norm_adv == "batch":
                batch = batch._replace(advantages=normalise(batch.advantages))

            # ---- [3] Update: K epochs of shuffled minibatches ----------------------------------
            logged = []  # the statistics of each minibatch
            for _ in range(args.update_epochs):
                order = tensor(run.shuffling.permutation(len(batch.obs)))
                parts = [x[order].tensor_split(args.num_minibatches) for x in batch]
                for minibatch in map(Batch, *parts):  # the i-th part of every field
                    if args.norm_adv == "minibatch":
                        minibatch = minibatch._replace(advantages=normalise(minibatch.advantages))
                    if args.compile:
                        stats = compiled(minibatch)  # also fills parameters.grad
                    else:
                        parameters.grad.zero_()
                        loss, stats = ppo_loss(agent, args, minibatch)
                        loss.backward()
                    experiment.all_sum(parameters.grad, run.weight)  # mean over processes
                    grad_norm = parameters.grad.norm()  # clipped as by nn.utils.clip_grad_norm_
                    parameters.grad *= (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
                    optimizer.step()
                    logged.append(stats | {"grad_norm": grad_norm})
                last_epoch = logged[-args.num_minibatches :]  # the newest policies' statistics
                if args.objective == "clip" and args.target_kl:
                    if run.average(last_epoch)["approx_kl"] > args.target_kl:
                        break
            if args.objective == "penalty":
                kl = run.average(last_epoch)["approx_kl"]
                adapt_kl_coef(agent.kl_coef, kl, args.target_kl or 0.01)

            # ---- [4] Log: means over the iteration ---------------------------------------------
            metrics = run.average(logged)
            metrics["explained_variance"] = explained_variance(batch.values, batch.returns)
            metrics["kl_coef"] = agent.kl_coef.item()
            metrics = {f"losses/{name}": x for name, x in metrics.items()}
            if run.end_iteration(metrics):
                break
        return agent, run.finish(make_envs)


if __name__ == "__main__":
    experiment.main(Args, train)
