"""`python -m vugen_cli`, for torchrun."""

from vugen_cli.app import main

if __name__ == "__main__":
    main()
