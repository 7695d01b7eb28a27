"""The subcommands of `streamguard`, one module each; heavy imports stay inside the functions."""
