"""Hypergradients of data cleaning by higher."""

from collections.abc import Callable

import higher
import torch
from cleaning import ADAM_RATE, BETAS, EPS, MOMENTUM, RATE, Cleaning, peak_mib
from torch import Tensor
from worker import serve_methods


def unrolled(problem: Cleaning, optimizer: str, steps: int) -> Callable[[], Tensor]:
    net = problem.net

    def hypergradient() -> Tensor:
        problem.reset()
        if optimizer == "sgd":
            inner = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
        else:
            inner = torch.optim.Adam(net.parameters(), lr=ADAM_RATE, betas=BETAS, eps=EPS)
        with higher.innerloop_ctx(net, inner) as (functional, differentiable):
            for _ in range(steps):
                differentiable.step(problem.weighted(functional(problem.train[0])))
            logits = functional(problem.val[0])
            loss = torch.nn.functional.cross_entropy(logits, problem.val[1])
            return problem.hypergradient(loss)

    return hypergradient


serve_methods(Cleaning, {"unrolled": unrolled}, peak_mib)
