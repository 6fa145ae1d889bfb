"""Runs the blocks of a page in docs/how_to that are written for another library."""

from typing import Any


def flat(tree: Any) -> list[float]:
    """The numbers of arrays in lists and dicts, by order and by name."""
    if isinstance(tree, dict):
        tree = [tree[name] for name in sorted(tree)]
    if hasattr(tree, "tolist"):
        tree = tree.tolist()
    return [x for part in tree for x in flat(part)] if isinstance(tree, list) else [tree]


def run(*codes: str) -> list[float]:
    """What these blocks, one after the other, call `gradient` in the end."""
    namespace: dict[str, Any] = {}
    for code in codes:
        exec(compile(code, "page", "exec"), namespace)
    return flat(namespace["gradient"])


if __name__ == "__main__":
    from worker import serve

    serve(run=lambda codes: run(*codes))
