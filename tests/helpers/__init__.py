"""What several tests share: the pool of real ranks, and the resetting of process-wide state."""
