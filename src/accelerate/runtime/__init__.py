"""The process group and this process: devices, collectives, random states, memory."""
