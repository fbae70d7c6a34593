# `just` lists these; they are short names for commands that also run without it.

export PATH := justfile_directory() / ".venv/bin:" + env("PATH")

@default:
    just --list --unsorted

# formatting, lint and types
lint:
    ruff format --check .
    ruff check .
    mypy

# the whole suite, or what is named: just test tests/test_flow.py
test *WHAT: lint
    python -m pytest {{WHAT}}

# do BASE and the working tree give the same weights, losses, pictures and scores?
same BASE="main":
    python benchmarks/same_bytes.py {{BASE}}

# the command reference, written anew, and the site, with every link checked
docs:
    python docs/write_commands.py
    mkdocs build --strict

# a benchmark and its options: just bench expert --batch 4
bench NAME *OPTIONS:
    OMP_NUM_THREADS=1 python benchmarks/{{NAME}}.py {{OPTIONS}}
