"""The data cleaning problem in PyTorch, shared by all peers of the table `torch`."""

import gc
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy


RATE, MOMENTUM = 0.1, 0.9
ADAM_RATE, BETAS, EPS, EPS_ROOT = 1e-3, (0.9, 0.999), 1e-8, 1e-16


def peak_mib(function: Callable) -> float:
    """The peak memory of the tensors made by a call, as the profiler counts them.

    The process would grow by less: the allocator keeps memory from the previous call.
    """
    gc.collect()  # otherwise this call would free an earlier one's leftovers
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = [x for x in events if x.name() == "[memory]"]
    assert changes, "the profiler recorded no memory"
    changes.sort(key=lambda x: x.start_ns())
    return max(itertools.accumulate(x.nbytes() for x in changes)) / 2**20


class Cleaning:
    """Data, initial weights and hyperparameters from the file that the parent wrote."""

    def __init__(self, path: str, dtype: str) -> None:
        torch.set_default_dtype(getattr(torch, dtype))
        data = np.load(path)
        floats = lambda name: torch.tensor(data[name]).to(torch.get_default_dtype())
        integers = lambda name: torch.tensor(data[name]).long()
        self.train = floats("x"), integers("y")
        self.val = floats("val_x"), integers("val_y")
        self.log_odds = floats("log_odds").requires_grad_()
        self.first = [floats(f"param{i}") for i in range(6)]
        shapes = [weight.shape for weight in self.first[::2]]
        layers = [nn.Linear(inputs, outputs) for outputs, inputs in shapes]
        self.net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.names = [name for name, _ in self.net.named_parameters()]

    def reset(self) -> nn.Module:
        """The network with its initial weights."""
        with torch.no_grad():
            for parameter, first in zip(self.net.parameters(), self.first, strict=True):
                parameter.copy_(first)
        return self.net

    def start(self) -> list[Tensor]:
        """The initial weights as leaves of a graph."""
        return [first.detach().clone().requires_grad_() for first in self.first]

    def logits(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        return functional_call(self.net, dict(zip(self.names, params, strict=True)), (x,))

    def weighted(self, logits: Tensor) -> Tensor:
        losses = cross_entropy(logits, self.train[1], reduction="none")
        return (torch.sigmoid(self.log_odds) * losses).mean()

    def train_loss(self, params: Sequence[Tensor]) -> Tensor:
        return self.weighted(self.logits(params, self.train[0]))

    def val_loss(self, params: Sequence[Tensor]) -> Tensor:
        return cross_entropy(self.logits(params, self.val[0]), self.val[1])

    def hypergradient(self, val_loss: Tensor) -> Tensor:
        return torch.autograd.grad(val_loss, self.log_odds)[0]
