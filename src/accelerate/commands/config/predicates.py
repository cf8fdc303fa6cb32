"""Pure functions that rows of the table use: conditions on answers, checks, and conversions to the file's values.

A check returns the problem with an answer, or None.
"""

from __future__ import annotations

import math
import re
from typing import Any

from .flow import Answers

# Conditions for `when` ---------------------------------------------------------------------------------------------


def more_than_one(answer: Any) -> bool:
    """Returns whether a count is above 1."""
    return answer is not None and int(answer) > 1


def more_than_none(answer: Any) -> bool:
    """Returns whether a number is above 0."""
    return answer is not None and int(answer) > 0


def first(rank: Any) -> bool:
    """Returns whether the machine rank is 0 or unset."""
    return not rank


def not_yes(answer: Any) -> bool:
    """Returns whether the answer is no, or the question was not asked."""
    return answer is not True


def not_version_1(answer: Any) -> bool:
    """Returns whether the FSDP version is not 1."""
    return answer != 1


def not_standard(answer: Any) -> bool:
    """Returns whether the launcher is one of DeepSpeed's."""
    return answer not in (None, "standard")


# Checks --------------------------------------------------------------------------------------------------------------


def is_a_rank(rank: int, answers: Answers) -> str | None:
    """Checks that a machine rank is below the number of machines."""
    last = answers["num_machines"] - 1
    return None if rank <= last else f"expected a number from 0 to {last}, found {rank}."


def is_an_address(address: str, answers: Answers) -> str | None:
    """Checks that a host name or address has no white space or slash."""
    return None if not re.search(r"[\s/]", address) else f"expected a name or an address, found {address!r}."


def is_a_port(port: int, answers: Answers) -> str | None:
    """Checks a port number; 0 (any free port) is invalid, since all machines must use the same port."""
    return None if 0 < port < 65536 else f"expected a number from 1 to 65535, found {port}."


def is_a_count(text: str, answers: Answers) -> str | None:
    """Checks a positive integer, for options declared as text."""
    return None if text.isdecimal() and int(text) else f"expected a whole number above 0, found {text!r}."


def are_numbers_or_all(text: str, answers: Answers) -> str | None:
    """Checks a list of device indices, or ``all``."""
    fits = re.fullmatch(r"all|\d+(\s*,\s*\d+)*", text)
    return None if fits else f"expected numbers separated by commas, as in 0,1, or all, found {text!r}."


def are_variables(words: tuple[str, ...], answers: Answers) -> str | None:
    """Checks that each word is ``NAME=value``."""
    wrong = [word for word in words if not re.match(r"[A-Za-z_]\w*=", word)]
    return f"expected NAME=value, found {wrong[0]!r}." if wrong else None


_MESH = tuple(f"parallelism_config_{size}_size" for size in ("dp_replicate", "dp_shard", "tp", "cp", "sp"))
_MEGATRON = ("megatron_lm_tp_degree", "megatron_lm_pp_degree")


def closes_the_mesh(size: int, answers: Answers) -> str | None:
    """Checks, for the last size of the mesh, that the machines divide its number of ranks."""
    ranks, machines = size * _product(_MESH, answers), answers["num_machines"]
    return f"{ranks} ranks are not divisible by {machines} machines." if ranks % machines else None


def fewest_processes(answers: Answers) -> int:
    """Returns the ranks of the device mesh, or else a multiple of machines and of Megatron-LM's TP x PP ranks."""
    if answers.get("use_parallelism_config"):
        return _product(_MESH, answers)
    return math.lcm(_product(("num_machines",), answers), _product(_MEGATRON, answers))


def fills_all(processes: int, answers: Answers) -> str | None:
    """Checks that the processes match the device mesh, or are divisible by machines and Megatron-LM's TP x PP ranks."""
    least = fewest_processes(answers)
    if answers.get("use_parallelism_config"):
        return None if processes == least else f"the sizes of the device mesh multiply to {least}, found {processes}."
    if processes % least == 0:
        return None
    return f"expected a multiple of {least}, for the machines, stages and tensor parallel ranks, found {processes}."


def _product(names: tuple[str, ...], answers: Answers) -> int:
    return math.prod(answers.get(name) or 1 for name in names)


# Conversions for `write` ---------------------------------------------------------------------------------------------


def upper(text: str) -> str:
    """Converts to the spelling of the documentation's files."""
    return text.upper()


def unless_all(text: str) -> str | None:
    """Omits the key for all devices."""
    return None if text == "all" else text.replace(" ", "")


def one_or_three(words: tuple[bool, ...]) -> Any:
    """Abbreviates three equal values to one."""
    return words[0] if len(set(words)) == 1 else words


def yes_or_no(answer: bool) -> str:
    """Converts to the spelling of the documentation's files."""
    return "yes" if answer else "no"
