"""Scores of training examples by bergson, for the table of that name.

`magic` is its exact derivative through training, with its trainer, checkpoints and backward pass.
We call it as its own command does, with a small network in place of a language model.
"""

import tempfile
from collections.abc import Callable

import numpy as np
import torch
import torchopt
from bergson import IndexConfig, InMemoryCollector
from bergson.magic.trainer import BackwardState, Trainer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torchopt.pytree import tree_iter
from worker import resident_mib, serve_methods


RATE, MOMENTUM = 0.1, 0.9
# bergson's own betas and epsilons.
ADAM_RATE, BETAS, EPS, EPS_ROOT, DECAY = 3e-3, (0.95, 0.975), 1e-8, 1e-17, 0.01
OPTIMIZERS = {
    "SGD": lambda: torchopt.sgd(RATE, momentum=MOMENTUM),
    "AdamW": lambda: torchopt.adamw(
        ADAM_RATE, betas=BETAS, eps=EPS, eps_root=EPS_ROOT, weight_decay=DECAY
    ),
}


class Network(nn.Module):
    """Returns the loss, weighted by example: one of the two outputs that the trainer takes."""

    def __init__(self, arrays: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*weight.shape[::-1]) for weight, _ in arrays)
        with torch.no_grad():
            for layer, (weight, bias) in zip(self.layers, arrays, strict=True):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)

    def logits(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)

    def forward(self, x: Tensor, y: Tensor, example_weight: Tensor, **_: Tensor) -> Tensor:
        return (example_weight * cross_entropy(self.logits(x), y, reduction="none")).mean()


class Stream:
    """The batches of a training, shaped like bergson's `DataStream` of token ids."""

    device = torch.device("cpu")

    def __init__(self, x: Tensor, y: Tensor, rows: Tensor) -> None:
        self.x, self.y, self.rows = x, y, rows
        self.weights = nn.Parameter(torch.ones(len(x)))

    @property
    def requires_grad(self) -> bool:
        return self.weights.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.weights.requires_grad = value

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rows = self.rows[index]
        # The trainer divides by the sum of a mask, and multiplies by it again.
        mask = torch.ones(len(rows))
        batch = {"x": self.x[rows], "y": self.y[rows], "shift_loss_mask": mask}
        return batch | {"example_weight": self.weights[rows]}


class Problem:
    def __init__(self, path: str, dtype: str) -> None:
        torch.set_default_dtype(getattr(torch, dtype))
        data = np.load(path)
        floats = lambda name: torch.tensor(data[name]).to(torch.get_default_dtype())
        integers = lambda name: torch.tensor(data[name]).long()
        self.stream = Stream(floats("x"), integers("y"), integers("rows"))
        self.queries = floats("val_x"), integers("val_y")
        self.arrays = [(floats(f"weight{i}"), floats(f"bias{i}")) for i in range(3)]

    def groups(self, queries: bool) -> list[tuple[Tensor, Tensor]]:
        """Each query alone, or all in one batch."""
        x, y = self.queries
        return list(zip(x[:, None], y[:, None], strict=True)) if queries else [(x, y)]


def magic(problem: Problem, optimizer: str, queries: bool) -> Callable[[], Tensor]:
    """Trains once, then goes back through all steps for each query."""

    def scores() -> Tensor:
        net, stream, found = Network(problem.arrays), problem.stream, []
        trainer, state = Trainer.initialize(net, OPTIMIZERS[optimizer]())
        with tempfile.TemporaryDirectory() as directory:
            state = trainer.train(state, stream, inplace=True, save_dir=directory)
            final = state.to("cpu").detach_()
            for x, y in problem.groups(queries):
                state.detach_()
                state.copy_(final)
                with state.activate(net) as params:
                    loss = net(x, y, torch.ones(len(x)))
                    alphas = torch.autograd.grad(loss, list(params.values()))
                state.detach_()
                moving = [x for x in tree_iter(state.opt_state) if is_floating(x)]
                back = BackwardState(
                    dict(zip(params, alphas, strict=True)),
                    [torch.zeros_like(x) for x in moving],
                    torch.zeros_like(stream.weights),
                )
                back = trainer.backward(directory, stream, back, state, cleanup=False, inplace=True)
                found.append(back.weight_grads.detach())
        return torch.cat(found)

    return scores


def is_floating(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def cosine(problem: Problem, optimizer: str, queries: bool) -> Callable[[], Tensor]:
    """Cosines of the full gradients at the end of training, without projection.

    They have a hypergradient's sign: more weight on a similar example lowers the query's loss.
    """

    def scores() -> Tensor:
        net = Network(problem.arrays)
        trainer, state = Trainer.initialize(net, OPTIMIZERS[optimizer]())
        state = trainer.train(state, problem.stream, inplace=True)
        end = [(state.params[f"layers.{i}.weight"], state.params[f"layers.{i}.bias"])
               for i in range(3)]  # fmt: skip
        net = Network(end)
        of_train = collected(net, problem.stream.x, problem.stream.y)
        of_queries = collected(net, *problem.queries)
        return -cosine_similarity(of_queries[:, None], of_train, dim=-1).flatten()

    return scores


def collected(net: Network, x: Tensor, y: Tensor) -> Tensor:
    """A gradient per example by bergson's collector, which takes sequences (here of length 1)."""
    net.device = x.device
    every = list(range(len(x)))
    collector = InMemoryCollector(model=net, data=every, cfg=IndexConfig(run_path=""))
    with collector.with_batch():
        losses = cross_entropy(net.logits(x[:, None])[:, 0], y, reduction="none")
        losses.sum().backward()
        collector.process_batch(every, losses=losses)
    collector.teardown()
    return torch.cat(list(collector.gradients.values()), dim=1)


serve_methods(
    Problem,
    {"magic": magic, "cosine": cosine, "nothing": lambda problem: list},
    lambda function: resident_mib("VmHWM"),
)
