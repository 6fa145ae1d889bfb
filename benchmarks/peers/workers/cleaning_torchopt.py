"""Hypergradients of data cleaning by TorchOpt."""

from collections.abc import Callable

import torch
import torchopt
from cleaning import ADAM_RATE, BETAS, EPS, EPS_ROOT, MOMENTUM, RATE, Cleaning, peak_mib
from torch import Tensor
from worker import serve_methods


def unrolled(problem: Cleaning, optimizer: str, steps: int) -> Callable[[], Tensor]:
    net = problem.net
    first = torchopt.extract_state_dict(problem.reset(), by="deepcopy")

    def hypergradient() -> Tensor:
        torchopt.recover_state_dict(net, first)
        if optimizer == "sgd":
            inner = torchopt.MetaSGD(net, lr=RATE, momentum=MOMENTUM)
        else:
            inner = torchopt.MetaAdam(net, ADAM_RATE, BETAS, EPS, eps_root=EPS_ROOT)
        for _ in range(steps):
            inner.step(problem.weighted(net(problem.train[0])))
        loss = torch.nn.functional.cross_entropy(net(problem.val[0]), problem.val[1])
        hypergradient = problem.hypergradient(loss)
        torchopt.stop_gradient(net)
        return hypergradient

    return hypergradient


serve_methods(Cleaning, {"unrolled": unrolled}, peak_mib)
