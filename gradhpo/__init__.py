"""Hypergradients in JAX: tune thousands of hyperparameters by gradient, during training."""

from gradhpo.algorithms.baselines import FOOptimizer, OneStepOptimizer
from gradhpo.algorithms.bome import BOMEOptimizer
from gradhpo.algorithms.discount import update_w_star
from gradhpo.algorithms.evolution import EvolutionOptimizer
from gradhpo.algorithms.fixed import FixedOptimizer
from gradhpo.algorithms.forward import ForwardModeOptimizer
from gradhpo.algorithms.forward_gradient import ForwardGradientOptimizer
from gradhpo.algorithms.functional import FunctionalOptimizer
from gradhpo.algorithms.greedy import GreedyOptimizer
from gradhpo.algorithms.implicit_diff import ImplicitOptimizer
from gradhpo.algorithms.natural import NHGDOptimizer
from gradhpo.algorithms.online import OnlineHypergradientOptimizer
from gradhpo.algorithms.penalty import PenaltyOptimizer
from gradhpo.algorithms.soba import SOBAOptimizer
from gradhpo.algorithms.t1_t2 import T1T2Optimizer
from gradhpo.algorithms.unrolled import DrMADOptimizer, UnrolledOptimizer
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.batches import BatchStack, DataBatch
from gradhpo.core.inputs import LossFunctions
from gradhpo.core.microbatches import chunked_cross_entropy, microbatched
from gradhpo.core.partition import model_loss, partition
from gradhpo.core.prediction_loss import PredictionLoss
from gradhpo.core.state import BilevelState
from gradhpo.core.types import (
    GradFn,
    InnerOptimizer,
    InnerSolver,
    LossFn,
    MetricDict,
    RealScalarLike,
    UpdateFn,
)
from gradhpo.data.arrays import ArrayData
from gradhpo.data.cross_validation import cross_validation
from gradhpo.data.loaders import iterate
from gradhpo.diagnostics.compare import compare_hypergradients
from gradhpo.diagnostics.finite_difference import finite_difference_hypergradient
from gradhpo.diagnostics.health import check_hypergradient
from gradhpo.diagnostics.horizon import explain_horizon
from gradhpo.diagnostics.metasmooth import metasmoothness
from gradhpo.diagnostics.over_batches import compare_over_batches
from gradhpo.diagnostics.perturbations import leave_out
from gradhpo.diagnostics.planning import plan
from gradhpo.diagnostics.retraining import retraining_score
from gradhpo.solvers.neumann import Neumann
from gradhpo.solvers.nystrom import Nystrom
from gradhpo.solvers.solution import implicit_solution
from gradhpo.solvers.support import Support
from gradhpo.training.checkpoint import Checkpoint, load_checkpoint
from gradhpo.training.controls import BestState, EarlyStopping, TimeLimit
from gradhpo.training.history import History
from gradhpo.training.loop import run
from gradhpo.training.monitor import Monitor
from gradhpo.training.replay import Replay, replay
from gradhpo.training.sign_descent import sign_descent
from gradhpo.training.smoothing import moving_average
from gradhpo.utils.detached import detach
from gradhpo.utils.freezing import frozen, unfrozen
from gradhpo.utils.gradients import vjp_wrt_both, vjp_wrt_lambda
from gradhpo.utils.logging import CSVLogger, JSONLinesLogger
from gradhpo.utils.trees import (
    tree_dot,
    tree_l2_norm,
    tree_lerp,
    tree_normalize,
    tree_zeros_like,
)
from gradhpo.wrappers.learned_mutation import LearnedMutation
from gradhpo.wrappers.mutations import RandomMutation, ResampleMutation
from gradhpo.wrappers.population import Population
from gradhpo.wrappers.tasks import TaskBatched


__version__ = "1.0.0.dev0"

HyperDistillOptimizer = OnlineHypergradientOptimizer
"""The same class as [`OnlineHypergradientOptimizer`][gradhpo.OnlineHypergradientOptimizer], by the
name of the method in its paper (Lee et al., ICLR 2022)."""


__all__ = [
    "ArrayData",
    "BOMEOptimizer",
    "BatchStack",
    "BestState",
    "BilevelOptimizer",
    "BilevelState",
    "CSVLogger",
    "Checkpoint",
    "DataBatch",
    "DrMADOptimizer",
    "EarlyStopping",
    "EvolutionOptimizer",
    "FOOptimizer",
    "FixedOptimizer",
    "ForwardGradientOptimizer",
    "ForwardModeOptimizer",
    "FunctionalOptimizer",
    "GradFn",
    "GreedyOptimizer",
    "History",
    "HyperDistillOptimizer",
    "ImplicitOptimizer",
    "InnerOptimizer",
    "InnerSolver",
    "JSONLinesLogger",
    "LearnedMutation",
    "LossFn",
    "LossFunctions",
    "MetricDict",
    "Monitor",
    "NHGDOptimizer",
    "Neumann",
    "Nystrom",
    "OneStepOptimizer",
    "OnlineHypergradientOptimizer",
    "PenaltyOptimizer",
    "Population",
    "PredictionLoss",
    "RandomMutation",
    "RealScalarLike",
    "Replay",
    "ResampleMutation",
    "SOBAOptimizer",
    "Support",
    "T1T2Optimizer",
    "TaskBatched",
    "TimeLimit",
    "UnrolledOptimizer",
    "UpdateFn",
    "check_hypergradient",
    "chunked_cross_entropy",
    "compare_hypergradients",
    "compare_over_batches",
    "cross_validation",
    "detach",
    "explain_horizon",
    "finite_difference_hypergradient",
    "frozen",
    "implicit_solution",
    "iterate",
    "leave_out",
    "load_checkpoint",
    "metasmoothness",
    "microbatched",
    "model_loss",
    "moving_average",
    "partition",
    "plan",
    "replay",
    "retraining_score",
    "run",
    "sign_descent",
    "tree_dot",
    "tree_l2_norm",
    "tree_lerp",
    "tree_normalize",
    "tree_zeros_like",
    "unfrozen",
    "update_w_star",
    "vjp_wrt_both",
    "vjp_wrt_lambda",
]
