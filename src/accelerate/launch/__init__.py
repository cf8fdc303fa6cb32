"""From words to running processes: parse, look at the machine, plan, run. Only starting several imports torch."""
