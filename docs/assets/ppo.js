/* PPO on CartPole in plain JavaScript, by the names of ppo_discrete.py and gae.py.

   A browser finds it as `ppo`, Node by require(). tests/test_widgets.py compares the loss, its
   gradient, the advantages and the environment with the Python files.
   Shapes: T num_steps, N num_envs, D observation size, B transitions in a batch or a minibatch. */

const ppo = (() => {
  "use strict";

  // The defaults of ppo_discrete.py, but for a smaller network with tanh and a constant learning rate.
  const ARGS = {
    num_envs: 32,
    num_steps: 32,
    learning_rate: 2.5e-3,
    update_epochs: 10,
    num_minibatches: 4,
    gamma: 0.99,
    gae_lambda: 0.95,
    clip_coef: 0.2,
    ent_coef: 0.01,
    vf_coef: 0.5,
    max_grad_norm: 0.5,
    hidden_size: 16,
  };

  // ---- Random numbers ------------------------------------------------------------------------

  /** Return a function that draws from [0, 1), always the same for a seed (mulberry32). */
  function random_generator(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let x = Math.imul(state ^ (state >>> 15), state | 1);
      x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
      return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  /** Draw from a Gaussian of mean 0 and deviation 1 (Box and Muller). */
  function random_normal(random) {
    return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  }

  /** Return the items in random order (Fisher and Yates). */
  function shuffled(items, random) {
    const result = [...items];
    for (let i = result.length - 1; i > 0; i--) {
      const j = Math.floor(random() * (i + 1));
      [result[i], result[j]] = [result[j], result[i]];
    }
    return result;
  }

  // ---- The environment: CartPole-v1 of Gymnasium ---------------------------------------------

  const MAX_STEPS = 500;
  const MAX_POSITION = 2.4;
  const MAX_ANGLE = (12 * 2 * Math.PI) / 360;

  /** Return the next [position, velocity, angle, angular velocity], and whether the pole fell. */
  function cartpole_step([x, x_dot, theta, theta_dot], action) {
    const gravity = 9.8, cart_mass = 1.0, pole_mass = 0.1, half_length = 0.5, tau = 0.02;
    const total_mass = cart_mass + pole_mass;
    const force = action === 1 ? 10 : -10;
    const cos = Math.cos(theta), sin = Math.sin(theta);
    const push = (force + pole_mass * half_length * theta_dot ** 2 * sin) / total_mass;
    const inertia = half_length * (4 / 3 - (pole_mass * cos ** 2) / total_mass);
    const theta_acc = (gravity * sin - cos * push) / inertia;
    const x_acc = push - (pole_mass * half_length * theta_acc * cos) / total_mass;
    const obs = [
      x + tau * x_dot,
      x_dot + tau * x_acc,
      theta + tau * theta_dot,
      theta_dot + tau * theta_acc,
    ];
    const terminated = Math.abs(obs[0]) > MAX_POSITION || Math.abs(obs[2]) > MAX_ANGLE;
    return { obs, terminated };
  }

  /** N poles. As in Gymnasium's NEXT_STEP autoreset, the step after an end only resets. */
  class CartPoles {
    constructor(num_envs, random) {
      this.random = random;
      this.obs = Array.from({ length: num_envs }, () => this.first_observation());
      this.lengths = Array(num_envs).fill(0); // steps so far, which are the return so far
      this.done = Array(num_envs).fill(false); // whether the previous step ended an episode
    }

    first_observation() {
      return Array.from({ length: 4 }, () => 0.1 * this.random() - 0.05);
    }

    /** Step every pole; return rewards and flags, each (N,), and the returns of ended episodes. */
    step(actions) {
      const rewards = [], terminated = [], episode_returns = [];
      actions.forEach((action, n) => {
        if (this.done[n]) {
          this.obs[n] = this.first_observation();
          this.lengths[n] = 0;
          this.done[n] = false;
          rewards.push(0);
          terminated.push(false);
          return;
        }
        const step = cartpole_step(this.obs[n], action);
        this.obs[n] = step.obs;
        this.lengths[n] += 1;
        this.done[n] = step.terminated || this.lengths[n] === MAX_STEPS;
        rewards.push(1);
        terminated.push(step.terminated);
        if (this.done[n]) episode_returns.push(this.lengths[n]);
      });
      return { rewards, terminated, done: [...this.done], episode_returns };
    }
  }

  // ---- Networks ------------------------------------------------------------------------------

  /** A linear layer. Its weights (outputs, inputs) and bias are part of a vector of parameters. */
  class Linear {
    constructor(inputs, outputs, parameters, gradient, offset) {
      const middle = offset + inputs * outputs, end = middle + outputs;
      this.inputs = inputs;
      this.outputs = outputs;
      this.weight = parameters.subarray(offset, middle);
      this.bias = parameters.subarray(middle, end);
      this.weight_gradient = gradient.subarray(offset, middle);
      this.bias_gradient = gradient.subarray(middle, end);
      this.y = Array(outputs).fill(0);
      this.x_gradient = Array(inputs).fill(0);
    }

    /** Return the outputs, in an array that the next call overwrites. */
    forward(x) {
      const { inputs, outputs, weight, bias, y } = this;
      this.x = x; // the backward pass needs it
      for (let i = 0; i < outputs; i++) {
        let sum = bias[i];
        for (let j = 0; j < inputs; j++) sum += weight[i * inputs + j] * x[j];
        y[i] = sum;
      }
      return y;
    }

    /** Add to the gradient of weight and bias; return that of the input. */
    backward(y_gradient) {
      const { inputs, outputs, weight, weight_gradient, bias_gradient, x, x_gradient } = this;
      x_gradient.fill(0);
      for (let i = 0; i < outputs; i++) {
        bias_gradient[i] += y_gradient[i];
        for (let j = 0; j < inputs; j++) {
          weight_gradient[i * inputs + j] += y_gradient[i] * x[j];
          x_gradient[j] += y_gradient[i] * weight[i * inputs + j];
        }
      }
      return x_gradient;
    }
  }

  class Tanh {
    forward(x) {
      this.y = x.map(Math.tanh);
      return this.y;
    }

    backward(y_gradient) {
      return y_gradient.map((gradient, i) => gradient * (1 - this.y[i] ** 2));
    }
  }

  /** Fill a layer's weights with rows or columns at right angles, all of length `gain`. */
  function orthogonal(layer, gain, random) {
    const transposed = layer.outputs > layer.inputs;
    const num_rows = Math.min(layer.outputs, layer.inputs);
    const size = Math.max(layer.outputs, layer.inputs);
    const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
    const rows = [];
    while (rows.length < num_rows) { // Gram and Schmidt
      let row = Array.from({ length: size }, () => random_normal(random));
      for (const other of rows) {
        const along = dot(row, other);
        row = row.map((x, i) => x - along * other[i]);
      }
      const length = Math.sqrt(dot(row, row));
      rows.push(row.map((x) => x / length));
    }
    for (let i = 0; i < layer.outputs; i++) {
      for (let j = 0; j < layer.inputs; j++) {
        layer.weight[i * layer.inputs + j] = gain * (transposed ? rows[j][i] : rows[i][j]);
      }
    }
  }

  /** A multilayer perceptron: linear layers with tanh between them. */
  class Mlp {
    constructor(sizes, parameters, gradient, offset) {
      this.layers = [];
      for (let i = 0; i + 1 < sizes.length; i++) {
        if (i > 0) this.layers.push(new Tanh());
        const linear = new Linear(sizes[i], sizes[i + 1], parameters, gradient, offset);
        offset += (sizes[i] + 1) * sizes[i + 1];
        this.layers.push(linear);
      }
    }

    initialise(head_gain, random) {
      const linears = this.layers.filter((layer) => layer instanceof Linear);
      linears.forEach((layer, i) => {
        const is_head = i === linears.length - 1;
        orthogonal(layer, is_head ? head_gain : Math.SQRT2, random);
      });
    }

    forward(x) {
      return this.layers.reduce((value, layer) => layer.forward(value), x);
    }

    backward(gradient) {
      this.layers.reduceRight((value, layer) => layer.backward(value), gradient);
    }
  }

  /** Return log softmax(logits). */
  function log_softmax(logits) {
    const largest = Math.max(...logits);
    let sum = 0;
    for (const x of logits) sum += Math.exp(x - largest);
    return logits.map((x) => x - largest - Math.log(sum));
  }

  /** The policy (actor) and the value function (critic): two networks, one vector of parameters. */
  class Agent {
    constructor(hidden_size, random) {
      const actor = [4, hidden_size, hidden_size, 2], critic = [4, hidden_size, hidden_size, 1];
      const count = (sizes) => sizes.slice(1).reduce((n, x, i) => n + (sizes[i] + 1) * x, 0);
      this.parameters = new Float64Array(count(actor) + count(critic));
      this.gradient = new Float64Array(this.parameters.length);
      this.actor = new Mlp(actor, this.parameters, this.gradient, 0);
      this.critic = new Mlp(critic, this.parameters, this.gradient, count(actor));
      if (random) {
        this.actor.initialise(0.01, random); // the first policy is almost uniform
        this.critic.initialise(1.0, random);
      }
    }

    log_pi(obs) {
      return log_softmax(this.actor.forward(obs));
    }

    value(obs) {
      return this.critic.forward(obs)[0];
    }

    act(obs, random) {
      return random() < Math.exp(this.log_pi(obs)[0]) ? 0 : 1;
    }
  }

  // ---- Advantages and losses -----------------------------------------------------------------

  /** Return residuals, advantages and returns of one environment, each (T,), like gae.py. */
  function gae({ rewards, values, next_values, terminated, done, gamma, gae_lambda }) {
    const deltas = rewards.map(
      (reward, t) => reward + (terminated[t] ? 0 : gamma * next_values[t]) - values[t],
    );
    const advantages = [...deltas];
    for (let t = deltas.length - 2; t >= 0; t--) {
      if (!done[t]) advantages[t] += gamma * gae_lambda * advantages[t + 1];
    }
    const returns = advantages.map((advantage, t) => advantage + values[t]);
    return { deltas, advantages, returns };
  }

  /** Return min(r A, clip(r, 1 - eps, 1 + eps) A) of one sample, and its derivative by r. */
  function clipped_surrogate(ratio, advantage, clip_coef) {
    const unclipped = ratio * advantage;
    const clipped = Math.min(Math.max(ratio, 1 - clip_coef), 1 + clip_coef) * advantage;
    const gradient = clipped < unclipped ? 0 : advantage;
    return { unclipped, clipped, surrogate: Math.min(unclipped, clipped), gradient };
  }

  /** Return the loss to minimise and its statistics; set `agent.gradient` by a backward pass.

      A row of the batch has obs, action, log_prob, advantage and return. */
  function ppo_loss(agent, args, batch) {
    const stats = { policy_loss: 0, value_loss: 0, entropy: 0, approx_kl: 0, clipfrac: 0 };
    const share = 1 / batch.length; // of a row in the mean
    agent.gradient.fill(0);
    for (const row of batch) {
      const log_pi = agent.log_pi(row.obs), pi = log_pi.map(Math.exp);
      const log_ratio = log_pi[row.action] - row.log_prob;
      const ratio = Math.exp(log_ratio);
      const { surrogate, gradient } = clipped_surrogate(ratio, row.advantage, args.clip_coef);
      const entropy = -pi.reduce((sum, p, i) => sum + p * log_pi[i], 0);
      const error = agent.value(row.obs) - row.return;

      stats.policy_loss -= share * surrogate;
      stats.value_loss += share * 0.5 * error ** 2;
      stats.entropy += share * entropy;
      stats.approx_kl += share * (ratio - 1 - log_ratio);
      stats.clipfrac += share * (Math.abs(ratio - 1) > args.clip_coef);

      // By the logits: d log pi(a) = [i is a] - pi_i, and d entropy = -pi_i (log pi_i + entropy).
      const logits_gradient = pi.map((p, i) => {
        const log_prob_gradient = (i === row.action ? 1 : 0) - p;
        const entropy_gradient = -p * (log_pi[i] + entropy);
        const policy_gradient = -gradient * ratio * log_prob_gradient;
        return share * (policy_gradient - args.ent_coef * entropy_gradient);
      });
      agent.actor.backward(logits_gradient);
      agent.critic.backward([share * args.vf_coef * error]);
    }
    const { policy_loss, value_loss, entropy } = stats;
    const loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy;
    return { loss, stats };
  }

  /** Return numbers shifted and scaled to mean 0 and standard deviation 1. */
  function normalise(advantages) {
    const mean = advantages.reduce((sum, x) => sum + x, 0) / advantages.length;
    const squares = advantages.reduce((sum, x) => sum + (x - mean) ** 2, 0);
    const std = Math.sqrt(squares / (advantages.length - 1));
    return advantages.map((x) => (x - mean) / (std + 1e-8));
  }

  /** Adam (Kingma and Ba 2015), with the epsilon of Baselines. */
  class Adam {
    constructor(size) {
      this.mean = new Float64Array(size);
      this.square = new Float64Array(size);
      this.steps = 0;
    }

    step(parameters, gradient, learning_rate) {
      this.steps += 1;
      const mean_scale = 1 / (1 - 0.9 ** this.steps), square_scale = 1 / (1 - 0.999 ** this.steps);
      for (let i = 0; i < parameters.length; i++) {
        this.mean[i] += 0.1 * (gradient[i] - this.mean[i]);
        this.square[i] += 0.001 * (gradient[i] ** 2 - this.square[i]);
        const std = Math.sqrt(square_scale * this.square[i]);
        parameters[i] -= (learning_rate * mean_scale * this.mean[i]) / (std + 1e-5);
      }
    }
  }

  /** Scale the gradient so that its norm is at most `max_grad_norm`; return the norm before. */
  function clip_gradient(gradient, max_grad_norm) {
    const norm = Math.sqrt(gradient.reduce((sum, x) => sum + x ** 2, 0));
    const scale = Math.min(1, max_grad_norm / (norm + 1e-6));
    for (let i = 0; i < gradient.length; i++) gradient[i] *= scale;
    return norm;
  }

  // ---- Training ------------------------------------------------------------------------------

  /** A training that can be run in slices. `args` may be changed between them. */
  class Trainer {
    constructor(args, seed) {
      this.args = { ...ARGS, ...args };
      this.random = random_generator(seed);
      this.agent = new Agent(this.args.hidden_size, this.random);
      this.optimizer = new Adam(this.agent.parameters.length);
      this.envs = new CartPoles(this.args.num_envs, this.random);
    }

    /** Play and learn once. Yields after each step and each minibatch; returns the metrics. */
    *iteration() {
      const { rows, episode_returns } = yield* this.rollout();
      const batch = this.advantages(rows);
      const stats = yield* this.update(batch);
      const sum = episode_returns.reduce((total, x) => total + x, 0);
      return { ...stats, episodic_return: sum / episode_returns.length }; // NaN: none ended
    }

    /** [1] Play T steps in N environments; return T + 1 rows, the last with observations only. */
    *rollout() {
      const rows = [], episode_returns = [];
      for (let t = 0; t < this.args.num_steps; t++) {
        const obs = [...this.envs.obs], is_transition = this.envs.done.map((done) => !done);
        const actions = obs.map((x) => this.agent.act(x, this.random));
        const step = this.envs.step(actions);
        rows.push({ obs, is_transition, actions, ...step });
        episode_returns.push(...step.episode_returns);
        yield "step";
      }
      rows.push({ obs: [...this.envs.obs] });
      return { rows, episode_returns };
    }

    /** [2] Return the transitions of a rollout as rows with normalised advantages, (B,). */
    advantages(rows) {
      const { num_steps, num_envs, gamma, gae_lambda } = this.args;
      const batch = [];
      for (let n = 0; n < num_envs; n++) {
        const column = (name) => rows.slice(0, num_steps).map((row) => row[name][n]);
        const values = rows.map((row) => this.agent.value(row.obs[n])); // (T + 1,)
        const { advantages, returns } = gae({
          rewards: column("rewards"),
          values: values.slice(0, -1),
          next_values: values.slice(1),
          terminated: column("terminated"),
          done: column("done"),
          gamma,
          gae_lambda,
        });
        for (let t = 0; t < num_steps; t++) {
          if (!rows[t].is_transition[n]) continue;
          const obs = rows[t].obs[n], action = rows[t].actions[n];
          const log_prob = this.agent.log_pi(obs)[action];
          batch.push({ obs, action, log_prob, advantage: advantages[t], return: returns[t] });
        }
      }
      const normalised = normalise(batch.map((row) => row.advantage));
      return batch.map((row, b) => ({ ...row, advantage: normalised[b] }));
    }

    /** [3] Learn in K epochs of shuffled minibatches; return the mean statistics. */
    *update(batch) {
      const logged = [];
      const { agent, args } = this;
      for (let epoch = 0; epoch < args.update_epochs; epoch++) {
        const order = shuffled(batch, this.random);
        const size = Math.ceil(order.length / args.num_minibatches);
        for (let start = 0; start < order.length; start += size) {
          const { stats } = ppo_loss(agent, args, order.slice(start, start + size));
          const grad_norm = clip_gradient(agent.gradient, args.max_grad_norm);
          this.optimizer.step(agent.parameters, agent.gradient, args.learning_rate);
          logged.push({ ...stats, grad_norm });
          yield "minibatch";
        }
      }
      const mean = (name) => logged.reduce((sum, x) => sum + x[name], 0) / logged.length;
      return Object.fromEntries(Object.keys(logged[0]).map((name) => [name, mean(name)]));
    }
  }

  /** Run a generator to its end; return what it returns. */
  function finish(generator) {
    let result = generator.next();
    while (!result.done) result = generator.next();
    return result.value;
  }

  return {
    ARGS, MAX_STEPS, MAX_POSITION, MAX_ANGLE, random_generator, cartpole_step, CartPoles,
    Agent, gae, clipped_surrogate, ppo_loss, normalise, Adam, clip_gradient, Trainer, finish,
  };
})();

if (typeof module !== "undefined") module.exports = ppo;
