"""The subcommands: options in, one call into the library, one summary out."""
