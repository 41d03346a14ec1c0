"""The parts of the pages that move compute what the Python files compute, and learn."""

import functools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_discrete
from gae import gae
from ppo_rlhf_toy import kl_penalty
from tests.helpers import ROOT, import_file, make_agent

DOCS = ROOT / "docs"
PHONE = 412
PAGES = {
    "policy-gradient": "clip",
    "gae": "gae",
    "rlhf": "kl",
    "continuous": "gauss",
    "debugging": "cartpole",
}


# ---- ppo.js in Node ----------------------------------------------------------------------------


def node(expression: str, **inputs: Any) -> Any:
    """Return what an expression in JavaScript is, with `ppo` and the inputs by name."""
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    names = ", ".join(inputs)
    code = f"""
        const ppo = require({json.dumps(str(DOCS / "assets" / "ppo.js"))});
        const {{ {names} }} = JSON.parse(require("fs").readFileSync(0, "utf8"));
        console.log(JSON.stringify({expression}));
    """
    result = subprocess.run(
        ["node", "-e", code], input=json.dumps(inputs), capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)


GRADIENT = """(() => {
    const agent = new ppo.Agent(16);
    agent.parameters.set(parameters);
    const { loss, stats } = ppo.ppo_loss(agent, ppo.ARGS, batch);
    return { loss, stats, gradient: [...agent.gradient] };
})()"""


def test_loss_and_gradient_are_those_of_autograd() -> None:
    torch.manual_seed(1)
    network = dict(env_id="CartPole-v1", hidden_size=16, activation="tanh")
    args = ppo_discrete.Args(**network)
    agent = make_agent(ppo_discrete, **network).double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    B = 64
    obs, actions = torch.randn(B, 4).double(), torch.randint(2, (B, 1))
    with torch.no_grad():
        log_probs, _ = agent.log_prob_and_entropy(obs, actions, torch.zeros(B, 1, 2))
    batch = ppo_discrete.Batch(
        obs=obs,
        actions=actions,
        masks=torch.zeros(B, 1, 2).double(),
        log_probs=log_probs + 0.4 * torch.randn(B),  # so that ratios leave the range, both ways
        advantages=torch.randn(B).double(),
        returns=5.0 * torch.randn(B).double(),
        values=torch.zeros(B).double(),
    )
    loss, stats = ppo_discrete.ppo_loss(agent, args, batch)
    loss.backward()
    assert 0.3 < stats["clipfrac"] < 0.9
    rows = zip(obs, actions[:, 0], batch.log_probs, batch.advantages, batch.returns)
    names = ("obs", "action", "log_prob", "advantage", "return")
    ours = node(
        GRADIENT,
        parameters=torch.cat([x.flatten() for x in agent.parameters()]).tolist(),
        batch=[dict(zip(names, [x.tolist() for x in row])) for row in rows],
    )
    assert ours["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert ours["stats"] == pytest.approx({k: x.item() for k, x in stats.items()}, rel=1e-6)
    gradient = torch.cat([x.grad.flatten() for x in agent.parameters()]).numpy()
    np.testing.assert_allclose(ours["gradient"], gradient, rtol=1e-7, atol=1e-10)


def test_hyperparameters_are_those_of_the_script() -> None:
    """But for the smaller network, and a learning rate that stays."""
    ours = node("ppo.ARGS")
    args = ppo_discrete.Args()
    assert ours.pop("hidden_size") < args.hidden_size
    assert ours == {name: getattr(args, name) for name in ours} and len(ours) == 11


def test_update_of_adam_is_that_of_pytorch() -> None:
    """Three steps with clipped gradients, the last part of an update."""
    gradients = np.random.default_rng(1).normal(size=(3, 10)).tolist()
    parameters = torch.zeros(10, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.Adam([parameters], lr=0.01, eps=1e-5)
    for gradient in gradients:
        parameters.grad = torch.tensor(gradient, dtype=torch.double)
        torch.nn.utils.clip_grad_norm_([parameters], 0.5)
        optimizer.step()
    ours = node(
        """(() => {
            const parameters = new Float64Array(10), optimizer = new ppo.Adam(10);
            for (const gradient of gradients) {
                ppo.clip_gradient(gradient, 0.5);
                optimizer.step(parameters, gradient, 0.01);
            }
            return [...parameters];
        })()""",
        gradients=gradients,
    )
    np.testing.assert_allclose(ours, parameters.detach().numpy(), rtol=1e-9)


def test_advantages_are_those_of_gae_py() -> None:
    rng = np.random.default_rng(1)
    T = 60
    done = rng.random(T) < 0.3
    terminated = done & (rng.random(T) < 0.5)
    assert 0 < terminated.sum() < done.sum()
    floats = dict(zip(("rewards", "values", "next_values"), rng.normal(size=(3, T))))
    inputs = floats | dict(terminated=terminated, done=done)
    expected = gae(**{k: torch.tensor(x) for k, x in inputs.items()}, gamma=0.9, gae_lambda=0.8)
    data = {k: x.tolist() for k, x in inputs.items()} | dict(gamma=0.9, gae_lambda=0.8)
    ours = node("ppo.gae(data)", data=data)
    for name, values in zip(("advantages", "returns"), expected):
        np.testing.assert_allclose(ours[name], values.numpy(), rtol=1e-9)


def test_pole_falls_as_in_gymnasium() -> None:
    env = gym.make("CartPole-v1").unwrapped
    env.reset(seed=1)
    rng = np.random.default_rng(1)
    scale = np.array([2.4, 2.0, 0.21, 2.0])
    states, actions = rng.uniform(-scale, scale, (200, 4)), rng.integers(2, size=200)
    ours = node(
        "states.map((state, i) => ppo.cartpole_step(state, actions[i]))",
        states=states.tolist(),
        actions=actions.tolist(),
    )
    ends = []
    for state, action, step in zip(states, actions, ours):
        env.state, env.steps_beyond_terminated = state, None
        _, _, terminated, _, _ = env.step(int(action))
        np.testing.assert_allclose(step["obs"], env.state, rtol=1e-12, atol=1e-12)
        assert step["terminated"] == terminated
        ends.append(terminated)
    assert 0 < sum(ends) < len(ends)


def test_pole_is_truncated_after_500_steps_and_then_reset() -> None:
    ours = node(
        """(() => {
            const envs = new ppo.CartPoles(1, ppo.random_generator(1)), steps = [];
            for (let t = 0; t < 502; t++) {
                const [x, x_dot, theta, theta_dot] = envs.obs[0];
                const push = theta + 0.5 * theta_dot + 0.03 * x + 0.06 * x_dot > 0 ? 1 : 0;
                steps.push(envs.step([push]));
            }
            return steps;
        })()"""
    )
    flags = [(x["rewards"], x["terminated"], x["done"], x["episode_returns"]) for x in ours[-3:]]
    assert flags[0] == ([1], [False], [True], [500])
    assert flags[1] == ([0], [False], [False], [])
    assert flags[2] == ([1], [False], [False], [])
    assert not any(x["done"][0] for x in ours[:-3])


LEARN = """(() => {
    const trainer = new ppo.Trainer(args, 1), returns = [];
    for (let i = 0; i < count; i++) returns.push(ppo.finish(trainer.iteration()).episodic_return);
    return returns;
})()"""


def test_cartpole_learns_and_with_a_far_too_high_learning_rate_does_not() -> None:
    returns = node(LEARN, args={}, count=15)
    assert returns[0] < 30 and max(filter(None, returns)) > 150  # None: no episode ended
    assert node(LEARN, args={}, count=2) == returns[:2]
    assert max(node(LEARN, args={"learning_rate": 0.3}, count=12)[4:]) < 15
    # The policy cannot leave the old one.
    assert max(node(LEARN, args={"clip_coef": 0.01}, count=15)) < 60


# ---- Real values -------------------------------------------------------------------------------


def test_recorded_rollout_is_what_the_script_computes() -> None:
    values = import_file(DOCS / "values.py")
    committed = json.loads((DOCS / "data" / "rollout.json").read_text())
    made = json.loads(json.dumps(values.as_data(values.record())))
    assert made["command"] == committed["command"]
    assert made["tensors"].keys() == committed["tensors"].keys()
    for name, tensor in made["tensors"].items():
        assert tensor["shape"] == committed["tensors"][name]["shape"], name
        numbers = committed["tensors"][name]["numbers"]
        np.testing.assert_allclose(tensor["numbers"], numbers, atol=2e-3, err_msg=name)


def test_recorded_rollout_has_an_end_and_a_reset() -> None:
    tensors = json.loads((DOCS / "data" / "rollout.json").read_text())["tensors"]
    x = {name: torch.tensor(tensor["numbers"]) for name, tensor in tensors.items()}
    ((t, n),) = x["terminated"].nonzero().tolist()
    assert 0 < t < len(x["terminated"]) - 2, "a step before the end, and one after the reset"
    assert not x["is_transition"][t + 1, n] and x["rewards"][t + 1, n] == 0
    assert x["done"][t + 1, n] and x["done"].sum() == 1
    assert len(x["batch.advantages"]) == x["is_transition"].sum()
    args = ppo_discrete.Args()
    inputs = (x["rewards"], x["values"][:-1], x["values"][1:], x["terminated"], x["done"][1:])
    advantages, returns = gae(*inputs, args.gamma, args.gae_lambda)
    torch.testing.assert_close(advantages, x["advantages"], rtol=0, atol=1e-3)
    torch.testing.assert_close(returns, x["returns"], rtol=0, atol=1e-3)
    assert (x["first.ratio"] == 1).all() and not (x["last.ratio"] == 1).any()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_numbers_that_a_note_names_are_in_the_tables_below(language: str) -> None:
    pytest.importorskip("mkdocs")
    hook = import_file(DOCS / "widgets_hook.py")
    text = (DOCS / language / "discrete.md").read_text()
    widget = r'<div class="widget" data-widget="values" data-names="([^"]*)"'
    pattern = r"\n\n([^\n](?:[^\n]|\n(?!\n))*)\n\n" + widget  # a paragraph and the tables
    notes = re.findall(pattern, text)
    assert len(notes) == text.count('data-widget="values"') == 6
    named = 0
    for note, names in notes:
        tables = "".join(hook.figure(name, hook.WORDS[language]) for name in names.split())
        numbers = re.findall(r"(?<![\d.])-?\d+\.\d{3}(?!\d)", note)
        assert set(numbers) <= set(re.findall(r">(-?\d+\.\d{3})<", tables)), note
        named += len(numbers)
    assert named >= 6


def test_values_become_tables_and_an_unknown_name_stops_the_build() -> None:
    pytest.importorskip("mkdocs")
    hook = import_file(DOCS / "widgets_hook.py")
    words = hook.WORDS["en"]
    table = hook.widget(["rewards", "obs", "first.ratio", "last.loss"], words)
    assert "<code>rewards</code> (4, 2)" in table and "<code>obs</code> (5, 2, 4)" in table
    assert "<code>ratio</code> (4,), first minibatch" in table
    assert "<code>loss</code>, last minibatch" in table
    assert table.count('class="reset"') == 2 and words["reset"] in table
    assert words["reset"] not in hook.widget(["first.ratio"], words)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="en/x.md"))
    for text in (
        '<p>a</p><div class="widget" data-widget="values" data-names="{}">b</div>',
        '<p>a</p><div class="widget" data-names="{}" data-widget="values">b</div>',  # sorted
    ):
        content = hook.on_page_content(text.format("rewards"), page, None, None)
        assert content.startswith("<p>a</p>") and "(4, 2)" in content and ">b<" not in content
        for names in ("rewards no_such_name", ""):
            with pytest.raises(hook.PluginError, match=r"has no (no_such_)?name"):
                hook.on_page_content(text.format(names), page, None, None)


# ---- In the browser ----------------------------------------------------------------------------


class Widget:
    """A widget on a page of the site, on a phone."""

    def __init__(self, page: Any, name: str):
        self.page, self.root = page, page.locator(f'[data-widget="{name}"]')

    def set(self, **values: float) -> None:
        for name, value in values.items():
            self.root.locator(f'input[name="{name}"]').fill(str(value))

    def number(self, name: str) -> str:
        return self.root.locator(f'[data-number="{name}"]').inner_text()

    def table(self) -> list[list[str]]:
        rows = self.root.locator("tbody tr").all()
        return [row.locator("th, td").all_inner_texts() for row in rows]


@pytest.fixture(scope="module")
def open_widget(watched, site):
    """Return a function that opens a page once and returns its widget."""

    @functools.cache
    def open_widget(path: str) -> Widget:
        return Widget(watched.open((site / path).as_uri(), width=PHONE), PAGES[Path(path).stem])

    return open_widget


def test_clip_shows_the_surrogate_and_its_gradient(open_widget) -> None:
    widget = open_widget("en/policy-gradient.html")
    for r in (0.5, 1.0, 1.5):
        for advantage in (-1.5, 0.5):
            widget.set(ratio=r, advantage=advantage, clip_coef=0.3)
            ratio = torch.tensor(r, requires_grad=True)
            surrogate = ppo_discrete.clipped_surrogate(ratio, torch.tensor(advantage), 0.3)
            surrogate.backward()
            assert float(widget.number("surrogate")) == pytest.approx(surrogate.item(), abs=6e-4)
            assert float(widget.number("gradient")) == pytest.approx(ratio.grad.item(), abs=6e-4)
    # As the page says.
    for r, advantage, gradient in ((1.2, 1, 1), (1.21, 1, 0), (0.79, -1, 0), (2, -1, -1)):
        widget.set(ratio=r, advantage=advantage, clip_coef=0.2)
        assert float(widget.number("gradient")) == gradient


def test_slider_follows_the_keyboard(open_widget) -> None:
    widget = open_widget("zh/policy-gradient.html")
    slider = widget.page.get_by_label("概率比 r")
    slider.focus()
    widget.page.keyboard.press("ArrowRight")
    assert slider.input_value() == "1.01" and widget.number("unclipped") == "1.010"
    assert slider.get_attribute("aria-valuetext") == "1.01"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_gae_computes_the_table_of_the_page(open_widget, language: str) -> None:
    widget = open_widget(f"{language}/gae.html")
    pattern = r"^\| (\d)[^|]*\|" + r"([^|\n]*)\|" * 5
    cells = re.findall(pattern, (DOCS / language / "gae.md").read_text(), re.MULTILINE)
    numbers = torch.tensor([[float(x) for x in row[1:4]] for row in cells]).T
    flags = torch.tensor([[x.strip() in ("yes", "是") for x in row[4:6]] for row in cells]).T
    for gamma, gae_lambda in ((0.5, 0.5), (0.9, 0.0), (0.97, 1.0), (0.0, 0.3)):
        widget.set(gamma=gamma, gae_lambda=gae_lambda)
        advantages, returns = gae(*numbers, *flags, gamma, gae_lambda)
        table = np.array([[float(x) for x in row[4:]] for row in widget.table()])
        np.testing.assert_allclose(table[:, 1], advantages, atol=6e-4)
        np.testing.assert_allclose(table[:, 2], returns, atol=6e-4)
        deltas, _ = gae(*numbers, *flags, gamma, 0.0)
        np.testing.assert_allclose(table[:, 0], deltas, atol=6e-4)


def test_kl_shows_mean_and_spread_of_the_estimators(open_widget) -> None:
    widget = open_widget("en/rlhf.html")
    spread = {}
    for policy, reference in ((0.6, 0.5), (0.95, 0.05)):
        widget.set(policy=policy, reference=reference)
        pi, pi_ref = (torch.tensor([p, 1 - p], dtype=torch.double) for p in (policy, reference))
        exact = (pi * (pi / pi_ref).log()).sum().item()
        assert float(widget.number("exact")) == pytest.approx(exact, abs=6e-5)
        for name, *cells in widget.table():
            estimates = kl_penalty(pi.log(), pi_ref.log(), name)
            mean = (pi * estimates).sum()
            std = (pi * (estimates - mean).square()).sum().sqrt()
            expected = [mean.item(), mean.item() - exact, std.item()]
            assert list(map(float, cells)) == pytest.approx(expected, abs=6e-5)
            spread[name, policy] = std.item()
    assert spread["k1", 0.6] > spread["k3", 0.6] and spread["k1", 0.95] < spread["k3", 0.95]


def test_gauss_shows_what_is_clipped(open_widget) -> None:
    widget = open_widget("en/continuous.html")
    for mean, log_std in ((0.0, 0.0), (0.0, -0.35), (2.0, 0.0), (-1.5, 1.0), (0.5, -1.0)):
        widget.set(mean=mean, log_std=log_std)
        normal = torch.distributions.Normal(torch.tensor(mean).double(), math.exp(log_std))
        outside = normal.cdf(torch.tensor(-1.0)) + 1 - normal.cdf(torch.tensor(1.0))
        actions = torch.linspace(-12, 12, 240_001, dtype=torch.double) + mean
        density = normal.log_prob(actions).exp()
        sent = (density * actions.clamp(-1, 1)).sum() / density.sum()
        percent = widget.number("clipped").removesuffix("%")
        assert float(percent) == pytest.approx(100 * outside.item(), abs=0.06)
        assert float(widget.number("mean_sent")) == pytest.approx(sent.item(), abs=1e-3)
        assert float(widget.number("entropy")) == pytest.approx(normal.entropy().item(), abs=6e-4)


def test_cartpole_trains_pauses_and_starts_again(open_widget) -> None:
    widget = open_widget("en/debugging.html")
    start, restart = (widget.root.locator(f"button[name={x}]") for x in ("start", "restart"))
    widget.root.locator("input[name=watch]").uncheck()
    start.click()
    widget.page.wait_for_function(
        "Number(document.querySelector('[data-number=iteration]').textContent) >= 3", timeout=60_000
    )
    start.click()
    assert start.inner_text() == "Start"
    iteration, kl = widget.number("iteration"), widget.number("approx_kl")
    learned = "(() => { const trainer = new ppo.Trainer({}, 1); let metrics;"
    learned += " for (let i = 0; i < count; i++) metrics = ppo.finish(trainer.iteration());"
    metrics = node(learned + " return metrics; })()", count=int(iteration))
    assert float(kl) == pytest.approx(metrics["approx_kl"], abs=6e-5)
    assert widget.number("seed") == "1"
    widget.page.wait_for_timeout(300)
    assert widget.number("iteration") == iteration, "it goes on although it is paused"
    restart.click()
    assert widget.number("seed") == "2" and start.inner_text() == "Pause"
    assert widget.root.locator("polyline.grey").count() == 1


@pytest.mark.parametrize("path", [f"en/{page}.html" for page in PAGES] + ["zh/gae.html"])
def test_widget_fits_a_phone(open_widget, path: str) -> None:
    box = open_widget(path).root.bounding_box()
    assert box["height"] > 200 and box["x"] >= 0 and box["x"] + box["width"] <= PHONE


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("page", PAGES)
def test_widget_says_something_without_javascript(site: Path, language: str, page: str) -> None:
    text = (site / language / f"{page}.html").read_text()
    (plain,) = re.findall(rf'<div[^>]* data-widget="{PAGES[page]}"[^>]*>(.*?)</div>', text)
    assert len(plain) > 20 and plain in (DOCS / language / f"{page}.md").read_text()
