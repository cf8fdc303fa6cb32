"""This process and its peers: devices, the process group, collectives, random states, memory."""
