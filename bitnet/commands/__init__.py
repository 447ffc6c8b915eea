"""The subcommands of ``bitnet``, a few to a file. Heavy libraries are imported inside the functions."""
