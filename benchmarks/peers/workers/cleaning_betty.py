"""Hypergradients of data cleaning by Betty."""

from collections.abc import Callable
from typing import Any

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem, IterativeProblem
from cleaning import MOMENTUM, RATE, Cleaning, peak_mib
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from worker import serve_methods


class Weights(nn.Module):
    def __init__(self, log_odds: Tensor) -> None:
        super().__init__()
        self.log_odds = nn.Parameter(log_odds.detach().clone())


def by(kind: type, first_order: bool, **settings: Any) -> Callable:
    """The hypergradient that the outer problem receives after `steps` inner steps."""

    def method(problem: Cleaning, optimizer: str, steps: int) -> Callable[[], Tensor]:
        assert optimizer == "sgd"
        weights = Weights(problem.log_odds)
        problem.log_odds = weights.log_odds
        found: list[Tensor] = []

        class Outer(ImplicitProblem):
            def training_step(self, batch: Any) -> Tensor:
                return cross_entropy(self.inner(batch[0]), batch[1])

            def get_batch(self) -> Any:
                return problem.val

            def custom_optimizer_step(self) -> None:
                found[:] = [weights.log_odds.grad.detach().clone()]

        class Inner(kind):
            def training_step(self, batch: Any) -> Tensor:
                return problem.weighted(self(batch[0]))

            def get_batch(self) -> Any:
                return problem.train

        sgd = torch.optim.SGD(problem.reset().parameters(), lr=RATE, momentum=MOMENTUM)
        inner = Inner("inner", Config(unroll_steps=steps, **settings), problem.net, sgd)
        outer = Outer(
            "outer", Config(first_order=first_order), weights, torch.optim.SGD([weights.log_odds])
        )
        engine = Engine(
            [outer, inner],
            EngineConfig(strategy="cpu"),
            {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
        )
        engine.train()

        def hypergradient() -> Tensor:
            problem.reset()
            inner.optimizer.state.clear()
            for _ in range(steps):
                engine.train_step()
            return found[0]

        return hypergradient

    return method


serve_methods(
    Cleaning,
    {
        "unrolled": by(IterativeProblem, first_order=False),
        # Its first term is the vector itself, before any iteration.
        "neumann": by(
            ImplicitProblem, True, type="neumann", neumann_iterations=19, neumann_alpha=RATE
        ),
        "darts": by(ImplicitProblem, True, type="darts"),
    },
    peak_mib,
)
