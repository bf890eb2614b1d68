"""Memory of large tensors on a CPU."""

from __future__ import annotations

from minilm_fast.ops._dispatch import EXTENSION_ERROR


def keep_large_blocks() -> bool:
    """Make PyTorch take large CPU tensors from blocks that are kept and used again, for the rest of the process.

    Batches of ever new sizes leave holes in the C library's heap that fit nothing later: a run grew to several times
    of what it used at a time. With kept blocks, at most a quarter more is held, and on huge pages, which also makes a
    step faster (``csrc/cpu/block_allocator.cpp``).

    Returns:
        Whether it could be done: it needs Linux and the compiled extension.
    """
    if EXTENSION_ERROR is not None:
        return False
    from minilm_fast import _C

    return bool(_C.use_block_allocator())
