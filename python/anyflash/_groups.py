"""Groups of torch.distributed, as every function with ``process_group`` reads them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def place_in(process_group: Any) -> tuple[int, int]:
    """(rank, size) of this process in a group; None is torch.distributed's default one.

    Raises:
        ValueError: this is no group, this process is not in it, or torch.distributed is not
            initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "process_group: expected a group of torch.distributed, which has not been initialized "
            f"(torch.distributed.init_process_group), got {process_group!r}"
        )
    outside = process_group == dist.GroupMember.NON_GROUP_MEMBER
    if not (process_group is None or outside or isinstance(process_group, dist.ProcessGroup)):
        raise ValueError(
            f"process_group: expected a group of torch.distributed, got {process_group!r}"
        )
    if outside or dist.get_rank(process_group) < 0:
        raise ValueError(
            "process_group: expected a group that this process belongs to, got one without it"
        )
    return dist.get_rank(process_group), dist.get_world_size(process_group)
