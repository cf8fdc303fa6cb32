"""From words to running processes: parse, look at the machine, plan, run. Imports torch only to start several processes."""
