"""Tune ppo_discrete.py with Optuna, which stops trials that fall behind the median of the others.

Run it beside the scripts:
    pip install optuna
    python sweep.py
"""

import math

import optuna

import ppo_discrete


def objective(trial: optuna.Trial) -> float:
    """Train with the flags that a trial suggests; return the mean return of the evaluation."""

    def on_iteration(step: int, metrics: dict[str, float]) -> bool:
        score = metrics["charts/episodic_return"]
        if not math.isnan(score):  # it is NaN if no episode ended
            trial.report(score, step)
        return trial.should_prune()

    args = ppo_discrete.Args(
        env_id="CartPole-v1",
        total_timesteps=30_000,
        learning_rate=trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        gae_lambda=trial.suggest_float("gae_lambda", 0.8, 1.0),
        update_epochs=trial.suggest_int("update_epochs", 1, 10),
    )
    _, results = ppo_discrete.train(args, on_iteration=on_iteration)
    if results["stopped"]:
        if results["stopped"] != "on_iteration":  # Ctrl-C ends the sweep
            trial.study.stop()
        raise optuna.TrialPruned
    return results["eval_mean"]


if __name__ == "__main__":
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner())
    study.optimize(objective, n_trials=20)
    print(study.best_value, study.best_params)
