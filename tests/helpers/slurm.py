"""The variables that SLURM gives to a task of a step (``srun``) and to a batch script, as seen with SLURM 22.05.8."""

from __future__ import annotations


def compressed(counts: list[int]) -> str:
    """[2, 2, 2, 1] -> ``2(x3),1``, as SLURM writes tasks per node."""
    parts: list[list[int]] = []
    for count in counts:
        if parts and parts[-1][0] == count:
            parts[-1][1] += 1
        else:
            parts.append([count, 1])
    return ",".join(str(count) if times == 1 else f"{count}(x{times})" for count, times in parts)


def job(nodes: int = 2, nodelist: str = "node[01-02]") -> dict[str, str]:
    """What every process of a job finds, its batch script among them."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOBID": "4711",
        "SLURM_JOB_NODELIST": nodelist,
        "SLURM_NODELIST": nodelist,
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes),
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_TASKS_PER_NODE": compressed([1] * nodes),
    }


def task(rank: int, tasks_per_node: list[int], nodelist: str = "node[01-02]") -> dict[str, str]:
    """What a task of a step finds.

    Args:
        rank: Its number in the step.
        tasks_per_node: How many tasks each node has.
        nodelist: The nodes.
    """
    node, local = 0, rank
    while local >= tasks_per_node[node]:
        local, node = local - tasks_per_node[node], node + 1
    total, nodes = str(sum(tasks_per_node)), str(len(tasks_per_node))
    return {
        **job(len(tasks_per_node), nodelist),
        "SLURM_STEP_ID": "0",
        "SLURM_STEPID": "0",
        "SLURM_STEP_NODELIST": nodelist,
        "SLURM_STEP_NUM_NODES": nodes,
        "SLURM_STEP_NUM_TASKS": total,
        "SLURM_STEP_TASKS_PER_NODE": compressed(tasks_per_node),
        "SLURM_NTASKS": total,
        "SLURM_NPROCS": total,
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
    }
