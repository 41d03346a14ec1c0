# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "gymnasium>=1.1", "numpy", "tensorboard", "tyro", "tqdm"]
# ///
"""PPO for discrete actions, in one file that reads from top to bottom.

    python ppo_discrete.py --env-id CartPole-v1    # reaches 500, the maximum, in about 5 seconds

Each iteration of `train` has four parts:
    [1] Rollout     the policy plays T steps in each of N environments
    [2] Advantages  the critic values every observation, GAE turns rewards into advantages
    [3] Update      K epochs of minibatches: clipped surrogate, value loss, entropy bonus
    [4] Log         averages over the iteration

Shapes: T num_steps, N num_envs, D observation size, B transitions in a batch or a minibatch,
P parts of an action (1 if the space is Discrete), A choices of the part that has the most.

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
from experiment import Choices, EnvArgs, Normaliser, UserError
from gae import gae


@dataclass
class Args(EnvArgs):
    """Train a PPO agent with discrete actions, then evaluate it."""

    env_id: str = "CartPole-v1"  # Gymnasium environment; module:Name-v0 imports the module first.
    total_timesteps: int = 50_000  # Total steps over all environments.
    num_envs: int = 32  # N: environments that run in parallel.
    num_steps: int = 32  # T: steps per environment and rollout.
    learning_rate: float = 2.5e-3  # Adam's initial learning rate.
    anneal_lr: bool = True  # Lower the learning rate linearly to 0 (detail 4).
    update_epochs: int = 10  # K: passes over the batch per update.
    num_minibatches: int = 4  # Minibatches per pass over the batch.
    gamma: float = 0.99  # Discount factor.
    gae_lambda: float = 0.95  # Lambda of GAE: 0 trusts the critic, 1 trusts the rewards.
    # The rows over which advantages are normalised to mean 0 and std 1; minibatch is detail 7.
    norm_adv: Literal["batch", "minibatch", "none"] = "batch"
    objective: Literal["clip", "penalty"] = "clip"  # PPO-Clip (eq. 7) or PPO-Penalty (eq. 8).
    clip_coef: float = 0.2  # Epsilon: moving the ratio further than this from 1 gains nothing.
    clip_vloss: bool = False  # Limit the change in the value to clip_coef as well (detail 9).
    ent_coef: float = 0.01  # Weight of the entropy bonus.
    vf_coef: float = 0.5  # Weight of the value loss.
    max_grad_norm: float = 0.5  # The gradient's global norm is clipped to this (detail 11).
    target_kl: float | None = None  # KL that ends an update. Penalty: KL to aim for, 0.01 if None.
    kl_coef: float = 1.0  # With penalty: the initial KL coefficient (beta).
    norm_obs: bool = False  # Normalise observations by their running mean and std (details 28, 29).
    hidden_size: int = 64  # Units in each of the two hidden layers.
    activation: Literal["relu", "tanh"] = "relu"  # CleanRL and Baselines use tanh.

    fixed = "env_id kl_coef norm_obs hidden_size activation"  # kept by --resume, --evaluate

    def check(self) -> None:
        """Raise `UserError`, which names the flag, for an invalid value."""
        super().check()
        self.check_range("update_epochs num_minibatches hidden_size", 1)
        self.check_range("gamma gae_lambda", 0, 1)
        self.check_range("ent_coef vf_coef", 0)
        self.check_range("learning_rate clip_coef max_grad_norm target_kl kl_coef", 1e-12)
        envs = self.num_envs // experiment.world_size()
        # Half the rows may be resets, and a std needs two.
        if envs * (self.num_steps // 2) < 2 * self.num_minibatches:
            batch = f"{envs} environments with --num-steps {self.num_steps}"
            raise UserError(f"{batch} are too few for --num-minibatches {self.num_minibatches}")


class Batch(NamedTuple):
    """The transitions of a rollout, or a minibatch of them."""

    obs: Tensor  # (B, D)
    actions: Tensor  # (B, P)
    masks: Tensor  # (B, P, A), added to the logits: 0 for a legal choice, -1e9 for any other
    log_probs: Tensor  # (B,), of the actions, under the policy that took them
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,), targets of the critic
    values: Tensor  # (B,), the critic's estimates before the update


def make_envs(args: Args, num_envs: int, **kwargs: Any) -> gym.vector.VectorEnv:
    """Make environments with observations (N, D) and discrete actions."""
    envs = experiment.make_vec(args, num_envs, **kwargs)
    if not isinstance(envs.single_action_space, Choices.SPACES):
        what = f"its actions are {envs.single_action_space}"
        experiment.refuse(args, envs, f"{what}: ppo_continuous.py is for Box")
    return experiment.flatten_observations(args, envs, for_images="use ppo_atari.py")


def mlp(*sizes: int, activation: str, head_gain: float) -> nn.Sequential:
    """Return a multilayer perceptron with orthogonal weights and zero biases (detail 2)."""
    layers: list[Any] = []
    for size, next_size in zip(sizes, sizes[1:]):
        layers.append(nn.Linear(size, next_size))
        nn.init.orthogonal_(layers[-1].weight, math.sqrt(2.0))
        nn.init.zeros_(layers[-1].bias)
        layers.append(nn.ReLU(inplace=True) if activation == "relu" else nn.Tanh())
    nn.init.orthogonal_(layers[-2].weight, head_gain)  # the last layer, which has no activation
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """The policy (actor) and the value function (critic), two separate networks (detail 13)."""

    def __init__(self, args: Args, envs: Any):
        super().__init__()
        self.choices = Choices(envs.single_action_space)
        self.obs_shape = envs.single_observation_space.shape
        sizes = (*self.obs_shape, args.hidden_size, args.hidden_size)
        # A network of your own goes here, without dropout: rollout, update and evaluation use it.
        self.actor = mlp(
            *sizes, math.prod(self.choices.shape), activation=args.activation, head_gain=0.01
        )  # the small gain makes the first policy almost uniform
        self.critic = mlp(*sizes, 1, activation=args.activation, head_gain=1.0)
        self.kl_coef = nn.Buffer(torch.tensor(args.kl_coef))  # beta of PPO-Penalty
        self.obs_normaliser = Normaliser(self.obs_shape, clip=10.0, enabled=args.norm_obs)

    def policy(self) -> Callable[..., np.ndarray]:
        """Return the policy as it is now, a function (obs (N, D), masks, rng) -> actions (N, P).

        argmax(logits + Gumbel noise) samples from softmax(logits); without `rng`, it is the mode.
        """
        forward = experiment.numpy_forward(self.actor)
        normalise_obs = self.obs_normaliser.snapshot()

        def choose(obs: np.ndarray, masks: np.ndarray, rng: Any) -> np.ndarray:
            logits = forward(normalise_obs(obs)).reshape(-1, *self.choices.shape) + masks
            return (logits if rng is None else logits + rng.gumbel(size=logits.shape)).argmax(-1)

        return choose

    def act(self, obs: np.ndarray, info: dict, rng: Any = None, policy: Any = None) -> np.ndarray:
        """Return actions for the environment: sampled with a generator, else the most likely."""
        return self.choices.to_env((policy or self.policy())(obs, self.choices.masks(info), rng))

    def log_prob_and_entropy(
        self, obs: Tensor, actions: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return log pi(a|s) and the entropy of pi(.|s), both (...), for actions (..., P).

        The parts of an action are independent: log-probabilities and entropies add (detail 37). A
        masked choice has probability 0 exactly, and its logit gets no gradient.
        """
        logits = self.actor(obs).unflatten(-1, self.choices.shape) + masks
        log_pi = logits.log_softmax(-1)  # (..., P, A)
        log_probs = log_pi.gather(-1, actions.unsqueeze(-1)).sum((-2, -1))
        return log_probs, -(log_pi.exp() * log_pi).sum((-2, -1))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return log pi(a|s), the entropy of pi(.|s) and V(s), each (B,)."""
        log_probs, entropy = self.log_prob_and_entropy(batch.obs, batch.actions, batch.masks)
        return log_probs, entropy, self.critic(batch.obs).squeeze(-1)


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
        obs = np.zeros((T + 1, N, *agent.obs_shape), np.float32)
        masks = np.zeros((T + 1, N, *choices.shape), np.float32)
        done = np.zeros((T + 1, N), bool)  # whether the previous step ended an episode
        actions = np.zeros((T, N, choices.shape[0]), np.int64)
        rewards = np.zeros((T, N), np.float32)
        terminated = np.zeros((T, N), bool)
        if args.norm_obs and run.iteration == 0:  # so that no rollout acts on raw observations
            agent.obs_normaliser.update(run.first_observations(agent))
        obs[T], info = envs.reset(seed=run.env_seed)
        masks[T] = choices.masks(info)

        for iteration in range(run.iteration, args.num_iterations):
            remaining = 1.0 - iteration / args.num_iterations if args.anneal_lr else 1.0
            optimizer.param_groups[0]["lr"] = remaining * args.learning_rate

            # ---- [1] Rollout: T steps in N environments; only the policy runs ------------------
            obs[0], masks[0], done[0] = obs[T], masks[T], done[T]  # where the last rollout ended
            policy = agent.policy()
            for t in range(T):
                actions[t] = policy(obs[t], masks[t], run.sampling)
                step = envs.step(choices.to_env(actions[t]))
                obs[t + 1], rewards[t], terminated[t], truncated, info = step
                masks[t + 1] = choices.masks(info)
                done[t + 1] = terminated[t] | truncated
            is_transition = ~done[:-1]  # (T, N): False where the environment was only reset
            run.count_steps(is_transition, obs, rewards)  # refuses NaN and infinity

            # ---- [2] Advantages: one pass over all rows, with the rollout's parameters ---------
            inputs = tensor(agent.obs_normaliser.snapshot()(obs))  # (T + 1, N, D)
            # Only now: log_probs must be those of the policy that acted, which saw `inputs`.
            agent.obs_normaliser.update(obs[:-1][is_transition])
            taken, logit_masks = tensor(actions), tensor(masks[:-1])
            with torch.no_grad():
                values = agent.critic(inputs).squeeze(-1)  # (T + 1, N)
                log_probs, _ = agent.log_prob_and_entropy(inputs[:-1], taken, logit_masks)  # (T, N)
            # The last observation of an episode has its own row, so V(s') is simply V's next row.
            advantages, returns = gae(
                rewards=tensor(rewards),
                values=values[:-1],
                next_values=values[1:],
                terminated=tensor(terminated),
                done=tensor(done[1:]),
                gamma=args.gamma,
                gae_lambda=args.gae_lambda,
            )
            keep = tuple(map(tensor, is_transition.nonzero()))  # indices: a bool mask stalls a GPU
            batch = Batch(
                obs=inputs[:-1][keep],
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
