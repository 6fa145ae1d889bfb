"""What tasks carry over from step to step."""

from typing import Any

from jaxtyping import Array, PyTree

from gradhpo.core.memory import MemoryOfEach


class TaskMemory(MemoryOfEach):
    """What [`TaskBatched`][gradhpo.TaskBatched] carries over.

    - `task`: the number of each task, shape `[tasks]`, int32.
    - `of_each`: the memory of the wrapped optimizer, every leaf with a leading task axis.
    """

    task: Array
    of_each: PyTree


def memory_of(memory: Any, num_tasks: int) -> TaskMemory:
    """The memory of a state made for this number of tasks; its parameters alone would not tell."""
    if isinstance(memory, TaskMemory) and memory.task.shape == (num_tasks,):
        return memory
    found = "without a task axis"
    if isinstance(memory, TaskMemory):
        found = f"for {memory.task.shape[0]} tasks"
    raise ValueError(
        f"the state was made {found}, and TaskBatched has num_tasks={num_tasks}: make it "
        "with this optimizer's init(params, hyperparams), where params are those of one task"
    )
