"""The public interface for extensions.

The library's own algorithms use nothing else, and neither does the page that [writes a new
one](../own_algorithm.md) from a paper's equation to its tests.
"""

from gradhpo.core.algorithm import Algorithm
from gradhpo.core.base import BilevelOptimizer
from gradhpo.core.batches import BatchStack, DrawnStack, by_example, num_examples
from gradhpo.core.checkpoints import square_root, unrolled
from gradhpo.core.draws import Draws, mean_along, random_directions
from gradhpo.core.fitting import fit_memory
from gradhpo.core.forward import infinite_at_rest, push_step
from gradhpo.core.inner import InnerUpdate
from gradhpo.core.inner_optimizer import cast_like, descend, init_descent
from gradhpo.core.inner_state import InnerState
from gradhpo.core.inputs import Inputs, LossFunctions
from gradhpo.core.memory import Memory
from gradhpo.core.outer import Estimate
from gradhpo.core.prediction_loss import is_linear, prediction_losses
from gradhpo.core.problem import Problem, Validation
from gradhpo.core.reverse import (
    Cotangent,
    along_a_line,
    cotangent_at_end,
    pull_step,
    pull_through,
    through_start,
)
from gradhpo.core.start import pull_start, push_start, started
from gradhpo.core.state import BilevelState, inner_state, with_inner_state
from gradhpo.core.types import (
    GradFn,
    InnerOptimizer,
    InnerSolver,
    LossFn,
    MetricDict,
    UpdateFn,
)
from gradhpo.core.visibility import Sees
from gradhpo.solvers.default import choose_solver
from gradhpo.solvers.remarks import SINGULAR, remark_on_solves
from gradhpo.solvers.system import LinearSolution, solve_system
from gradhpo.utils.coordinates import map_in_blocks, num_coordinates, ravel, unit_vector, unravel
from gradhpo.utils.freezing import not_trained, trained
from gradhpo.utils.keys import fold_keys, is_key, key_of_numbers, numbers_of_key
from gradhpo.utils.settings import check_count, check_setting, setting, setting_or_schedule
from gradhpo.utils.structure import check_same_structure
from gradhpo.utils.trees import (
    accumulation_dtype,
    tree_dot,
    tree_l2_norm,
    tree_lerp,
    tree_normalize,
    tree_zeros_like,
)
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_arity, check_leading_axis
from gradhpo.utils.warn import warn_once
from gradhpo.wrappers.mutations import Mutation


__all__ = [
    "SINGULAR",
    "Algorithm",
    "BatchStack",
    "BilevelOptimizer",
    "BilevelState",
    "Cotangent",
    "DrawnStack",
    "Draws",
    "Estimate",
    "GradFn",
    "InnerOptimizer",
    "InnerSolver",
    "InnerState",
    "InnerUpdate",
    "Inputs",
    "LinearSolution",
    "LossFn",
    "LossFunctions",
    "Memory",
    "MetricDict",
    "Mutation",
    "Problem",
    "Sees",
    "UpdateFn",
    "Validation",
    "accumulation_dtype",
    "along_a_line",
    "by_example",
    "cast_like",
    "check_arity",
    "check_count",
    "check_leading_axis",
    "check_same_structure",
    "check_setting",
    "checked",
    "choose_solver",
    "cotangent_at_end",
    "descend",
    "fit_memory",
    "fold_keys",
    "infinite_at_rest",
    "init_descent",
    "inner_state",
    "is_key",
    "is_linear",
    "key_of_numbers",
    "map_in_blocks",
    "mean_along",
    "not_trained",
    "num_coordinates",
    "num_examples",
    "numbers_of_key",
    "prediction_losses",
    "pull_start",
    "pull_step",
    "pull_through",
    "push_start",
    "push_step",
    "random_directions",
    "ravel",
    "remark_on_solves",
    "setting",
    "setting_or_schedule",
    "solve_system",
    "square_root",
    "started",
    "through_start",
    "trained",
    "tree_dot",
    "tree_l2_norm",
    "tree_lerp",
    "tree_normalize",
    "tree_zeros_like",
    "unit_vector",
    "unravel",
    "unrolled",
    "warn_once",
    "with_inner_state",
]
