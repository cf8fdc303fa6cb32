"""What a row of the table says about an answer in words: conditions, checks, and how the file spells it.

Pure functions, one line each where possible. A check gives what is wrong with the answer, or None.
"""

from __future__ import annotations

import math
import re
from typing import Any

from .flow import Answers

# What `when` can say of an answer besides its value ----------------------------------------------------------------


def more_than_one(answer: Any) -> bool:
    """There are several: machines, ranks."""
    return answer is not None and int(answer) > 1


def more_than_none(answer: Any) -> bool:
    """It is above 0."""
    return answer is not None and int(answer) > 0


def first(rank: Any) -> bool:
    """This is the machine that starts the others, or the only one."""
    return not rank


def not_yes(answer: Any) -> bool:
    """It was answered with no, or not asked."""
    return answer is not True


def not_version_1(answer: Any) -> bool:
    """FSDP of version 2, or none."""
    return answer != 1


def not_standard(answer: Any) -> bool:
    """DeepSpeed's own launchers."""
    return answer not in (None, "standard")


# What `check` compares -----------------------------------------------------


def is_a_rank(rank: int, answers: Answers) -> str | None:
    """Machines are numbered from 0."""
    last = answers["num_machines"] - 1
    return None if rank <= last else f"expected a number from 0 to {last}, found {rank}."


def is_an_address(address: str, answers: Answers) -> str | None:
    """A name or an address is one word."""
    return None if not re.search(r"[\s/]", address) else f"expected a name or an address, found {address!r}."


def is_a_port(port: int, answers: Answers) -> str | None:
    """Other machines cannot guess a free port."""
    return None if 0 < port < 65536 else f"expected a number from 1 to 65535, found {port}."


def is_a_count(text: str, answers: Answers) -> str | None:
    """For options that are declared as text."""
    return None if text.isdecimal() and int(text) else f"expected a whole number above 0, found {text!r}."


def are_numbers_or_all(text: str, answers: Answers) -> str | None:
    """Devices by their numbers."""
    fits = re.fullmatch(r"all|\d+(\s*,\s*\d+)*", text)
    return None if fits else f"expected numbers separated by commas, as in 0,1, or all, found {text!r}."


def are_variables(words: tuple[str, ...], answers: Answers) -> str | None:
    """NAME=value."""
    wrong = [word for word in words if not re.match(r"[A-Za-z_]\w*=", word)]
    return f"expected NAME=value, found {wrong[0]!r}." if wrong else None


_MESH = tuple(f"parallelism_config_{size}_size" for size in ("dp_replicate", "dp_shard", "tp", "cp", "sp"))
_MEGATRON = ("megatron_lm_tp_degree", "megatron_lm_pp_degree")


def closes_the_mesh(size: int, answers: Answers) -> str | None:
    """With the last of its sizes, machines must be able to share the mesh."""
    ranks, machines = size * _product(_MESH, answers), answers["num_machines"]
    return f"{machines} machines cannot share {ranks} ranks evenly." if ranks % machines else None


def fewest_processes(answers: Answers) -> int:
    """One for each place of the device mesh; else one for each machine, stage and tensor parallel rank."""
    if answers.get("use_parallelism_config"):
        return _product(_MESH, answers)
    return math.lcm(_product(("num_machines",), answers), _product(_MEGATRON, answers))


def fills_all(processes: int, answers: Answers) -> str | None:
    """A mesh has one process at each place; machines, and the ranks of Megatron-LM, have equally many."""
    least = fewest_processes(answers)
    if answers.get("use_parallelism_config"):
        return None if processes == least else f"the sizes of the device mesh multiply to {least}, found {processes}."
    if processes % least == 0:
        return None
    return f"expected a multiple of {least}, for the machines, stages and tensor parallel ranks, found {processes}."


def _product(names: tuple[str, ...], answers: Answers) -> int:
    return math.prod(answers.get(name) or 1 for name in names)


# What `write` turns an answer into -----------------------------------------------------------------------------------


def upper(text: str) -> str:
    """As the documentation writes it in files."""
    return text.upper()


def unless_all(text: str) -> str | None:
    """All devices need no key."""
    return None if text == "all" else text.replace(" ", "")


def one_or_three(words: tuple[bool, ...]) -> Any:
    """One word where it stands for all three."""
    return words[0] if len(set(words)) == 1 else words


def yes_or_no(answer: bool) -> str:
    """As the documentation writes it in files."""
    return "yes" if answer else "no"
