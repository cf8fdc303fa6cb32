"""`accelerate launch`: parses the command line, inspects the host, plans, runs. Imports torch for several processes only."""
