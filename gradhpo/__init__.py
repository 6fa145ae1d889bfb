"""Hypergradients in JAX: tune thousands of hyperparameters by gradient, during training."""

from gradhpo.algorithms.baselines import FOOptimizer, OneStepOptimizer
from gradhpo.algorithms.greedy import GreedyOptimizer
from gradhpo.algorithms.online import OnlineHypergradientOptimizer
from gradhpo.algorithms.t1_t2 import T1T2Optimizer
from gradhpo.algorithms.tasks import TaskBatched
from gradhpo.algorithms.unrolled import DrMADOptimizer, UnrolledOptimizer
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.partition import model_loss, partition
from gradhpo.core.state import BilevelState
from gradhpo.core.types import (
    BatchStack,
    DataBatch,
    InnerOptimizer,
    LossFn,
    LossFunctions,
    MetricDict,
    RealScalarLike,
    UpdateFn,
)
from gradhpo.diagnostics.finite_difference import finite_difference_hypergradient
from gradhpo.training.data import ArrayData, iterate
from gradhpo.training.history import History
from gradhpo.training.loop import run
from gradhpo.utils.gradients import (
    tree_dot,
    tree_l2_norm,
    tree_lerp,
    tree_normalize,
    tree_zeros_like,
    update_w_star,
    vjp_wrt_both,
    vjp_wrt_lambda,
)


__version__ = "1.0.0.dev0"

__all__ = [
    "ArrayData",
    "BatchStack",
    "BilevelOptimizer",
    "BilevelState",
    "DataBatch",
    "DrMADOptimizer",
    "FOOptimizer",
    "GreedyOptimizer",
    "History",
    "InnerOptimizer",
    "LossFn",
    "LossFunctions",
    "MetricDict",
    "OneStepOptimizer",
    "OnlineHypergradientOptimizer",
    "RealScalarLike",
    "T1T2Optimizer",
    "TaskBatched",
    "UnrolledOptimizer",
    "UpdateFn",
    "finite_difference_hypergradient",
    "iterate",
    "model_loss",
    "partition",
    "run",
    "tree_dot",
    "tree_l2_norm",
    "tree_lerp",
    "tree_normalize",
    "tree_zeros_like",
    "update_w_star",
    "vjp_wrt_both",
    "vjp_wrt_lambda",
]
