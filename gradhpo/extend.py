"""What an algorithm of your own is written against: the public extension interface.

[Write your own algorithm](https://gradhpo.readthedocs.io) uses nothing else, and neither do the
algorithms of the library.
"""

from gradhpo.core.algorithm import Algorithm
from gradhpo.core.base import BilevelOptimizer, fit_memory
from gradhpo.core.batches import BatchStack, DrawnStack
from gradhpo.core.inner import InnerState, InnerUpdate
from gradhpo.core.inner_optimizer import cast_like
from gradhpo.core.inputs import Inputs, LossFunctions
from gradhpo.core.outer import Estimate
from gradhpo.core.problem import Problem, Validation
from gradhpo.core.reverse import (
    Cotangent,
    along_a_line,
    cotangent_at_end,
    pull_step,
    pull_through,
    square_root,
    unrolled,
)
from gradhpo.core.state import BilevelState, inner_state, with_inner_state, with_memory
from gradhpo.core.types import InnerOptimizer, LossFn, MetricDict, UpdateFn
from gradhpo.core.visibility import Sees
from gradhpo.core.wrapper import Wrapper
from gradhpo.utils.coordinates import map_in_blocks, num_coordinates, ravel, unit_vector, unravel
from gradhpo.utils.keys import fold_keys, is_key
from gradhpo.utils.settings import check_count, check_setting, setting
from gradhpo.utils.trees import (
    accumulation_dtype,
    tree_dot,
    tree_l2_norm,
    tree_lerp,
    tree_normalize,
    tree_zeros_like,
)
from gradhpo.utils.typecheck import checked
from gradhpo.utils.validation import check_leading_axis, check_same_structure
