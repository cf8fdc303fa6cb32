"""The subcommands of ``accelerate``, one module each; `accelerate_cli` imports only the one that is asked for."""
