"""Hypergradients of data cleaning in plain, hand-written PyTorch."""

import math
from collections.abc import Callable

import torch
from cleaning import ADAM_RATE, BETAS, EPS, EPS_ROOT, MOMENTUM, RATE, Cleaning, peak_mib
from torch import Tensor
from worker import serve_methods


def sgd(params: list[Tensor], state: list[Tensor], gradients: tuple[Tensor, ...], t: int):
    state = [MOMENTUM * buffer + g for buffer, g in zip(state, gradients, strict=True)]
    return [p - RATE * buffer for p, buffer in zip(params, state, strict=True)], state


def adam(params: list[Tensor], state: list[Tensor], gradients: tuple[Tensor, ...], t: int):
    (b1, b2), n = BETAS, len(params)
    m = [b1 * m + (1 - b1) * g for m, g in zip(state[:n], gradients, strict=True)]
    v = [b2 * v + (1 - b2) * g * g for v, g in zip(state[n:], gradients, strict=True)]
    rate, scale = ADAM_RATE / (1 - b1 ** (t + 1)), 1 / (1 - b2 ** (t + 1))
    size = [torch.sqrt(scale * x + EPS_ROOT) + EPS for x in v]
    return [p - rate * x / y for p, x, y in zip(params, m, size, strict=True)], m + v


UPDATES = {"sgd": (sgd, 1), "adam": (adam, 2)}


def unrolled(problem: Cleaning, optimizer: str, steps: int) -> Callable[[], Tensor]:
    """Autograd through the loop; its graph holds every activation of every step."""
    update, buffers = UPDATES[optimizer]

    def hypergradient() -> Tensor:
        params = problem.start()
        state = [torch.zeros_like(p) for _ in range(buffers) for p in params]
        for t in range(steps):
            gradients = torch.autograd.grad(problem.train_loss(params), params, create_graph=True)
            params, state = update(params, state, gradients, t)
        return problem.hypergradient(problem.val_loss(params))

    return hypergradient


def reverse(problem: Cleaning, optimizer: str, steps: int) -> Callable[[], Tensor]:
    """Keeps only the inner states, and reruns each step on the way back."""
    update, buffers = UPDATES[optimizer]

    def step(state: list[Tensor], t: int, create_graph: bool) -> list[Tensor]:
        params, rest = state[:6], state[6:]
        loss = problem.train_loss(params)
        gradients = torch.autograd.grad(loss, params, create_graph=create_graph)
        params, rest = update(params, rest, gradients, t)
        return params + rest

    def hypergradient() -> Tensor:
        params = problem.start()
        z = params + [torch.zeros_like(p) for _ in range(buffers) for p in params]
        before = []
        for t in range(steps):
            before.append([x.detach().requires_grad_() for x in z])
            z = step(before[-1], t, create_graph=False)
        params = [x.detach().requires_grad_() for x in z[:6]]
        alpha = torch.autograd.grad(problem.val_loss(params), params)
        bar = [*alpha, *(torch.zeros_like(x) for x in z[6:])]
        total = torch.zeros_like(problem.log_odds)
        for t in reversed(range(steps)):
            z = before.pop()
            new = step(z, t, create_graph=True)
            *bar, by_log_odds = torch.autograd.grad(new, [*z, problem.log_odds], bar)
            total += by_log_odds
        return total

    return hypergradient


def darts(problem: Cleaning, optimizer: str, steps: int) -> Callable[[], Tensor]:
    """One step, and its mixed derivative by central differences (Liu et al. 2019)."""
    assert (optimizer, steps) == ("sgd", 1)

    def hypergradient() -> Tensor:
        params = problem.start()
        gradients = torch.autograd.grad(problem.train_loss(params), params)
        new = [
            (p - RATE * g).detach().requires_grad_() for p, g in zip(params, gradients, strict=True)
        ]
        alpha = torch.autograd.grad(problem.val_loss(new), new)
        norm = math.sqrt(sum(float(a.square().sum()) for a in alpha))

        def gradient_at(sign: float) -> Tensor:
            with torch.no_grad():
                moved = [p + sign * 0.01 / norm * a for p, a in zip(params, alpha, strict=True)]
            return problem.hypergradient(problem.train_loss(moved))

        return (gradient_at(-1) - gradient_at(1)) * (RATE * norm / 0.02)

    return hypergradient


serve_methods(Cleaning, {"unrolled": unrolled, "reverse": reverse, "darts": darts}, peak_mib)
