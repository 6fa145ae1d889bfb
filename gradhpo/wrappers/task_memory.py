"""What tasks carry over from step to step."""

from typing import Any

from jaxtyping import Array, PyTree

from gradhpo.core.inner_state import InnerState
from gradhpo.core.memory import MemoryOfEach


class TaskMemory(MemoryOfEach):
    """What [`TaskBatched`][gradhpo.TaskBatched] carries over.

    - `task`: the number of each task, shape `[tasks]`, int32.
    - `of_each`: the memory of the wrapped optimizer, every leaf with a leading task axis.
    """

    task: Array
    of_each: PyTree


class RestartingMemory(TaskMemory):
    """The memory of tasks that restart in turn.

    - `restart_from`: the parameters and the model state that they restart from, without a task
        axis.
    - `restarted_at`: the outer step at which a task restarted, -1 once it has taken a step since;
        shape `[tasks]`, int32.
    """

    restart_from: InnerState
    restarted_at: Array


def memory_of(memory: Any, num_tasks: int, restarting: bool = False) -> TaskMemory:
    """The memory, if the state was made for this many tasks, which its arrays do not show.

    `restarting`: it must also know where tasks restart.
    """
    needed, found = f"num_tasks={num_tasks}", "without a task axis"
    if isinstance(memory, TaskMemory):
        if memory.task.shape != (num_tasks,):
            found = f"for {memory.task.shape[0]} tasks"
        elif restarting and not isinstance(memory, RestartingMemory):
            needed, found = "restart_every", "without it, and does not know where tasks begin"
        else:
            return memory
    raise ValueError(
        f"the state was made {found}, and TaskBatched has {needed}: make it with this optimizer's "
        "init(params, hyperparams), where params belong to one task"
    )
